"""WebDataset's conventions: which members of a shard make up a sample, and which are images.

Members whose names agree up to the first dot of the last path component are one
sample: ``a/0001.jpg`` and ``a/0001.json`` have the key ``a/0001``. The convention is
webdataset's (its documentation, "The WebDataset Format").
"""

from __future__ import annotations

import functools
import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dask_imgread.shards.tar import Member
from dask_imgread.storage.redaction import drop_signature, redact_url

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg png webp bmp tif tiff jp2 ppm pgm pbm gif avif".split()  # noqa: SIM905
)
MAX_SIDECAR_BYTES = 16 << 20
MAX_JSON_DEPTH = 100
_MACOS_FOLDER = "__MACOSX"  # in archives made by the Finder: resource forks, no images
_MOST_VIEWS = 8  # images of one sample; more are many samples, whose names have dots
_MOST_DOTS = 16  # that are looked at, from the right
_MOST_LINKS = 40  # one after the other, as Linux follows
_GAP = "\0.gap"  # no member's name: those end at a zero
_REACH = 2 << 20  # bytes between members of one sample, in a shard that is read once


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


@functools.lru_cache(1024)
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
            raise ValueError(f"{redact_url(shard)} does not lie below {base}, its relative_to")
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
    notes: dict[str, str] = field(default_factory=dict)  # for a log, by what they are about


@dataclass(slots=True)
class _Sample:
    """Members of one key that stand together, or belong together all the same."""

    key: str
    images: list[Member] = field(default_factory=list)
    sidecars: dict[str, Member] = field(default_factory=dict)  # by extension
    again: bool = False  # an earlier sample has the same key

    def can_take(self, other: _Sample) -> bool:
        """Say whether another's sidecars are no second ones."""
        few, many = sorted((self.sidecars, other.sidecars), key=len)
        return not any(extension in many for extension in few)


class Seen(NamedTuple):
    """The keys and names of the images that came before, in the same shard."""

    keys: set[str]
    names: set[str]


def index_members(members: Iterable[Member], seen: Seen | None = None) -> ShardIndex:
    """Group members into samples.

    A sample ends where its neighbours end. Sidecars that stand by themselves, as where all images
    come first, belong to the nearest sample of their key and archive that has none of the kind.
    """
    index = ShardIndex()
    seen = seen or Seen(set(), set())
    here = Seen(set(), set())
    for archive in _list_archives(members, index):
        for sample in _join_samples(archive, index):
            sample.again = sample.key in here.keys or sample.key in seen.keys
            index.scattered |= sample.again
            here.keys.add(sample.key)
            sidecars = tuple(sample.sidecars.items())
            warning = None
            if sample.again:
                warning = f"key again: an earlier sample of the shard has the key {sample.key}"
            for member in sample.images:
                repeated = member.name in here.names or member.name in seen.names
                here.names.add(member.name)
                index.scattered |= repeated
                index.images.append(ImageEntry(member, sample.key, sidecars, warning, repeated))
    repeated_names = [entry.member.name for entry in index.images if entry.repeated]
    if repeated_names:
        text = f"{len(repeated_names)} duplicate names, such as {repeated_names[0]}"
        index.notes["duplicates"] = text
    return index


def index_stream(members: Iterable[Member], keep: Callable[[int], object]) -> Iterator[ShardIndex]:
    """Group members into samples while they are walked over, for bytes that come once.

    Samples are yielded when the walk is some megabytes past them: members that stand no farther
    apart are joined as ``index_members`` does. Of others sidecars are remembered until their image
    comes, and those that come after it are recorded as damage.

    Parameters
    ----------
    members
        The walk. What it raises is raised when all that came before was yielded.
    keep
        Is told the offset from which on bytes may still be asked for.
    """
    stream = _SampleStream()
    try:
        for member in members:
            if member.name:
                if stream.add(member):
                    yield stream.settle(member.start - _REACH)
            else:
                yield stream.settle(None)
                yield stream.cross(member)
            keep(stream.find_needed(member))
    except OSError:
        yield stream.settle(None)
        raise
    yield stream.settle(None)
    yield stream.finish()


