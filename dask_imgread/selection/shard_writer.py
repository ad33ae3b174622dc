"""Write one shard of chosen samples, on a worker, with all its members' bytes as they are."""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
import tarfile
import threading
from base64 import b64encode
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dask_imgread.shards.find import stat_shard
from dask_imgread.shards.parts import join_parts
from dask_imgread.shards.samples import ImageEntry, index_members, is_image, make_shard_id
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import BLOCK, ByteSource, Member, NotTarError, pad, walk_members
from dask_imgread.sidecars import drop_non_finite
from dask_imgread.storage.files import open_whole, write_whole
from dask_imgread.storage.filesystems import connect, is_local
from dask_imgread.storage.redaction import redact_url
from dask_imgread.tasks import COLUMNS

JOB_KEY = b"dask_imgread"  # in the metadata of each Parquet file: the id of what it belongs to
_CHUNK_BYTES = 64 << 20  # of samples, whose shards are open, or read, at a time
_WRITTEN_BYTES = 1 << 20  # that are written together
_SOURCES = 16  # shards read at a time
_STREAMS = 8  # compressed shards that stay open
_SPACE = re.compile(r"\s")  # separates the fields of DALI's index
_RECORD = 10_240  # tar's own files are a multiple of it


class Sample(NamedTuple):
    """A chosen sample: where it lies, and under which key it is written.

    ``extent`` is None if its members are to be looked up. ``images`` are the sizes of those chosen,
    by their offsets. ``more`` are columns that become a ``.json`` member.
    """

    shard: str
    version: str | None
    key: str
    new_key: str
    extent: tuple[int, int] | None
    images: dict[int, int]
    more: dict[str, Any]


class Placed(NamedTuple):
    """Where a member is written."""

    name: str
    offset: int  # from the beginning of its sample
    size: int
    source: int  # its offset in the shard that it comes from


class Content(NamedTuple):
    """What is written of a sample: its bytes, and the members in them."""

    buffers: list[bytes | memoryview]
    members: list[Placed]

    def add(
        self,
        name: str,
        content: bytes | memoryview,
        source: int = -1,
        header: bytes | memoryview | None = None,
    ) -> None:
        """Add a member, with a new header if none is given."""
        size = len(content)
        if header is None:
            about = tarfile.TarInfo(name)
            about.size = size
            header = about.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        last = self.members[-1] if self.members else None
        offset = pad(last.offset + last.size) + len(header) if last else len(header)
        self.buffers.extend((header, content, bytes(pad(size) - size)))
        self.members.append(Placed(name, offset, size, source))


class Layout(NamedTuple):
    """Where samples are written."""

    starts: list[int]  # and where the last sample ends
    members: list[list[Placed]]  # of each sample


View = Callable[[tuple[int, int]], memoryview]  # of a range of a shard


