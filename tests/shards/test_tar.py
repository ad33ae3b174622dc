import io
import random
import tarfile

import pytest

from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import NotTarError, walk_members


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
    links = ("link.jpg", "a.jpg"), ("hard.jpg", "a.jpg")
    assert [(m.name, m.link) for m in walk(path)] == [*links, ("a.jpg", None)]


@pytest.mark.parametrize("content", [b"", b"hello", b"no tar at all " * 100, bytes(range(256)) * 8])
def test_refuses_what_is_no_tar(tmp_path, content):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(NotTarError, match="not a tar archive"):
        walk(path)


def test_sums_of_signed_bytes_as_old_writers_have_them(tmp_path):
    path = make_tar(tmp_path / "s.tar", ["ééé.jpg"], tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in content[:512])
    assert signed != sum(content[:512])
    for wrong in (0, 1, 65521):
        content[148:156] = b"%06o\0 " % (signed + wrong)
        path.write_bytes(content)
        if wrong:
            with pytest.raises(NotTarError, match="wrong checksum"):
                walk(path)
        else:
            assert [member.name for member in walk(path)] == ["ééé.jpg"]


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
    assert [m.name for m in walk(both)] == ["a.jpg", "b.jpg", "", "c.jpg"]
    assert all(member.problem is None for member in walk(both))


def test_reads_only_headers(tmp_path):
    path = make_tar(tmp_path / "s.tar", [f"{n}.jpg" for n in range(200)])
    with open_shard(str(path)) as source:
        read = source.read_at
        sizes = []
        source.read_at = lambda offset, size: sizes.append(size) or read(offset, size)
        members = list(walk_members(source))
    assert len(members) == 200
    assert max(sizes[:-1]) == 512
    assert sizes[-1] <= 16 << 10  # behind the mark of the end


