"""WebDataset's conventions: which members of a shard form a sample, and which are images.

Members whose names are equal up to the first dot after the last slash form a sample:
``a/0001.jpg`` and ``a/0001.json`` have the key ``a/0001`` (webdataset's documentation, "The
WebDataset Format").
"""

from __future__ import annotations

import functools
import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal, NamedTuple

from dask_imgread.shards.tar import BLOCK, Member
from dask_imgread.storage.redaction import drop_signature, redact_url

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg png webp bmp tif tiff jp2 ppm pgm pbm gif avif".split()  # noqa: SIM905
)
MAX_SIDECAR_BYTES = 16 << 20
MAX_JSON_DEPTH = 100
_MACOS_FOLDER = "__MACOSX"  # in archives made by the Finder: resource forks, not images
_MAX_VIEWS = 8  # images of one sample; if a key has more, they are samples with dots in their keys
_MAX_DOTS = 16  # in a name, counted from the right, at which it may be split
_MAX_LINKS = 40  # followed from one member, the limit of Linux
_START = itemgetter(1)
_GAP = "\0.gap"  # never a member's name: these end at the first NUL
_WINDOW = 2 << 20  # maximum bytes between a sample's members, if a shard is read once


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into the sample's key and the lower-case extension.

    >>> split_name("train/0001.left.JPG")
    ('train/0001', 'left.jpg')
    """
    folder_end = name.rfind("/") + 1
    dot = name.find(".", folder_end + 1)  # a leading dot is part of the key
    if dot < 0:
        return name, ""
    return name[:dot], name[dot + 1 :].lower()


@functools.lru_cache(1024)
def is_image(extension: str) -> bool:
    """Return whether members with this extension are images."""
    return extension in IMAGE_EXTENSIONS or extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def make_shard_id(shard: str, relative_to: str | None = None) -> str:
    """Return a shard's short name: its file name and a digest of its whole path or URL.

    The digest distinguishes shards with the same file name in different folders. It depends on
    nothing but the path, so that the id is the same in every process and for every grouping of
    shards. With ``relative_to``, a folder or URL, the digest is that of the relative path.

    Raises
    ------
    ValueError
        If the shard is not in ``relative_to``.

    Examples
    --------
    >>> make_shard_id("/data/train/0.tar", "/data") == make_shard_id("s3://b/train/0.tar", "s3://b")
    True
    """
    plain = drop_signature(shard)
    if relative_to is not None:
        base = drop_signature(relative_to).rstrip("/") + "/"
        # Some stores' URLs have two or three slashes.
        below = plain.replace(":///", "://").removeprefix(base.replace(":///", "://"))
        if len(below) == len(plain.replace(":///", "://")):
            raise ValueError(f"{redact_url(shard)} does not lie below {base}, its relative_to")
        plain = below
    stem = posixpath.basename(plain.split("?", 1)[0]).split(".", 1)[0]
    return f"{stem}-{hashlib.blake2b(plain.encode(), digest_size=5).hexdigest()}"


@dataclass(slots=True)
class ImageEntry:
    """One image member of a shard, and the sidecars of its sample, none of them read yet.

    The sample's key is the beginning of the member's name: kept as a length, as strings of their
    own take megabytes for all entries of a long shard. The images of a sample share one tuple of
    sidecars. ``warning`` is set if an earlier sample has the same key, ``repeated`` if an earlier
    member of the shard has the same name. ``extent`` is where the whole sample lies, headers
    included: its first offset and the next sample's; None if anything else lies between its
    members.
    """

    member: Member
    key_length: int
    sidecars: tuple[tuple[str, Member], ...] = ()
    warning: str | None = None
    repeated: bool = False
    extent: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """The sample's key."""
        return self.member.name[: self.key_length]


