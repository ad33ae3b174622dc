"""WebDataset's conventions: which members of a shard make up a sample, and which are images.

Members whose names agree up to the first dot of the last path component are one
sample: ``a/0001.jpg`` and ``a/0001.json`` have the key ``a/0001``. The convention is
webdataset's (its documentation, "The WebDataset Format").
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dask_imgread.storage import drop_signature
from dask_imgread.tar import Member

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg png webp bmp tif tiff jp2 ppm pgm pbm gif avif".split()  # noqa: SIM905
)
MAX_SIDECAR_BYTES = 16 << 20
MAX_JSON_DEPTH = 100


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into the sample's key and the lower-case extension.

    >>> split_name("train/0001.left.JPG")
    ('train/0001', 'left.jpg')
    """
    folder_end = name.rfind("/") + 1
    dot = name.find(".", folder_end + 1)  # a leading dot belongs to the key
    if dot < 0:
        return name, ""
    return name[:dot], name[dot + 1 :].lower()


def is_image(extension: str) -> bool:
    """Say whether members with this extension are images."""
    return extension in IMAGE_EXTENSIONS or extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def make_shard_id(shard: str) -> str:
    """Return a shard's short name: its file name and a digest of its whole path or URL.

    The digest keeps apart shards of one name in two folders; nothing else goes into it,
    so that the name is the same in every process and for every grouping of shards.
    """
    plain = drop_signature(shard)
    stem = posixpath.basename(plain.split("?", 1)[0]).split(".", 1)[0]
    return f"{stem}-{hashlib.blake2b(plain.encode(), digest_size=5).hexdigest()}"


@dataclass(slots=True)
class ImageEntry:
    """One image member of a shard, with the sidecars of its sample, not yet read."""

    member: Member
    key: str
    sidecars: tuple[tuple[str, Member], ...] = ()
    repeated: bool = False  # an earlier member of this shard has the same name


@dataclass(slots=True)
class ShardIndex:
    """What a walk over a shard's headers finds."""

    images: list[ImageEntry] = field(default_factory=list)
    broken: list[Member] = field(default_factory=list)  # places where the archive is damaged
    scattered: bool = False  # some sample's members do not stand together


def index_members(members: Iterable[Member]) -> ShardIndex:
    """Group members into samples, wherever in the shard the members of a sample stand."""
    index = ShardIndex()
    sidecars: dict[str, list[tuple[str, Member]]] = {}
    keys: set[str] = set()
    names: set[str] = set()
    last_key: str | None = None
    for member in members:
        if not member.name:
            index.broken.append(member)
            continue
        key, extension = split_name(member.name)
        if key != last_key:
            index.scattered |= key in keys
            keys.add(key)
            last_key = key
        if is_image(extension):
            repeated = member.name in names
            names.add(member.name)
            index.scattered |= repeated
            index.images.append(ImageEntry(member, key, repeated=repeated))
        elif extension:
            sidecars.setdefault(key, []).append((extension, member))
    for entry in index.images:
        if entry.key in sidecars:
            entry.sidecars = tuple(sidecars[entry.key])
    return index


def cut_at_samples(index: ShardIndex, images_per_part: int) -> Iterator[tuple[int, int | None]]:
    """Yield byte ranges of a shard, each with about ``images_per_part`` whole samples' images."""
    start, count, key = 0, 0, None
    for entry in index.images:
        if count >= images_per_part and entry.key != key:
            cut = min([entry.member.start, *(m.start for _, m in entry.sidecars)])
            cut = entry.member.start if index.scattered else cut
            yield start, cut
            start, count = cut, 0
        count += 1
        key = entry.key
    yield start, None


def parse_sidecar(extension: str, content: bytes) -> Any:
    """Parse a sidecar by its extension, as webdataset's default decoder does.

    ``.json`` gives its value, ``.txt`` and the like a str, ``.cls`` and ``.index`` an int;
    anything else stays bytes.

    Raises
    ------
    ValueError
        If the content is not what the extension says.
    """
    kind = extension.rpartition(".")[2]
    if kind == "json":
        return _parse_json(content)
    if kind in ("txt", "text", "caption", "transcript"):
        return content.decode("utf-8")
    if kind in ("cls", "cls2", "index", "inx", "id", "count"):
        return int(content)
    return content


def _parse_json(content: bytes) -> Any:
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("JSON nested too deep to be parsed") from None
    # What parses can still be too deep to be pickled, and so to leave the worker.
    if content.count(b"[") + content.count(b"{") > MAX_JSON_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"JSON nested more than {MAX_JSON_DEPTH} deep")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