class _SampleStream:
    """The members of a shard that was walked over in part."""

    def __init__(self) -> None:
        self._held: list[Member] = []  # of which samples may still be made
        self._seen = Seen(set(), set())
        self._by_path: dict[str, Member] = {}  # for links
        self._before: dict[str, dict[str, Member]] = {}  # sidecars whose images did not come yet
        self._behind: list[Member] = []  # sidecars that came too late
        self._settled = 0  # where the walk was then
        self._noted: set[str] = set()

    def add(self, member: Member) -> bool:
        """Take one more; return whether some can be settled."""
        if member.hard:
            member = _follow_hard_link(member, self._by_path)
        self._by_path[posixpath.normpath(member.name)] = member
        if not self._held:
            self._settled = max(self._settled, member.start - _REACH)
        self._held.append(member)
        return member.start - self._settled > 2 * _REACH

    def cross(self, member: Member) -> ShardIndex:
        """Return a place that is damaged, or go on to the next archive of the same file."""
        if member.problem is not None:
            return ShardIndex(broken=[member])
        self._by_path.clear()
        self._before.clear()
        text = f"an archive ends at offset {member.start}, and another follows"
        return self._note(ShardIndex(notes={"archives": text}))

    def settle(self, limit: int | None) -> ShardIndex:
        """Return the samples that end before an offset; None for all."""
        files = [m if m.link is None else self._follow(m, limit) for m in self._held]
        files = [member for member in files if member.link is None]
        index = index_members(files, self._seen)
        if "dotted" in index.notes and limit is not None:
            # What stands behind the last image may belong to one that is still to come, or to all.
            last = index.images[-1].member.start
            index = index_members([m for m in files if m.start <= last], self._seen)
        last_start = {entry.key: entry.member.start for entry in index.images}
        open_key = split_name(self._held[-1].name)[0] if limit is not None else None
        done, waiting = ShardIndex(notes=index.notes), set[int]()
        for entry in index.images:
            if limit is None or (last_start[entry.key] <= limit and entry.key != open_key):
                done.images.append(entry)
            else:
                waiting.update((entry.member.start, *(m.start for _, m in entry.sidecars)))
        used = {m.start for e in done.images for m in (e.member, *(m for _, m in e.sidecars))}
        self._attach(done.images)
        self._seen.keys.update(entry.key for entry in done.images)
        self._seen.names.update(entry.member.name for entry in done.images)
        held, self._held = self._held, []
        for member in held:
            still = member.start in waiting or (limit is not None and member.start > limit)
            if still and member.start not in used:
                self._held.append(member)
            else:
                if not still and member.start not in used:
                    self._set_aside(member)
                if self._held and self._held[-1].name != _GAP:  # what it stood between stays apart
                    self._held.append(member._replace(name=_GAP, link=None, hard=False))
        self._settled = self._settled if limit is None else limit
        return self._note(done)

    def finish(self) -> ShardIndex:
        """Return a record of the sidecars that came too late."""
        if not self._behind:
            return ShardIndex()
        first = self._behind[0]
        problem = (
            f"{len(self._behind)} sidecars stand more than {_REACH >> 20} MiB behind their images, "
            f"which were read without them, such as {first.name}"
        )
        return ShardIndex(broken=[Member("", first.start, first.start, 0, problem)])

    def find_needed(self, last: Member) -> int:
        """Return where the first member that may still be read begins."""
        return self._held[0].start if self._held else last.start

    def _follow(self, member: Member, limit: int | None) -> Member:
        found = _follow_symbolic_link(member, self._by_path)
        # What it leads to may still come.
        return member if found.problem and limit is not None and member.start > limit else found

    def _attach(self, images: list[ImageEntry]) -> None:
        """Give images the sidecars that came long before them."""
        joined: dict[str, tuple[tuple[str, Member], ...]] = {}
        for entry in images if self._before else ():
            if entry.key in self._before:
                sidecars = self._before.pop(entry.key) | dict(entry.sidecars)
                joined[entry.key] = tuple(sidecars.items())
            entry.sidecars = joined.get(entry.key, entry.sidecars)

    def _set_aside(self, member: Member) -> None:
        """Remember a sidecar that no image has."""
        key, extension = split_name(member.name)
        if not extension or is_image(extension) or member.name == _GAP:
            return
        if key in self._seen.keys:
            self._behind.append(member)
        else:
            self._before.setdefault(key, {})[extension] = member

    def _note(self, index: ShardIndex) -> ShardIndex:
        """Leave out the kinds of notes that were made before."""
        index.notes = {kind: text for kind, text in index.notes.items() if kind not in self._noted}
        self._noted.update(index.notes)
        return index


def _list_archives(members: Iterable[Member], index: ShardIndex) -> list[list[Member]]:
    """Return the files of each archive in a shard, links resolved."""
    members = list(members)
    if all(member[0] and member[5] is None for member in members):  # names, and no links
        return [members]
    archives: list[list[Member]] = [[]]
    for member in members:
        if member.name:
            archives[-1].append(member)
        elif member.problem is not None:
            index.broken.append(member)
        else:
            text = f"an archive ends at offset {member.start}, and another follows"
            index.notes.setdefault("archives", text)
            archives.append([])
            index.scattered = True
    for files in archives:
        if any(member.link is not None for member in files):
            index.scattered = True
            files[:] = resolve_links(files)
    return archives


def resolve_links(members: list[Member]) -> list[Member]:
    """Return members in which links have the bytes of what they stand for.

    A hard link stands for the last member of that name before it. A link that leads out of the
    archive, to nothing or in a circle has a ``problem``.
    """
    by_path: dict[str, Member] = {}
    resolved = []
    for member in members:
        if member.hard:
            member = _follow_hard_link(member, by_path)
        by_path[posixpath.normpath(member.name)] = member
        resolved.append(member)
    return [m if m.link is None else _follow_symbolic_link(m, by_path) for m in resolved]


def _follow_hard_link(member: Member, before: dict[str, Member]) -> Member:
    path = posixpath.normpath(member.link or "")
    target = before.get(path)
    if target is None:
        return member._replace(link=None, problem=f"broken link: no member {path} before it")
    return target._replace(name=member.name, start=member.start)