@dataclass(slots=True)
class ShardIndex:
    """The images and the damage that a shard's headers show.

    ``scattered`` is set if a part of the shard can't be indexed by itself: the members of some
    sample are not adjacent, or other members decide to which sample some belong.
    """

    images: list[ImageEntry] = field(default_factory=list)
    broken: list[Member] = field(default_factory=list)  # places where the archive is damaged
    scattered: bool = False
    notes: dict[str, str] = field(default_factory=dict)  # messages to log, by topic

    def cut(self, start: int, stop: int | None) -> ShardIndex:
        """Return the index of what begins in a part of the shard; the first part has the notes."""
        last = float("inf") if stop is None else stop
        return ShardIndex(
            [entry for entry in self.images if start <= entry.member.start < last],
            [member for member in self.broken if start <= member.start < last],
            self.scattered,
            self.notes if start == 0 else {},
        )

    def to_json(self) -> str:
        """Return the index as JSON."""
        images = [
            (e.member, e.key, e.sidecars, e.warning, e.repeated, e.extent) for e in self.images
        ]
        return json.dumps([images, self.broken, self.scattered, self.notes])

    @classmethod
    def from_json(cls, text: str) -> ShardIndex:
        """Return the index that ``to_json`` has written."""
        images, broken, scattered, notes = json.loads(text)
        entries = [
            ImageEntry(
                Member(*member),
                len(key),
                tuple((e, Member(*m)) for e, m in sidecars),
                warning,
                repeated,
                extent and tuple(extent),
            )
            for member, key, sidecars, warning, repeated, extent in images
        ]
        return cls(entries, [Member(*member) for member in broken], scattered, notes)


@dataclass(slots=True)
class _Sample:
    """Members with one key that form a sample, adjacent or not."""

    key: str
    images: list[Member] = field(default_factory=list)
    sidecars: dict[str, Member] = field(default_factory=dict)  # by extension
    repeated_key: bool = False  # an earlier sample has the same key

    def can_take(self, other: _Sample) -> bool:
        """Return whether another's sidecars all have extensions that this one lacks."""
        few, many = sorted((self.sidecars, other.sidecars), key=len)
        return not any(extension in many for extension in few)


class Seen(NamedTuple):
    """The keys and names of earlier images of the shard.

    ``stems`` are the names, up to the last dot, of the current archive's images whose key has, or
    may turn out to have, too many images to be views of one sample.
    """

    keys: set[str]
    names: set[str]
    stems: dict[str, set[str]]  # by key


def index_members(members: Iterable[Member], seen: Seen | None = None) -> ShardIndex:
    """Group members into samples.

    A sample is a run of adjacent members with one key. Sidecars away from their image (some
    writers put all images first) belong to the nearest sample with their key, in the same archive,
    that lacks their extensions.
    """
    index = ShardIndex()
    known = seen is not None  # then these are the members of one archive
    seen = seen or Seen(set(), set(), {})
    here = Seen(set(), set(), {})
    for archive in _list_archives(members, index):
        # Needed only where more than one header lies before a member's content.
        long = any(member.offset - member.start > BLOCK for member in archive)
        starts = {member.start for member in archive} if long else frozenset[int]()
        samples = _join_samples(archive, index, seen.stems if known else {})[::-1]
        while samples:  # released one by one: what is made of them takes their memory
            sample = samples.pop()
            sample.repeated_key = sample.key in here.keys or sample.key in seen.keys
            index.scattered |= sample.repeated_key
            here.keys.add(sample.key)
            sidecars = tuple(sample.sidecars.items())
            extent = _find_extent([*sample.images, *sample.sidecars.values()], starts)
            warning = None
            if sample.repeated_key:
                warning = f"key again: an earlier sample of the shard has the key {sample.key}"
            for member in sample.images:
                repeated = member.name in here.names or member.name in seen.names
                here.names.add(member.name)
                index.scattered |= repeated
                index.images.append(
                    ImageEntry(member, len(sample.key), sidecars, warning, repeated, extent)
                )
    repeated_names = [entry.member.name for entry in index.images if entry.repeated]
    if repeated_names:
        text = f"{len(repeated_names)} duplicate names, such as {repeated_names[0]}"
        index.notes["duplicates"] = text
    return index


