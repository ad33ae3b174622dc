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

from dask_imgread.storage import drop_signature, name_url
from dask_imgread.tar import Member

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg png webp bmp tif tiff jp2 ppm pgm pbm gif avif".split()  # noqa: SIM905
)
MAX_SIDECAR_BYTES = 16 << 20
MAX_JSON_DEPTH = 100
_MACOS_FOLDER = "/__MACOSX/"  # in archives made by the Finder: resource forks, no images
_MOST_VIEWS = 8  # images of one sample; more are many samples, whose names have dots
_MOST_DOTS = 16  # that are looked at, from the right


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


def make_shard_id(shard: str, relative_to: str | None = None) -> str:
    """Return a shard's short name: its file name and a digest of its whole path or URL.

    The digest keeps apart shards of one name in two folders; nothing else goes into it,
    so that the name is the same in every process and for every grouping of shards. With
    ``relative_to``, a folder or a URL, it is of the path below that.

    Raises
    ------
    ValueError
        If the shard does not lie below ``relative_to``.

    Examples
    --------
    >>> make_shard_id("/data/train/0.tar", "/data") == make_shard_id("s3://b/train/0.tar", "s3://b")
    True
    """
    plain = drop_signature(shard)
    if relative_to is not None:
        base = drop_signature(relative_to).rstrip("/") + "/"
        # Some stores' URLs are written with three slashes as well as with two.
        below = plain.replace(":///", "://").removeprefix(base.replace(":///", "://"))
        if len(below) == len(plain.replace(":///", "://")):
            raise ValueError(f"{name_url(shard)} does not lie below {base}, its relative_to")
        plain = below
    stem = posixpath.basename(plain.split("?", 1)[0]).split(".", 1)[0]
    return f"{stem}-{hashlib.blake2b(plain.encode(), digest_size=5).hexdigest()}"


@dataclass(slots=True)
class ImageEntry:
    """One image member of a shard, with the sidecars of its sample, not yet read.

    The images of a sample have one tuple of sidecars. ``warning`` says what is odd about where it
    stands; ``repeated`` that an earlier member of the shard has the same name.
    """

    member: Member
    key: str
    sidecars: tuple[tuple[str, Member], ...] = ()
    warning: str | None = None
    repeated: bool = False


@dataclass(slots=True)
class ShardIndex:
    """What a walk over a shard's headers finds.

    ``scattered`` says that a part of the shard can't be told by itself: some sample's members do
    not stand together, or it takes others to know what belongs to what.
    """

    images: list[ImageEntry] = field(default_factory=list)
    broken: list[Member] = field(default_factory=list)  # places where the archive is damaged
    scattered: bool = False
    notes: list[str] = field(default_factory=list)  # for a log: of the whole shard


@dataclass(slots=True)
class _Sample:
    """Members of one key that stand together, or belong together all the same."""

    key: str
    images: list[Member] = field(default_factory=list)
    sidecars: list[tuple[str, Member]] = field(default_factory=list)
    again: bool = False  # an earlier sample has the same key

    def can_take(self, other: _Sample) -> bool:
        """Say whether another's sidecars are no second ones."""
        own = {extension for extension, _ in self.sidecars}
        return own.isdisjoint(extension for extension, _ in other.sidecars)


def index_members(members: Iterable[Member]) -> ShardIndex:
    """Group members into samples.

    A sample ends where its neighbours end. Sidecars that stand by themselves, as where all images
    come first, belong to the nearest sample of their key and archive that has none of the kind.
    """
    index = ShardIndex()
    archives = _list_archives(members, index)
    keys: set[str] = set()
    names: set[str] = set()
    for archive in archives:
        for sample in _join_samples(archive, index):
            sample.again = sample.key in keys
            index.scattered |= sample.again
            keys.add(sample.key)
            for entry in _list_entries(sample, index):
                entry.repeated = entry.member.name in names
                names.add(entry.member.name)
                index.scattered |= entry.repeated
                index.images.append(entry)
    repeated = [entry.member.name for entry in index.images if entry.repeated]
    if repeated:
        index.notes.append(f"{len(repeated)} duplicate names, such as {repeated[0]}")
    return index


def _list_archives(members: Iterable[Member], index: ShardIndex) -> list[list[Member]]:
    """Return the files of each archive in a shard, links resolved."""
    archives: list[list[Member]] = [[]]
    for member in members:
        if member.name:
            archives[-1].append(member)
        elif member.problem is not None:
            index.broken.append(member)
        else:
            archives.append([])
    for files in archives:
        if any(member.link is not None for member in files):
            index.scattered = True
            files[:] = resolve_links(files)
    return archives


