import json

import pytest

from dask_imgread.shards.samples import (
    IMAGE_EXTENSIONS,
    cut_at_samples,
    index_members,
    is_image,
    make_shard_id,
    parse_sidecar,
    split_name,
)
from dask_imgread.shards.tar import Member


def members(*names):
    return [Member(name, 1024 * n, 1024 * n + 512, 512) for n, name in enumerate(names)]


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a.jpg", "a", "jpg"),
        ("x.y/a.left.JPG", "x.y/a", "left.jpg"),
        ("folder/README", "folder/README", ""),
        (".hidden.png", ".hidden", "png"),
        ("a.", "a", ""),
    ],
)
def test_split_name(name, key, extension):
    assert split_name(name) == (key, extension)


@pytest.mark.parametrize("extension", sorted(IMAGE_EXTENSIONS))
def test_images_in_any_letter_case(extension):
    for name in (f"a.{extension}", f"a.{extension.upper()}", f"a.left.{extension.title()}"):
        assert is_image(split_name(name)[1])


def test_sidecars_reach_every_image_of_their_sample():
    index = index_members(members("a.json", "a.left.jpg", "a.right.jpg", "b.txt", "b.png", "c.txt"))
    assert [(e.member.name, [ext for ext, _ in e.sidecars]) for e in index.images] == [
        ("a.left.jpg", ["json"]),
        ("a.right.jpg", ["json"]),
        ("b.png", ["txt"]),
    ]
    assert not index.scattered


def test_samples_whose_members_stand_apart():
    index = index_members(members("a.jpg", "b.jpg", "a.json"))
    assert index.scattered
    assert [ext for ext, _ in index.images[0].sidecars] == ["json"]


def test_cuts_fall_between_samples():
    index = index_members(members("a.json", "a.jpg", "b.json", "b.1.jpg", "b.2.jpg", "c.jpg"))
    assert list(cut_at_samples(index, 1)) == [(0, 2048), (2048, 5120), (5120, None)]


def test_shard_ids_keep_folders_apart_and_credentials_out():
    ids = {make_shard_id(p) for p in ("/a/0.tar", "/b/0.tar", "s3://a/0.tar")}
    assert len(ids) == 3
    assert make_shard_id("https://me:secret@host/0.tar") == make_shard_id("https://host/0.tar")


def test_parse_sidecar():
    assert parse_sidecar("json", b'{"a": [1]}') == {"a": [1]}
    assert parse_sidecar("txt", "é".encode()) == "é"
    assert parse_sidecar("cls", b" 7\n") == 7
    assert parse_sidecar("npy", b"\x93") == b"\x93"
    deep = json.dumps([[]])
    for _ in range(200):
        deep = f"[{deep}]"
    for extension, content in [
        ("json", b"{"),
        ("json", b"[" * 100_000),
        ("json", deep.encode()),
        ("txt", b"\xff"),
        ("cls", b"x"),
    ]:
        with pytest.raises(ValueError, match=r"\w"):
            parse_sidecar(extension, content)