def _find_extent(members: list[Member], starts: Container[int]) -> tuple[int, int] | None:
    """Return where members begin and end, if nothing else lies between them.

    ``starts`` are those of all members: more than a header lies before the content of a link whose
    target is a later member.
    """
    members.sort(key=_START)
    first = end = members[0][1]
    for _, start, offset, size, *_ in members:
        if start != end or offset <= end:  # a link's target lies elsewhere
            return None
        if offset - start > BLOCK and any(n in starts for n in range(start + BLOCK, offset, BLOCK)):
            return None
        end = offset + size + -size % BLOCK
    return first, end


def index_stream(members: Iterable[Member], keep: Callable[[int], object]) -> Iterator[ShardIndex]:
    """Group members into samples during the walk, for bytes that can be read only once.

    A sample is yielded once the walk is some megabytes past it. Within that distance members are
    joined as by ``index_members``. Beyond it, sidecars before their image are remembered until it
    comes; sidecars after it are recorded as damage.

    Parameters
    ----------
    members
        The members, from a walk. If it raises, all samples before that are yielded first.
    keep
        Called with the lowest offset that may still be read.
    """
    stream = _SampleStream()
    try:
        for member in members:
            if member.name:
                if stream.add(member):
                    yield stream.pop_samples(member.start - _WINDOW)
            elif member.problem is not None:  # damage: samples are joined across it
                yield ShardIndex(broken=[member])
            else:  # the end of an archive
                yield stream.pop_samples(None)
                yield stream.begin_archive(member)
            keep(stream.find_needed(member))
    except OSError:
        yield stream.pop_samples(None)
        raise
    yield stream.pop_samples(None)
    yield stream.finish()


