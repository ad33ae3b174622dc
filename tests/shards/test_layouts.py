"""Shards as people make them: links, joined archives, keys that come again, AppleDouble files."""

import io
import json
import os
import tarfile

import numpy as np
import pytest

from dask_imgread import FileGroupTask, ImageReaderStage, partition_shards, read_metadata
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.images import read_with_pillow

PNGS = [encode_picture(draw_picture(n, (24, 16)), "png") for n in range(4)]


def read(paths, **options):
    """Return the images of some shards and the failed ones; cut into parts they are the same."""
    reader = ImageReaderStage(**({"device": "cpu"} | options))

    def read_tasks(tasks):
        batches = [batch for task in tasks for batch in reader.process(task)]
        good = [image for batch in batches for image in batch.data]
        return good, [image for batch in batches for image in batch.failed]

    whole = read_tasks(partition_shards(paths))
    for images, expected in zip(
        read_tasks(partition_shards(paths, images_per_partition=1)), whole, strict=True
    ):
        assert [describe(image) for image in images] == [describe(image) for image in expected]
    return whole


def describe(image):
    return image.image_id, image.key, image.metadata, image.warning, image.error, image.offset


def sidecars(images):
    return [(image.key, image.metadata) for image in images]


def add(tar, name, content=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(content)
    tar.addfile(info, io.BytesIO(content))


HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_are_read_as_what_they_stand_for(tmp_path, format):
    deep = f"./{'d' * 90}/{'e' * 90}" if format != tarfile.USTAR_FORMAT else "./d/e"
    with tarfile.open(tmp_path / "s.tar", "w", format=format) as tar:
        add(tar, "before.png", kind=SYMBOLIC, target="x/a.png")
        add(tar, "x/a.png", PNGS[0])
        add(tar, "x/a.txt", b"a caption")
        add(tar, "x/hard.png", kind=HARD, target="x/a.png")
        add(tar, "x/hard.txt", kind=HARD, target="x/a.txt")
        add(tar, "x/soft.png", kind=SYMBOLIC, target="a.png")
        add(tar, "x/y/up.png", kind=SYMBOLIC, target="../hard.png")
        add(tar, f"{deep}/b.png", PNGS[1])
        add(tar, "chain.png", kind=SYMBOLIC, target=f"{deep}/c.png")
        add(tar, f"{deep}/c.png", kind=HARD, target=f"{deep}/b.png")
    good, failed = read(tmp_path / "s.tar")
    assert failed == []
    contents = [PNGS[0]] * 5 + [PNGS[1]] * 3
    for image, content in zip(good, contents, strict=True):
        np.testing.assert_array_equal(image.image_data, read_with_pillow(content))
        assert image.size == len(content)
    texts = {i.key.rpartition("/")[2]: i.metadata for i in good if i.metadata}
    assert texts == {"a": {"txt": "a caption"}, "hard": {"txt": "a caption"}}


def test_links_that_lead_nowhere_are_recorded(tmp_path):
    targets = {
        "out": "../../etc/passwd",
        "root": "/srv/a.png",
        "gone": "none.png",
        "self": "self.png",
        "ring1": "ring2.png",
        "ring2": "ring1.png",
        "dir": "folder",
    }
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "folder", kind=tarfile.DIRTYPE)
        for name, target in targets.items():
            add(tar, f"{name}.png", kind=SYMBOLIC, target=target)
        add(tar, "good.png", PNGS[0])
        add(tar, "good.txt", kind=HARD, target="gone.txt")
    good, failed = read(tmp_path / "s.tar")
    assert [image.key for image in good] == ["good"]
    assert good[0].warning == "sidecar good.txt: broken link: no member gone.txt before it"
    assert {image.cause for image in failed} == {"broken link"}
    errors = {image.key: image.error.removeprefix("broken link: ") for image in failed}
    assert errors == {
        "out": "it leads out of the shard, to ../../etc/passwd",
        "root": "it leads out of the shard, to /srv/a.png",
        "gone": "no member none.png",
        "self": "it leads in a circle, over self.png",
        "ring1": "it leads in a circle, over ring1.png",
        "ring2": "it leads in a circle, over ring2.png",
        "dir": "no member folder",
    }