def _follow_symbolic_link(member: Member, by_path: dict[str, Member]) -> Member:
    path, target = "", member
    for _ in range(_MOST_LINKS):
        path = posixpath.normpath(target.link or "")
        found = by_path.get(path) or _find_behind_folder(path, by_path)
        if found is None:
            where = f"no member {path}"
            if path.startswith("/") or path.partition("/")[0] == "..":
                where = f"it leads out of the shard, to {path}"
            return member._replace(link=None, problem=f"broken link: {where}")
        target = found
        if target.link is None:
            return target._replace(name=member.name, start=member.start)
    return member._replace(link=None, problem=f"broken link: it leads in a circle, over {path}")


def _find_behind_folder(path: str, by_path: dict[str, Member]) -> Member | None:
    """Return a link to go on with where one of a path's folders is a link, else None."""
    folder = posixpath.dirname(path)
    while folder.strip("/"):
        member = by_path.get(folder)
        if member is not None and member.link is not None:
            return member._replace(link=posixpath.join(member.link, path[len(folder) + 1 :]))
        folder = posixpath.dirname(folder)
    return None


def _join_samples(members: list[Member], index: ShardIndex) -> list[_Sample]:
    """Group an archive's members by key and neighbourhood; then find sidecars that stand apart."""
    neighbours = list(_list_neighbours(members, {}))
    stems = _find_dotted_keys(neighbours, index)
    if stems:
        neighbours = list(_list_neighbours(members, stems))
    elif len({sample.key for sample in neighbours}) == len(neighbours):  # as in most shards
        return [sample for sample in neighbours if sample.images]
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}  # of each key, the sample that has images
    waiting: dict[str, _Sample] = {}  # of each key, the sidecars before its images
    for sample in neighbours:
        before, apart = latest.get(sample.key), waiting.get(sample.key)
        index.scattered |= before is not None or apart is not None
        if sample.images:
            if apart is not None and sample.can_take(apart):
                sample.sidecars = waiting.pop(sample.key).sidecars | sample.sidecars
            samples.append(sample)
            latest[sample.key] = sample
        elif before is not None and before.can_take(sample):
            before.sidecars |= sample.sidecars
        elif apart is not None and apart.can_take(sample):
            apart.sidecars |= sample.sidecars
        else:
            waiting[sample.key] = sample
    again = [key for key in waiting if key in latest]
    if again:
        index.notes["sidecars"] = (
            f"{len(again)} keys have second sidecars without images, such as {again[0]}: left out"
        )
    # What belongs to none of a dotted key's images belongs to all, unless there is much of it.
    shared = {key: waiting[key].sidecars for key in stems if key in waiting}
    for sample in samples if shared else ():
        more = shared.get(split_name(f"{sample.key}.")[0], {})
        if len(more) <= _MOST_VIEWS:
            sample.sidecars = more | sample.sidecars
    return samples


def _find_dotted_keys(samples: Sequence[_Sample], index: ShardIndex) -> dict[str, set[str]]:
    """Return the keys of too many images to be views of one sample, each with their stems.

    Their names have dots. A stem ends at the last one.
    """
    counts: Counter[str] = Counter()
    for sample in samples:
        counts[sample.key] += len(sample.images)
    stems: dict[str, set[str]] = {key: set() for key, n in counts.items() if n > _MOST_VIEWS}
    for sample in samples if stems else ():
        if sample.key in stems:
            stems[sample.key].update(m.name.rpartition(".")[0] for m in sample.images)
    dotted = {key: names for key, names in stems.items() if len(names) > _MOST_VIEWS}
    if dotted:
        index.scattered = True
        key, names = next(iter(dotted.items()))
        index.notes["dotted"] = (
            f"{len(names)} images have the key {key}, as keys end at the first dot: each is taken "
            f"for a sample whose key ends at the last one ({len(dotted)} such keys)"
        )
    return dotted


def _split_dotted(member: Member, key: str, stems: set[str]) -> tuple[str, str]:
    """Split the name of one of many images, or of a sidecar behind its stem."""
    stem = member.name
    for _ in range(_MOST_DOTS):
        stem = stem.rpartition(".")[0]
        if stem in stems:
            return stem, member.name[len(stem) + 1 :].lower()
    return key, member.name[len(key) + 1 :].lower()


def _list_neighbours(members: Iterable[Member], stems: dict[str, set[str]]) -> Iterator[_Sample]:
    """Yield members of one key that stand together, none of them twice."""
    sample, extensions = _Sample(""), set[str]()
    for member in members:
        key, extension = split_name(member.name)
        if not extension or (_MACOS_FOLDER in key and _MACOS_FOLDER in f"/{key}".split("/")):
            continue
        if key in stems:
            key, extension = _split_dotted(member, key, stems[key])
        if key != sample.key or extension in extensions:
            if extensions:
                yield sample
            sample, extensions = _Sample(key), set()
        extensions.add(extension)
        if is_image(extension):
            sample.images.append(member)
        else:
            sample.sidecars[extension] = member
    if extensions:
        yield sample


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