class _SampleStream:
    """The members of a shard, as far as it was walked, that were not yielded yet."""

    def __init__(self) -> None:
        self._held: list[Member] = []  # whose samples were not yielded yet
        self._seen = Seen(set(), set(), {})
        self._by_path: dict[str, Member] = {}  # for links
        self._extensions: dict[str, tuple[str, ...]] = {}  # of the sidecars yielded, by key
        self._shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # most samples have the same
        self._aside: dict[str, dict[str, Member]] = {}  # sidecars without an image, by key
        self._late: list[Member] = []  # sidecars far after their images
        self._popped = 0  # up to where samples were popped last
        self._noted: set[str] = set()

    def add(self, member: Member) -> bool:
        """Add a member; return whether samples should be popped now."""
        if member.hard:
            member = _follow_hard_link(member, self._by_path)
        self._by_path[posixpath.normpath(member.name)] = member
        if not self._held:
            self._popped = max(self._popped, member.start - _WINDOW)
        self._held.append(member)
        return member.start - self._popped > 2 * _WINDOW

    def begin_archive(self, boundary: Member) -> ShardIndex:
        """Forget the last archive's members, which are joined with none of the next one."""
        index = ShardIndex()
        self._note_left_out(index)
        text = f"an archive ends at offset {boundary.start}, and another follows"
        index.notes["archives"] = text
        for members in (self._by_path, self._extensions, self._aside, self._seen.stems):
            members.clear()
        return self._note(index)

    def pop_samples(self, limit: int | None) -> ShardIndex:
        """Remove and return the samples that end before ``limit``, or all if it is None."""
        files = [m if m.link is None else self._follow(m, limit) for m in self._held]
        files = [member for member in files if member.link is None]
        files = self._find_aside(files) + files
        index = index_members(files, self._seen)
        if "dotted" in index.notes and (limit is not None or self._extensions):
            # Else the images held would share what belongs to an earlier or a later one.
            files = [member for member in files if not self._is_apart(member)]
            index = index_members(files, self._seen)
        last_start = {entry.key: entry.member.start for entry in index.images}
        open_key = self._split(self._held[-1])[0] if limit is not None else None
        done, waiting = ShardIndex(notes=index.notes), set[int]()
        for entry in index.images:
            if limit is None or (last_start[entry.key] <= limit and entry.key != open_key):
                done.images.append(entry)
            else:
                waiting.update((entry.member.start, *(m.start for _, m in entry.sidecars)))
        used = {m.start for e in done.images for m in (e.member, *(m for _, m in e.sidecars))}
        held, self._held = self._held, []
        for member in held:
            still = member.start in waiting or (limit is not None and member.start > limit)
            if still and member.start not in used:
                self._held.append(member)
            else:
                if not still and member.start not in used:
                    self._leave(member, last_start)
                elif self._is_dotted(self._split(member)[0]):  # shared by images yet to come
                    self._set_aside(member)
                if self._held and self._held[-1].name != _GAP:  # its neighbours stay separate
                    self._held.append(_make_gap(member))
        self._remember(done.images, used)
        self._popped = self._popped if limit is None else limit
        done.notes.pop("sidecars", None)  # counted once the archive ends
        return self._note(done)

    def finish(self) -> ShardIndex:
        """Return a record of the sidecars that came too late, if any."""
        index = ShardIndex()
        self._note_left_out(index)
        if self._late:
            first = self._late[0]
            problem = (
                f"late sidecars: {len(self._late)} are more than {_WINDOW >> 20} MiB behind their "
                f"images, which were read without them, such as {first.name}"
            )
            index.broken.append(Member("", first.start, first.start, 0, problem))
        return self._note(index)

    def find_needed(self, last: Member) -> int:
        """Return the offset of the first member that may still be read."""
        return self._held[0].start if self._held else last.start

    def _follow(self, member: Member, limit: int | None) -> Member:
        found = _follow_symbolic_link(member, self._by_path)
        # Its target may be yet to come.
        return member if found.problem and limit is not None and member.start > limit else found

    def _split(self, member: Member) -> tuple[str, str]:
        """Split a member's name as ``index_members`` does."""
        key, extension = split_name(member.name)
        if self._is_dotted(key):
            return _split_dotted(member, key, self._seen.stems[key])
        return key, extension

    def _is_dotted(self, key: str) -> bool:
        """Return whether the key has too many images to be one sample's."""
        return len(self._seen.stems.get(key, ())) > _MAX_VIEWS

    def _is_apart(self, member: Member) -> bool:
        """Return whether a sidecar of a dotted key may belong to an image that is not held."""
        key, extension = self._split(member)
        return "." in extension and self._is_dotted(key)

    def _find_aside(self, files: list[Member]) -> list[Member]:
        """Return the sidecars set aside that may belong to these images, and a gap after them."""
        found: dict[str, dict[str, Member]] = {}
        for member in files if self._aside else ():
            stem, _, extension = member.name.rpartition(".")
            for key in (split_name(member.name)[0], stem) if is_image(extension.lower()) else ():
                if key in self._aside:
                    found[key] = self._aside[key]
        sidecars = [member for some in found.values() for member in some.values()]
        return [*sidecars, _make_gap(sidecars[-1])] if sidecars else []

    def _set_aside(self, member: Member) -> None:
        """Remember a sidecar for an image yet to come."""
        key, extension = self._split(member)
        if self._is_apart(member):
            key, _, extension = member.name.rpartition(".")
        self._aside.setdefault(key, {})[extension.lower()] = member

    def _leave(self, member: Member, images: Container[str]) -> None:
        """Set a sidecar without an image aside, or note that it comes too late for one."""
        key, extension = self._split(member)
        if not extension or is_image(extension) or member.name == _GAP:
            return
        before = self._extensions.get(key)
        if before is None or extension in before or key in images:
            self._set_aside(member)
        else:
            self._late.append(member)
            self._extensions[key] = (*before, extension)

    def _remember(self, images: list[ImageEntry], used: set[int]) -> None:
        """Remember which images were yielded, and forget the sidecars set aside for them."""
        keys = set[str]()
        for entry in images:
            key, stem = split_name(entry.member.name)[0], entry.member.name.rpartition(".")[0]
            keys.update((key, entry.key))
            if entry.warning and stem != entry.key:
                self._seen.stems.setdefault(key, set()).add(stem)
            extensions = tuple(extension for extension, _ in entry.sidecars)
            self._extensions[entry.key] = self._shared.setdefault(extensions, extensions)
            self._seen.keys.add(entry.key)
            self._seen.names.add(entry.member.name)
        for key in keys & self._aside.keys():
            for member in self._aside.pop(key).values():
                # All images of a dotted key may share a sidecar.
                if member.start not in used or self._is_dotted(self._split(member)[0]):
                    self._set_aside(member)

    def _note_left_out(self, index: ShardIndex) -> None:
        """Add notes on an archive's sidecars that no image has got."""
        _note_second_sidecars(self._aside, self._extensions, index)
        lost = [key for key in self._aside if key not in self._extensions]
        lost = [key for key in lost if not self._is_dotted(key)]  # else its images share them
        lost = [key for key in lost if self._is_dotted(split_name(key)[0])]
        if lost:
            index.notes["apart"] = (
                f"{len(lost)} keys with dots have sidecars but no image near them, "
                f"such as {lost[0]}: left out"
            )

    def _note(self, index: ShardIndex) -> ShardIndex:
        """Remove notes on topics that were noted before."""
        index.notes = {kind: text for kind, text in index.notes.items() if kind not in self._noted}
        self._noted.update(index.notes)
        return index


