import io
import random
import tarfile

import pytest

from dask_imgread.shards import open_shard
from dask_imgread.tar import NotTarError, walk_members


def walk(path, *span):
    with open_shard(str(path)) as source:
        return list(walk_members(source, *span))


def make_tar(path, names, format=tarfile.PAX_FORMAT, **options):
    with tarfile.open(path, "w", format=format, **options) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 100 * number
            tar.addfile(info, io.BytesIO(b"%d" % (number % 10) * info.size))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_agrees_with_tarfile(tmp_path, format):
    long = "folder/" * 12 + "x" * 60 + ".jpg"  # fits ustar's prefix and name
    names = ["a.jpg", "b/c.png", long]
    if format != tarfile.USTAR_FORMAT:
        names += ["é日本.jpg", "y" * 300 + ".jpg"]
    path = make_tar(tmp_path / "s.tar", names, format)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar]
    assert [m[:4] for m in walk(path)] == expected


def test_passes_over_what_is_no_file(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in [
            (tarfile.DIRTYPE, "folder"),
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
            (tarfile.FIFOTYPE, "pipe"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert [m.name for m in walk(path)] == ["a.jpg"]


@pytest.mark.parametrize("content", [b"", b"hello", b"no tar at all " * 100, bytes(range(256)) * 8])
def test_refuses_what_is_no_tar(tmp_path, content):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(NotTarError, match="not a tar archive"):
        walk(path)


def test_walks_a_part(tmp_path):
    path = make_tar(tmp_path / "s.tar", [f"{n}.jpg" for n in range(9)])
    members = walk(path)
    part = walk(path, members[3].start, members[6].start)
    assert part == members[3:6]


def test_goes_on_in_archives_put_together(tmp_path):
    one = make_tar(tmp_path / "1.tar", ["a.jpg", "b.jpg"])
    two = make_tar(tmp_path / "2.tar", ["c.jpg"])
    both = tmp_path / "3.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert [m.name for m in walk(both)] == ["a.jpg", "b.jpg", "c.jpg"]


def test_reads_only_headers(tmp_path):
    path = make_tar(tmp_path / "s.tar", [f"{n}.jpg" for n in range(200)])
    with open_shard(str(path)) as source:
        read = source.read_at
        sizes = []
        source.read_at = lambda offset, size: sizes.append(size) or read(offset, size)
        members = list(walk_members(source))
    assert len(members) == 200
    assert max(sizes) == 512


def test_views_of_a_local_shard_stay_what_they_were(tmp_path):
    """Read ahead or not, past the end too, while earlier views are held."""
    content = random.Random(1).randbytes(9 << 20)
    (tmp_path / "s.tar").write_bytes(content)
    rng, held, offset = random.Random(2), [], 0
    with open_shard(str(tmp_path / "s.tar")) as source:
        for _ in range(600):
            size = rng.choice([0, 1, 512, 40_000, 40_000, 900_000])
            held.append((source.view_at(offset, size), content[offset : offset + size]))
            follows = rng.random() < 0.9 and offset < len(content)
            offset = offset + size + rng.randrange(600) if follows else rng.randrange(9 << 20)
    assert all(view == expected for view, expected in held)