def test_hard_links_stand_for_what_was_before_them(tmp_path):
    """A member that was replaced later, and one that is packed twice."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "a.png", PNGS[0])
        add(tar, "b.png", kind=HARD, target="a.png")
        add(tar, "a.png", kind=HARD, target="a.png")
        add(tar, "c.png", kind=SYMBOLIC, target="a.png")
        add(tar, "a.png", PNGS[1])
    good, failed = read(tmp_path / "s.tar")
    assert failed == []
    contents = [PNGS[0], PNGS[0], PNGS[0], PNGS[1], PNGS[1]]
    for image, content in zip(good, contents, strict=True):
        np.testing.assert_array_equal(image.image_data, read_with_pillow(content))


def test_links_with_whole_paths_and_over_folders(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "/srv/set/a.png", PNGS[0])
        add(tar, "/srv/set/b.png", kind=SYMBOLIC, target="/srv/set/a.png")
        add(tar, "/srv/latest", kind=SYMBOLIC, target="set")
        add(tar, "/srv/c.png", kind=SYMBOLIC, target="latest/a.png")
    good, failed = read(tmp_path / "s.tar")
    assert (len(good), failed) == (3, [])


def test_long_chains_of_links_take_no_time(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for n in range(5000):
            add(tar, f"{n}.png", kind=SYMBOLIC, target=f"{n + 1}.png")
        add(tar, "5000.png", PNGS[0])
    shard = FileGroupTask(data=[str(tmp_path / "s.tar")])
    batches = ImageReaderStage(device="cpu", decode=False).process(shard)
    assert sum(batch.num_items for batch in batches) == 41
    assert sum(len(batch.failed) for batch in batches) == 4960


def test_a_link_to_what_is_cut_off(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "a.png", kind=SYMBOLIC, target="b.png")
        add(tar, "b.png", PNGS[0])
    os.truncate(tmp_path / "s.tar", 1024 + len(PNGS[0]) // 2)
    good, failed = read(tmp_path / "s.tar")
    assert good == []
    assert [image.cause for image in failed] == ["truncated archive"] * 2


def join(folder, *parts, proper=False):
    """Write shards one behind the other: as ``cat`` does, or as one archive."""
    if proper:
        return write_shard(folder / "joined.tar", [member for part in parts for member in part])
    contents = []
    for number, part in enumerate(parts):
        path = write_shard(folder / f"part{number}", part)
        with open(path, "rb") as file:
            contents.append(file.read())
    (folder / "joined.tar").write_bytes(b"".join(contents))
    return str(folder / "joined.tar")


@pytest.mark.parametrize("proper", [False, True])
def test_keys_that_come_again(tmp_path, proper):
    """Each image has the sidecars of its own sample."""
    one = [("0.png", PNGS[0]), ("0.txt", b"first"), ("1.png", PNGS[1])]
    two = [("0.png", PNGS[2]), ("0.txt", b"second"), ("1.txt", b"late"), ("1.png", PNGS[3])]
    good, failed = read(join(tmp_path, one, two, proper=proper))
    assert failed == []
    assert sidecars(good) == [
        ("0", {"txt": "first"}),
        ("1", {}),
        ("0", {"txt": "second"}),
        ("1", {"txt": "late"}),
    ]
    assert [image.warning is None for image in good] == [True, True, False, False]
    assert len({image.image_id for image in good}) == 4


def test_a_key_that_comes_again_in_other_formats(tmp_path):
    members = [
        ("a.jpg", encode_picture(draw_picture(5))),
        ("a.json", b"1"),
        ("b.png", PNGS[1]),
        ("a.png", PNGS[2]),
        ("a.json", b"2"),
        ("a.webp", PNGS[3]),
        ("a.json", b"3"),
    ]
    good, _ = read(write_shard(tmp_path / "s.tar", members))
    assert sidecars(good) == [
        ("a", {"json": 1}),
        ("b", {}),
        ("a", {"json": 2}),
        ("a", {"json": 2}),
    ]
    assert [image.warning for image in good[:2]] == [None, None]
    assert good[2].warning == "key again: an earlier sample of the shard has the key a"


def test_a_sample_that_follows_its_namesake(tmp_path):
    """Put together without a mark between them, and nothing else in between."""
    members = [("a.png", PNGS[0]), ("a.json", b"1"), ("a.png", PNGS[1]), ("a.json", b"2")]
    good, _ = read(write_shard(tmp_path / "s.tar", members))
    assert sidecars(good) == [("a", {"json": 1}), ("a", {"json": 2})]
    assert good[0].warning is None
    assert good[1].warning.startswith("duplicate name")


@pytest.mark.parametrize("order", ["images first", "sidecars first", "mixed"])
def test_sidecars_that_stand_apart(tmp_path, order):
    """As in an archive of a folder, in the order in which the system lists it."""
    images = [(f"{n}.png", PNGS[n]) for n in range(4)]
    texts = [(f"{n}.txt", b"%d" % n) for n in range(4)]
    members = {
        "images first": images + texts,
        "sidecars first": texts + images,
        "mixed": [*texts[:2], *images[2:], *images[:2], *reversed(texts[2:])],
    }[order]
    good, _ = read(write_shard(tmp_path / "s.tar", members))
    assert sorted(sidecars(good), key=str) == [(str(n), {"txt": str(n)}) for n in range(4)]
    assert [image.warning for image in good] == [None] * 4


def test_second_sidecars_without_images_are_told(tmp_path, caplog):
    members = [("a.png", PNGS[0]), ("a.txt", b"1"), ("b.png", PNGS[1]), ("a.txt", b"2")]
    good, _ = read(write_shard(tmp_path / "s.tar", members))
    assert sidecars(good) == [("a", {"txt": "1"}), ("b", {})]
    assert "1 keys have second sidecars without images, such as a: left out" in caplog.text


def test_apple_double_files_are_no_images(tmp_path):
    double = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100)
    members = [
        ("./._a.png", double),
        ("./a.png", PNGS[0]),
        ("._a.txt", double),
        ("a.txt", b"text"),
        ("x/.DS_Store", b"\0\0\0\1Bud1"),
        ("__MACOSX/x/._b.jpg", double),
        ("__MACOSX/c.png", PNGS[2]),
        ("x/b.png", PNGS[1]),
        ("x/._real.png", PNGS[3]),
    ]
    good, failed = read(write_shard(tmp_path / "s.tar", members))
    assert failed == []
    names = [image.image_path.partition("s.tar/")[2] for image in good]
    assert names == ["./a.png", "x/b.png", "x/._real.png"]
    frame = read_metadata(str(tmp_path / "s.tar")).compute(scheduler="sync")
    assert len(frame) == 3


def write_dotted(folder, stem, count, *extensions):
    members = []
    for n in range(count):
        members.append((f"{stem}{n:05d}.png", PNGS[n % 4]))
        members += [(f"{stem}{n:05d}.{extension}", b'"%d"' % n) for extension in extensions]
    return write_shard(folder / "dotted.tar", members)


@pytest.mark.parametrize("stem", ["2024.05.17_", "v1.2.", "x/y.z-"])
@pytest.mark.parametrize("count", [9, 40])
def test_names_with_dots(tmp_path, caplog, stem, count):
    shard = write_dotted(tmp_path, stem, count, "json", "left.json")
    good, failed = read(shard)
    assert failed == []
    assert sidecars(good) == [
        (f"{stem}{n:05d}", {"json": str(n), "left.json": str(n)}) for n in range(count)
    ]
    caplog.clear()
    ImageReaderStage(device="cpu").process(FileGroupTask(data=[shard]))
    assert sum("keys end at the first dot" in record for record in caplog.messages) == 1


@pytest.mark.parametrize("order", ["shuffled pairs", "shuffled", "images first"])
def test_names_with_dots_in_any_order(tmp_path, order, caplog):
    """As cat.17.png and dog.4.png: each has its own sidecar, and no warning."""
    stems = [f"{kind}.{n}" for kind in ("cat", "dog") for n in range(60)]
    rng = np.random.default_rng(3)
    rng.shuffle(stems)
    pairs = [((f"{s}.png", PNGS[0]), (f"{s}.txt", s.encode())) for s in stems]
    members = [member for pair in pairs for member in pair]
    if order == "shuffled":
        members = [members[n] for n in rng.permutation(len(members))]
    elif order == "images first":
        members = [image for image, _ in pairs] + [text for _, text in pairs]
    good, failed = read(write_shard(tmp_path / "s.tar", members))
    assert (len(good), failed) == (120, [])
    assert all(image.metadata == {"txt": image.key} for image in good)
    assert all(image.warning is None for image in good)


def test_keys_that_alternate_take_no_time():
    from dask_imgread.shards.samples import index_members
    from dask_imgread.shards.tar import Member

    names = [f"{'ab'[n % 2]}.{n}.txt" for n in range(40_000)]
    names[:0] = ["a.png", "b.png"]
    index = index_members(Member(name, n, n, 1) for n, name in enumerate(names))
    assert [len(entry.sidecars) for entry in index.images] == [20_000] * 2


def test_a_few_images_are_views_of_one_sample(tmp_path):
    views = [(f"a.{n}.png", PNGS[n % 4]) for n in range(8)]
    good, _ = read(write_shard(tmp_path / "s.tar", [*views, ("a.json", b"7")]))
    assert sidecars(good) == [("a", {"json": 7})] * 8


def test_many_images_share_what_belongs_to_none_of_them(tmp_path):
    views = [(f"a.{n}.png", PNGS[n % 4]) for n in range(12)]
    good, _ = read(write_shard(tmp_path / "s.tar", [*views, ("a.json", b"7"), ("a.3.txt", b"3")]))
    assert [image.metadata for image in good] == [
        {"json": 7} | ({"txt": "3"} if n == 3 else {}) for n in range(12)
    ]


@pytest.mark.parametrize("count", [2000, 4000])
def test_the_work_is_linear_whatever_the_names(tmp_path, count):
    """Reads of the shard are counted: no image has the sidecars of others."""
    from dask_imgread.shards.samples import index_members
    from dask_imgread.shards.tar import Member

    names = [f"{'a.' * 40}{n}.{e}" for n in range(count) for e in ("png", "json", "b.c.txt")]
    index = index_members(Member(name, n, n, 1) for n, name in enumerate(names))
    assert sum(len(entry.sidecars) for entry in index.images) == 2 * count


def test_a_samples_sidecars_are_read_once_and_shared(tmp_path, monkeypatch):
    from dask_imgread.reading import members as reading

    parsed = []
    parse = reading.parse_sidecar
    monkeypatch.setattr(
        reading, "parse_sidecar", lambda *given: parsed.append(given) or parse(*given)
    )
    large = json.dumps({"text": "x" * 500_000}).encode()
    members = [*((f"a.{n}.png", PNGS[n % 4]) for n in range(8)), ("a.json", large)]
    shard = write_shard(tmp_path / "s.tar", members)
    batches = ImageReaderStage(device="cpu").process(FileGroupTask(data=[shard]))
    images = [image for batch in batches for image in batch.data]
    assert len(parsed) == 1
    assert len({id(image.metadata["json"]) for image in images}) == 1
    images[0].metadata["mine"] = 1
    assert "mine" not in images[1].metadata


@pytest.mark.parametrize("decode", [False, True])
def test_sidecars_count_for_the_size_of_a_batch(tmp_path, decode):
    large = json.dumps(list(range(100_000))).encode()
    members = [(f"{n}.{e}", c) for n in range(8) for e, c in (("png", PNGS[0]), ("json", large))]
    shard = write_shard(tmp_path / "s.tar", members)
    reader = ImageReaderStage(
        device="cpu", decode=decode, max_batch_bytes=2 * 8 * len(large) + 9999
    )
    assert [b.num_items for b in reader.stream(FileGroupTask(data=[shard]))] == [2] * 4