def _make_gap(member: Member) -> Member:
    """Return what stands between members in a list that were not adjacent in the shard."""
    return member._replace(name=_GAP, link=None, hard=False)


def _list_archives(members: Iterable[Member], index: ShardIndex) -> list[list[Member]]:
    """Return the members of each archive in a shard, with links resolved."""
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
    """Return the members with each link replaced by its target, under the link's name.

    The target of a hard link is the last member with that name before it. A link that leads out of
    the archive, to no member or in a circle gets a ``problem``.
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
    for _ in range(_MAX_LINKS):
        path = posixpath.normpath(target.link or "")
        found = by_path.get(path) or _follow_linked_folder(path, by_path)
        if found is None:
            where = f"no member {path}"
            if path.startswith("/") or path.partition("/")[0] == "..":
                where = f"it leads out of the shard, to {path}"
            return member._replace(link=None, problem=f"broken link: {where}")
        target = found
        if target.link is None:
            return target._replace(name=member.name, start=member.start)
    return member._replace(link=None, problem=f"broken link: it leads in a circle, over {path}")


def _follow_linked_folder(path: str, by_path: dict[str, Member]) -> Member | None:
    """Return a link to the path with its innermost linked folder resolved; None without one."""
    folder = posixpath.dirname(path)
    while folder.strip("/"):
        member = by_path.get(folder)
        if member is not None and member.link is not None:
            return member._replace(link=posixpath.join(member.link, path[len(folder) + 1 :]))
        folder = posixpath.dirname(folder)
    return None


def _join_samples(
    members: list[Member], index: ShardIndex, known: dict[str, set[str]]
) -> list[_Sample]:
    """Group an archive's adjacent members by key; then add sidecars from elsewhere."""
    runs = list(_group_adjacent(members, {}))
    stems = _find_dotted_keys(runs, index, known)
    if stems:
        runs = list(_group_adjacent(members, stems))
    elif len({sample.key for sample in runs}) == len(runs):  # as in most shards
        return [sample for sample in runs if sample.images]
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}  # of each key, the sample that has images
    waiting: dict[str, _Sample] = {}  # of each key, the sidecars before its images
    for sample in runs:
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
    _note_second_sidecars(waiting, latest, index)
    # Sidecars that match none of a dotted key's images belong to all of them, unless they are many.
    shared = {key: waiting[key].sidecars for key in stems if key in waiting}
    for sample in samples if shared else ():
        more = shared.get(split_name(f"{sample.key}.")[0], {})
        if len(more) <= _MAX_VIEWS:
            sample.sidecars = more | sample.sidecars
    return samples