def resolve_links(members: list[Member]) -> list[Member]:
    """Return members in which links have the bytes of what they stand for.

    One that leads out of the archive, to nothing or in a circle has a ``problem``.
    """
    by_path = {posixpath.normpath(member.name): member for member in members}

    def resolve(member: Member) -> Member:
        target, seen = member, {posixpath.normpath(member.name)}
        while target.link is not None:
            path = posixpath.normpath(target.link)
            if path.startswith("/") or path.partition("/")[0] == "..":
                return member._replace(problem=f"broken link: it leads out of the shard, to {path}")
            if path in seen:
                return member._replace(problem=f"broken link: it leads in a circle, over {path}")
            seen.add(path)
            if path not in by_path:
                return member._replace(problem=f"broken link: no member {path}")
            target = by_path[path]
        return member._replace(offset=target.offset, size=target.size, problem=target.problem)

    return [member if member.link is None else resolve(member) for member in members]


def _join_samples(members: list[Member], index: ShardIndex) -> list[_Sample]:
    """Group an archive's members by key and neighbourhood; then find sidecars that stand apart."""
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}  # of each key, the sample that has images
    waiting: dict[str, _Sample] = {}  # of each key, the sidecars before its images
    for sample in _list_neighbours(members):
        before, apart = latest.get(sample.key), waiting.get(sample.key)
        index.scattered |= before is not None or apart is not None
        if sample.images:
            if apart is not None and sample.can_take(apart):
                sample.sidecars[:0] = waiting.pop(sample.key).sidecars
            samples.append(sample)
            latest[sample.key] = sample
        elif before is not None and before.can_take(sample):
            before.sidecars += sample.sidecars
        elif apart is not None and apart.can_take(sample):
            apart.sidecars += sample.sidecars
        else:
            waiting[sample.key] = sample
    again = [key for key in waiting if key in latest]
    if again:
        index.notes.append(
            f"{len(again)} keys have second sidecars without images, such as {again[0]}: left out"
        )
    return samples


def _list_neighbours(members: Iterable[Member]) -> Iterator[_Sample]:
    """Yield members of one key that stand together, none of them twice."""
    sample, extensions = _Sample(""), set[str]()
    for member in members:
        key, extension = split_name(member.name)
        if not extension or _MACOS_FOLDER in f"/{key}":
            continue
        if key != sample.key or extension in extensions:
            if extensions:
                yield sample
            sample, extensions = _Sample(key), set()
        extensions.add(extension)
        if is_image(extension):
            sample.images.append(member)
        else:
            sample.sidecars.append((extension, member))
    if extensions:
        yield sample


def _list_entries(sample: _Sample, index: ShardIndex) -> Iterator[ImageEntry]:
    """Yield the images of a sample; of many each by itself, since then their names have dots."""
    warning = None
    if sample.again:
        warning = f"key again: an earlier sample of the shard has the key {sample.key}"
    if len(sample.images) <= _MOST_VIEWS:
        sidecars = tuple(sample.sidecars)
        for member in sample.images:
            yield ImageEntry(member, sample.key, sidecars, warning)
        return
    index.scattered = True
    index.notes.append(
        f"{len(sample.images)} images have the key {sample.key}, as keys end at the first dot: "
        "each is taken for a sample whose key ends at the last one"
    )
    sidecars_of = _pair_by_stem(sample)
    for member in sample.images:
        stem = member.name.rpartition(".")[0]
        yield ImageEntry(member, stem, sidecars_of[stem], warning)


def _pair_by_stem(sample: _Sample) -> dict[str, tuple[tuple[str, Member], ...]]:
    """Return the sidecars of each image: those whose names go on behind its own, and a few others.

    What belongs to none belongs to all, unless there is much of it.
    """
    own: dict[str, list[tuple[str, Member]]] = {}
    for member in sample.images:
        own[member.name.rpartition(".")[0]] = []
    others = []
    for extension, member in sample.sidecars:
        stem = member.name
        for _ in range(_MOST_DOTS):
            stem = stem.rpartition(".")[0]
            if stem in own:
                own[stem].append((member.name[len(stem) + 1 :].lower(), member))
                break
        else:
            others.append((extension, member))
    shared = others if len(others) <= _MOST_VIEWS else []
    return {stem: (*shared, *found) for stem, found in own.items()}


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