class Written(NamedTuple):
    """What was written for one partition."""

    shard: str
    samples: int
    images: int
    size: int


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shard of one partition's rows, and then their Parquet file, which marks it done.

    Parameters
    ----------
    out, out_options
        The folder, and the options of its file system.
    storage_options
        Those of the shards that are read.
    job_id
        Goes into each Parquet file.
    json_columns
        Columns that become a ``.json`` member of each sample.
    dali_index
        Whether to write the index file of DALI's reader, too.
    """

    out: str
    out_options: dict[str, Any] = field(repr=False)
    storage_options: dict[str, Any] = field(repr=False)
    job_id: str
    json_columns: tuple[str, ...] = ()
    dali_index: bool = False

    def __call__(self, partition: tuple[int, pd.DataFrame]) -> Written:
        """Write the rows of one partition, given its number."""
        number, rows = partition
        fs, root = connect(self.out, self.out_options)
        path = f"{root}/{name_shard(number)}"
        samples = list_samples(rows, self.json_columns)
        with open_whole(fs, path) as file:
            layout = write_tar(file, SampleReader(self.storage_options).read(samples))
            size = file.tell()
        if self.dali_index:
            write_whole(fs, path.removesuffix(".tar") + ".idx", format_dali_index(layout))
        shard = f"{self.out}/{name_shard(number)}"
        version = stat_shard(shard, self.out_options).version
        table = _make_table(describe_written(rows, layout, shard, version))
        marked = table.replace_schema_metadata({**table.schema.metadata, JOB_KEY: self.job_id})
        content = io.BytesIO()
        pq.write_table(marked, content)
        write_whole(fs, f"{root}/{name_rows(number)}", content.getvalue())
        return Written(name_shard(number), len(samples), len(rows), size)

    def name_shard(self, partition: tuple[int, pd.DataFrame]) -> str:
        """Return the name of the shard that a partition becomes."""
        return name_shard(partition[0])


def _make_table(rows: pd.DataFrame) -> pa.Table:
    """Return rows as a table that pandas can read without options, too."""
    table = pa.Table.from_pandas(rows)
    described = json.loads(table.schema.metadata[b"pandas"])
    for column in described["columns"]:
        try:
            pd.api.types.pandas_dtype(column["numpy_type"])
        except (TypeError, NotImplementedError):  # pandas 3.1 can't parse its names of such types
            column["numpy_type"] = "object"
    return table.replace_schema_metadata({b"pandas": json.dumps(described)})


def name_shard(number: int) -> str:
    """Return the name of a shard in the output folder."""
    return f"{number:05d}.tar"


def name_rows(number: int) -> str:
    """Return the name of the Parquet file of a shard's rows in the output folder."""
    return f"metadata/part-{number:05d}.parquet"


def list_samples(rows: pd.DataFrame, json_columns: Collection[str] = ()) -> list[Sample]:
    """Return the samples that rows name, in the order of the rows; those of one are adjacent."""
    fields = ["_sample", "shard", "shard_version", "key", "_key", "sample_offset", "sample_size"]
    columns = [pa.array(rows[name]).to_pylist() for name in (*fields, "offset", "size")]
    rows = rows.reset_index() if "image_id" in json_columns else rows
    more = {name: pa.array(rows[name]).to_pylist() for name in json_columns}
    samples: list[Sample] = []
    last = None
    for n, (number, shard, version, key, new_key, start, length, offset, size) in enumerate(
        zip(*columns, strict=True)
    ):
        if number != last:
            last = number
            extent = None if start is None or length is None else (start, start + length)
            known = {name: drop_non_finite(column[n]) for name, column in more.items()}
            values = {name: value for name, value in known.items() if value is not None}
            samples.append(Sample(shard, version, key, new_key, extent, {}, values))
        samples[-1].images[offset] = size
    return samples