def _note_second_sidecars(apart: Iterable[str], images: Container[str], index: ShardIndex) -> None:
    """Add a note on keys that have both images and sidecars apart from them."""
    again = [key for key in apart if key in images]
    if again:
        index.notes["sidecars"] = (
            f"{len(again)} keys have second sidecars without images, such as {again[0]}: left out"
        )


def _find_dotted_keys(
    samples: Sequence[_Sample], index: ShardIndex, known: dict[str, set[str]]
) -> dict[str, set[str]]:
    """Return keys with too many images to be views of one sample, each with its images' stems.

    The images' names have dots before their extension. A stem is the name up to the last dot;
    those of earlier images are ``known``, and others are added there.
    """
    counts: Counter[str] = Counter()
    for sample in samples:
        counts[sample.key] += len(sample.images)
    stems = {
        key: known.setdefault(key, set())
        for key, n in counts.items()
        if n > _MAX_VIEWS or key in known
    }
    for sample in samples if stems else ():
        if sample.key in stems:
            stems[sample.key].update(m.name.rpartition(".")[0] for m in sample.images)
    dotted = {key: names for key, names in stems.items() if len(names) > _MAX_VIEWS}
    if dotted:
        index.scattered = True
        key, names = next(iter(dotted.items()))
        index.notes["dotted"] = (
            f"{len(names)} images have the key {key}, as keys end at the first dot: each is taken "
            f"for a sample whose key ends at the last one ({len(dotted)} such keys)"
        )
    return dotted


def _split_dotted(member: Member, key: str, stems: set[str]) -> tuple[str, str]:
    """Split the name of an image or a sidecar after the image's stem, or at the first dot."""
    stem = member.name
    for _ in range(_MAX_DOTS):
        stem = stem.rpartition(".")[0]
        if stem in stems:
            return stem, member.name[len(stem) + 1 :].lower()
    return key, member.name[len(key) + 1 :].lower()


def _group_adjacent(members: Iterable[Member], stems: dict[str, set[str]]) -> Iterator[_Sample]:
    """Yield runs of adjacent members with one key, without a second of any extension."""
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
    """Yield byte ranges of a shard, each of whole samples with about ``images_per_part`` images."""
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

    ``.json`` gives the parsed value, ``.txt`` and the like a str, ``.cls`` and ``.index`` an int,
    any other extension bytes.

    Raises
    ------
    ValueError
        If the content does not match the extension.
    """
    kind = find_sidecar_type(extension)
    if kind == "json":
        return _parse_json(content)
    if kind == "string":
        return content.decode("utf-8")
    return int(content) if kind == "int64" else content


def find_sidecar_type(extension: str) -> Literal["json", "string", "int64", "binary"]:
    """Return the type of the sidecars with an extension.

    >>> find_sidecar_type("left.txt"), find_sidecar_type("npy")
    ('string', 'binary')
    """
    kind = extension.rpartition(".")[2]
    if kind == "json":
        return "json"
    if kind in ("txt", "text", "caption", "transcript"):
        return "string"
    return "int64" if kind in ("cls", "cls2", "index", "inx", "id", "count") else "binary"


def _parse_json(content: bytes) -> Any:
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("JSON nested too deep to be parsed") from None
    # A value can be parsed and yet be nested too deep to be pickled, and sent to the client.
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