def write_stones(path, size=5000, count=12):
    """A shard whose members never have a block of zeros; return the offsets of their headers."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"{number:02d}.jpg")
            info.size = size
            tar.addfile(info, io.BytesIO(bytes([1 + number % 200]) * size))
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def overwrite(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("fill", [b"\0", b"x"])
@pytest.mark.parametrize("size", [512, 4096, 16_384])
@pytest.mark.parametrize("shift", [0, 512, 2048])
def test_what_lies_behind_damage_is_read(tmp_path, fill, size, shift):
    """Holes that begin before, at or after a header, and end within a member or at a header."""
    path = tmp_path / "s.tar"
    headers = write_stones(path)
    start = headers[4] - shift
    overwrite(path, start, fill * size)
    hit = [number for number, h in enumerate(headers) if start <= h < start + size]
    members = walk(path)
    names = [m.name for m in members if m.name]
    assert names == [f"{n:02d}.jpg" for n in range(12) if n not in hit]
    damage = [m.problem for m in members if m.problem]
    assert len(damage) == (len(hit) > 0)
    for problem in damage:
        assert problem.startswith("damaged archive: ")
        assert f"at offset {headers[4]}" in problem


def test_holes_at_the_ends(tmp_path):
    """At the beginning, up to the end, and nothing else: each is recorded."""
    path = tmp_path / "s.tar"
    headers = write_stones(path, count=40)
    size = path.stat().st_size
    for start, stop, left in [
        (0, 6000, range(2, 40)),
        (headers[20], size, range(20)),
        (headers[3], headers[9], [*range(3), *range(9, 40)]),
        (0, size, []),
    ]:
        write_stones(path, count=40)
        overwrite(path, start, bytes(stop - start))
        members = walk(path)
        assert [m.name for m in members if m.name] == [f"{n:02d}.jpg" for n in left]
        assert [m.start for m in members if m.problem] == [start]


@pytest.mark.parametrize("hole", [1024, 4096, 16 << 10, 32 << 10, 1 << 20])
def test_holes_of_round_sizes_at_round_places(tmp_path, hole):
    """As downloads in pieces leave them: at a header, and up to one, or up to the end."""
    path = tmp_path / "s.tar"
    sizes = 3584 if hole > 1024 else 512  # with their headers 4096, and 1024
    headers = write_stones(path, sizes, count=600 if hole > 1024 else 80)
    end = path.stat().st_size
    round_ones = [n for n in headers[1:] if n % hole == 0 and n + hole < headers[-1]]
    for start in [*round_ones[:8], end - hole]:
        write_stones(path, sizes, count=len(headers))
        overwrite(path, start, bytes(hole))
        members = walk(path)
        lost = sum(start <= header < start + hole for header in headers)
        assert len([m for m in members if m.name]) == len(headers) - lost
        # What ends an archive, and fills its record, looks the same where another one follows.
        alike = hole == 1024 or (hole < 10_240 and (start + hole) % 10_240 == 0)
        marks = [m.problem is None for m in members if not m.name]
        assert not lost or marks == [alike] or (alike and start + hole == end)


def test_an_end_of_archive_is_no_damage(tmp_path):
    """With a record that is filled and without, one archive or several, and one of nothing."""
    parts = []
    for number, record in enumerate((512, 10_240)):
        one = make_tar(tmp_path / f"{number}.tar", [f"{number}.jpg"]).read_bytes()[:512]
        one += bytes(1024)
        parts.append(one + bytes(-len(one) % record))
        (tmp_path / "one.tar").write_bytes(parts[-1])
        assert [m.problem for m in walk(tmp_path / "one.tar")] == [None]
    for order in (parts[1:] * 3 + parts[:1], parts[:1] * 2 + parts[1:] * 2):
        (tmp_path / "two.tar").write_bytes(b"".join(order))
        assert [m.problem for m in walk(tmp_path / "two.tar")] == [None] * 7
    tarfile.open(tmp_path / "empty.tar", "w").close()
    assert walk(tmp_path / "empty.tar") == []
    (tmp_path / "five.tar").write_bytes(bytes(5))
    assert walk(tmp_path / "five.tar")[0].problem.startswith("damaged archive")


def test_records_for_tapes_are_not_told_from_holes(tmp_path):
    """But nothing of the archive is lost, and it is said what they may be."""
    content = make_tar(tmp_path / "1.tar", ["a.jpg", "b.jpg"]).read_bytes()
    (tmp_path / "2.tar").write_bytes(content + bytes((1 << 20) - len(content)))
    *members, padding = walk(tmp_path / "2.tar")
    assert [m.name for m in members] == ["a.jpg", "b.jpg"]
    assert "zeros (a hole, or padding for tapes)" in padding.problem


def pax_header(text):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(text)
    return info.tobuf(tarfile.USTAR_FORMAT) + text + bytes(-len(text) % 512)


@pytest.mark.parametrize(
    "text",
    {
        "digits without end": b"9" * 5000 + b" path=a.jpg\n",
        "records of two bytes": b"2 " * (1 << 19),
        "zeros": bytes(600),
        "words": b"no records at all\n" * 40,
        "a length of nothing": b"0 path=a.jpg\n",
    }.values(),
)
def test_hostile_extended_headers(tmp_path, text):
    """Each is damage, in no time, and what follows is read."""
    content = make_tar(tmp_path / "1.tar", ["b.jpg"]).read_bytes()
    (tmp_path / "2.tar").write_bytes(content[:512] + pax_header(text) + content)
    members = walk(tmp_path / "2.tar")
    assert [m.name for m in members if m.name] == ["b.jpg", "b.jpg"]
    assert "extended header of" in members[1].problem


def test_a_long_name_that_is_lost(tmp_path):
    path = make_tar(tmp_path / "s.tar", ["a.jpg", "y" * 300 + ".jpg", "b.jpg"], tarfile.GNU_FORMAT)
    with tarfile.open(path) as tar:
        start = tar.getmembers()[1].offset
    overwrite(path, start + 512, bytes(512))
    assert "extended header of 305 bytes" in walk(path)[1].problem


def test_parts_of_a_damaged_shard_add_up(tmp_path):
    path = tmp_path / "s.tar"
    headers = write_stones(path)
    overwrite(path, headers[4], bytes(4096))
    overwrite(path, headers[8] - 1000, b"z" * 3000)
    whole = walk(path)
    for cut in (m.start for m in whole if m.name):
        assert walk(path, 0, cut) + walk(path, cut) == whole


def test_extended_headers_that_are_cut_or_too_large(tmp_path):
    path = make_tar(tmp_path / "s.tar", ["a.jpg", "y" * 300 + ".jpg", "b.jpg"], tarfile.GNU_FORMAT)
    overwrite(path, 512, b"")
    with tarfile.open(path) as tar:
        start = tar.getmembers()[1].offset
    header = bytearray(path.read_bytes()[start : start + 512])
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    overwrite(path, start, header)
    members = walk(path)
    assert [m.name for m in members if m.name][0::2] == ["a.jpg", "b.jpg"]
    assert "extended header of 8589934591 bytes" in members[1].problem


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