class SampleReader:
    """Reads samples from the shards that they lie in.

    Each range is read once for every 64 MiB of samples. The last few shards that can only be read
    from their beginning on stay open; one is begun again if the order of the samples leads back.
    """

    def __init__(self, storage_options: dict[str, Any]) -> None:
        self._options = storage_options
        self._entries: dict[str, dict[int, list[ImageEntry]]] = {}  # by offset; of shards walked
        self._streams: dict[str, tuple[ByteSource, ExitStack]] = {}
        self._lock = threading.Lock()

    def read(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Content]]:
        """Yield each sample with its members, in the order given.

        Raises
        ------
        OSError
            If a shard can't be read, or has changed since the rows were made.
        ValueError
            If a row does not match its shard.
        """
        with closing(self), ThreadPoolExecutor(_SOURCES) as pool:
            for chunk in _cut(samples):
                by_shard: dict[str, list[Sample]] = {}
                for sample in chunk:
                    by_shard.setdefault(sample.shard, []).append(sample)
                with ExitStack() as stack:
                    found = self._begin(by_shard, pool, stack)
                    for sample in chunk:
                        yield sample, next(found[sample.shard])

    def close(self) -> None:
        """Close the shards that are open."""
        for _, stack in self._streams.values():
            stack.close()
        self._streams.clear()

    def _begin(
        self, by_shard: dict[str, list[Sample]], pool: ThreadPoolExecutor, stack: ExitStack
    ) -> dict[str, Iterator[Content]]:
        """Begin to read samples of some shards; of many shards, or distant ones, read all now."""
        readers = {path: self._read_shard(path, samples) for path, samples in by_shard.items()}
        local = all(map(is_local, readers))
        if local and len(readers) <= _SOURCES:
            return {path: stack.enter_context(closing(each)) for path, each in readers.items()}
        read: Iterator[list[Content]] = (map if local else pool.map)(list, readers.values())
        return {path: iter(contents) for path, contents in zip(readers, read, strict=True)}

    def _read_shard(self, path: str, samples: list[Sample]) -> Generator[Content]:
        """Yield the members of some samples of one shard."""
        _, size, version = stat_shard(path, self._options)
        for sample in samples:
            check_version(path, sample.version, version)
        ranges = [place for sample in samples for place in self._locate(path, sample)]
        with ExitStack() as stack:
            view = self._open(path, size, ranges, stack)
            for sample in samples:
                if sample.extent is not None:
                    yield _cut_extent(sample, view(sample.extent))
                else:
                    yield self._take_members(path, sample, view)

    def _locate(self, path: str, sample: Sample) -> list[tuple[int, int]]:
        """Return where the bytes lie that a sample needs."""
        if sample.extent is not None:
            return [sample.extent]
        members = self._find_members(path, sample)
        return [(member.offset, member.offset + member.size) for member in members]

    def _find_members(self, path: str, sample: Sample) -> list[Member]:
        """Return a sample's members, from a walk over the whole shard."""
        if path not in self._entries:
            with open_shard(path, self._options, skipping=True) as source:
                index = index_members(walk_members(source))
            by_offset: dict[int, list[ImageEntry]] = {}
            for entry in index.images:
                by_offset.setdefault(entry.member.offset, []).append(entry)
            self._entries[path] = by_offset
        found = {offset: self._entries[path].get(offset, []) for offset in sample.images}
        _check_images(sample, {o: e[0].member.size for o, e in found.items() if e})
        chosen = [  # a link has the offset of its target
            next((entry for entry in same if entry.key == sample.key), same[0])
            for same in found.values()
        ]
        sidecars = [member for _, member in chosen[0].sidecars]
        if len({entry.sidecars for entry in chosen}) > 1:
            raise ValueError(
                f"{redact_url(path)} has several samples with the key {sample.key}, which the "
                "frame does not tell apart: make it with read_metadata"
            )
        return [*(entry.member for entry in chosen), *sidecars]

    def _take_members(self, path: str, sample: Sample, view: View) -> Content:
        taken = Content([], [])
        for member in self._find_members(path, sample):
            _check_member(sample, member)
            content = view((member.offset, member.offset + member.size))
            taken.add(_rename(member.name, sample), content, member.offset)
        return taken

    def _open(
        self, path: str, size: int | None, ranges: list[tuple[int, int]], stack: ExitStack
    ) -> View:
        """Return what views ranges of a shard.

        A plain local file is read when it is viewed, until the stack is closed. All else is read
        now, in ascending order.
        """
        ascending = sorted(set(ranges))
        with self._lock:
            opened = self._streams.pop(path, None)
        if opened is not None:
            with suppress(OSError):  # bytes that were discarded: it is begun again
                return self._view_all(path, ascending, *opened)
        last = max(stop for _, stop in ranges) if size is None else size
        parts = [(min(start, last), min(stop, last)) for start, stop in ascending]
        if ranges == ascending or not is_local(path):  # neighbours are read at once
            parts = join_parts(parts)
        own = ExitStack()
        source = own.enter_context(open_shard(path, self._options, size=size, parts=parts))
        if is_local(path) and not source.sequential:
            stack.push(own)
            return functools.partial(_view_range, path, source)
        return self._view_all(path, ascending, source, own)

    def _view_all(
        self, path: str, ranges: list[tuple[int, int]], source: ByteSource, stack: ExitStack
    ) -> View:
        """Read ranges of an open shard, which stays open if no part can be read by itself."""
        with ExitStack() as on_error:
            on_error.push(stack)
            contents = {}
            for place in ranges:
                # A view would keep its whole block in memory, of which little may be needed.
                content = _view_range(path, source, place)
                contents[place] = memoryview(bytes(content)) if source.sequential else content
            if source.sequential:
                self._keep(path, source, on_error.pop_all())
        return contents.__getitem__

    def _keep(self, path: str, source: ByteSource, stack: ExitStack) -> None:
        with self._lock:
            self._streams[path] = source, stack
            first = next(iter(self._streams))
            old = self._streams.pop(first) if len(self._streams) > _STREAMS else None
        if old is not None:
            old[1].close()


def _view_range(path: str, source: ByteSource, place: tuple[int, int]) -> memoryview:
    """Return a range of a shard; raise ValueError if it lies beyond the end."""
    start, stop = place
    content = source.view_at(start, stop - start)
    if len(content) < stop - start:
        raise ValueError(
            f"{redact_url(path)} ends before offset {stop}: it is cut off, or the frame does not "
            f"match it; leave out what begins at offset {start}"
        )
    return content


def check_version(path: str, before: str | None, now: str) -> None:
    """Raise OSError if a shard has changed since its rows were made, as far as they tell."""
    if before not in (None, now):
        raise OSError(
            f"{redact_url(path)} changed since the frame was made: its version was {before}, and "
            f"is {now}"
        )


def _cut(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Yield lists of samples of at most ``_CHUNK_BYTES`` each, or of one."""
    chunk: list[Sample] = []
    total = 0
    for sample in samples:
        start, stop = sample.extent or (0, sum(sample.images.values()))
        if chunk and total + stop - start > _CHUNK_BYTES:
            yield chunk
            chunk, total = [], 0
        chunk.append(sample)
        total += stop - start
    if chunk:
        yield chunk


class _Extent:
    """A sample's bytes, as a source whose headers can be walked."""

    streamed, sequential, problem = False, False, ""

    def __init__(self, content: memoryview) -> None:
        self._content = content

    def read_at(self, offset: int, size: int) -> bytes:
        return bytes(self.view_at(offset, size))

    def view_at(self, offset: int, size: int) -> memoryview:
        return self._content[offset : offset + size]

    def keep(self, offset: int) -> None:
        pass

    def end(self) -> int:
        return len(self._content)


def _cut_extent(sample: Sample, content: memoryview) -> Content:
    """Return a sample that lies in one place, without images that were not chosen."""
    assert sample.extent is not None
    first, end = sample.extent[0], 0
    same = whole = sample.key == sample.new_key
    placed, found, headers = [], {}, []
    try:
        for member in walk_members(_Extent(content), 0, len(content)):
            _check_member(sample, member)
            name, start, offset, size, *_ = member
            if offset + size > len(content):
                raise ValueError(
                    f"{redact_url(sample.shard)}/{name} ends beyond its sample {sample.key}, at "
                    f"offset {first + len(content)}: the frame does not match the shard"
                )
            place = first + offset
            if place in sample.images:
                found[place] = size
            elif is_image(name[len(sample.key) + 1 :].lower()):
                continue
            placed.append(Placed(_rename(name, sample), offset, size, place))
            headers.append(start)
            whole &= start == end
            end = pad(offset + size)
    except NotTarError as error:
        raise ValueError(
            f"{redact_url(sample.shard)} has no sample {sample.key} at offset {first}: {error}: "
            "the frame does not match it"
        ) from None
    _check_images(sample, found)
    if whole and end == len(content):
        return Content([content], placed)
    cut = Content([], [])
    for start, (name, offset, size, place) in zip(headers, placed, strict=True):
        header = content[start:offset] if same else None
        cut.add(name, content[offset : offset + size], place, header)
    return cut


def _check_member(sample: Sample, member: Member) -> None:
    if member.problem is not None:
        raise ValueError(f"{redact_url(sample.shard)}/{member.name}: {member.problem}")


def _check_images(sample: Sample, found: dict[int, int]) -> None:
    if found != sample.images:
        missing = sample.images.items() - found.items()
        raise ValueError(
            f"{redact_url(sample.shard)} has no image {sample.key} of the (offset, size) "
            f"{', '.join(map(str, sorted(missing)))}: the frame does not match it"
        )


def _rename(name: str, sample: Sample) -> str:
    rest = name.removeprefix(sample.key)
    if not name.startswith(f"{sample.key}.") or "/" in rest or "\0" in rest:
        raise ValueError(
            f"{redact_url(sample.shard)}/{name} is no member of the sample {sample.key}: the frame "
            "does not match it"
        )
    return sample.new_key + rest


def write_tar(file: IO[bytes], samples: Iterable[tuple[Sample, Content]]) -> Layout:
    """Write samples as a tar; return where they are."""
    layout = Layout([0], [])
    waiting: list[bytes | memoryview] = []
    position = flushed = 0
    for sample, content in samples:
        _add_json(sample, content)
        waiting += content.buffers
        position += sum(map(len, content.buffers))
        layout.starts.append(position)
        layout.members.append(content.members)
        if position - flushed >= _WRITTEN_BYTES:
            file.writelines(waiting)
            waiting.clear()
            flushed = position
    file.writelines([*waiting, bytes(2 * BLOCK + -(position + 2 * BLOCK) % _RECORD)])
    return layout


def _add_json(sample: Sample, content: Content) -> None:
    """Add the member of a sample's columns; under another name if it has a ``.json`` already."""
    if sample.more:
        taken = {member.name.lower() for member in content.members}
        names = (f"{sample.new_key}.{'columns.' * n}json" for n in itertools.count())
        name = next(name for name in names if name.lower() not in taken)
        text = json.dumps(sample.more, sort_keys=True, ensure_ascii=False, default=_to_text)
        content.add(name, text.encode())


def _to_text(value: Any) -> str:
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


def describe_written(rows: pd.DataFrame, layout: Layout, shard: str, version: str) -> pd.DataFrame:
    """Return the rows of the images as they are now, with what they were in ``source_id``."""
    numbers = (rows["_sample"] - rows["_sample"].iloc[0]).to_numpy()
    found = [
        next(member for member in layout.members[number] if member.source == offset)
        for number, offset in zip(numbers.tolist(), rows["offset"].to_list(), strict=True)
    ]
    starts = np.array(layout.starts)
    names = pa.array([member.name for member in found], pa.string())
    new = rows.drop(columns=["_sample", "_key"])
    changed = {
        "image_path": _join(redact_url(shard), names),
        "shard": pa.repeat(redact_url(shard), len(rows)),
        "shard_version": pa.repeat(pa.scalar(version, pa.string()), len(rows)),
        "key": rows["_key"].array,
        "offset": pa.array(starts[numbers] + [member.offset for member in found]),
        "size": pa.array([member.size for member in found], pa.int64()),
        "sample_offset": pa.array(starts[numbers]),
        "sample_size": pa.array(np.diff(starts)[numbers]),
    }
    for name, values in changed.items():
        new[name] = pd.array(values, dtype=COLUMNS[name])
    new["source_id"] = pd.array(rows.index, dtype="string[pyarrow]")
    ids = pd.Index(_join(make_shard_id(shard), names), dtype="string[pyarrow]", name="image_id")
    return new.set_axis(ids)


def _join(place: str, names: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(place, names, "/")


def format_dali_index(layout: Layout) -> bytes:
    """Return the index file that DALI's ``fn.readers.webdataset`` takes (wds2idx, v1.2)."""
    lines = [f"v1.2 {len(layout.members)}"]
    for start, members in zip(layout.starts, layout.members, strict=False):
        folder_end = members[0].name.rfind("/") + 1
        dot = members[0].name.find(".", folder_end)
        fields = [(m.name[dot + 1 :], start + m.offset, m.size, m.name) for m in members]
        lines.append(" ".join(_SPACE.sub("_", str(value)) for each in fields for value in each))
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
