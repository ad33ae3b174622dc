"""Read the images of a task's shards, still encoded, and begin the next shards early."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, suppress
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from dask_imgread.decoding.contract import DecoderOptions, Encoded
from dask_imgread.decoding.decode import choose_backend
from dask_imgread.decoding.header import ImageError, check_size
from dask_imgread.errors import StorageError
from dask_imgread.reading.members import SidecarReader, is_apple_double, read_encoded
from dask_imgread.reading.options import ReaderOptions
from dask_imgread.reading.records import (
    UNREACHABLE,
    describe_damage,
    describe_image,
    describe_lost,
    describe_rows,
    explain_lost,
    find_change,
    list_parts,
)
from dask_imgread.shards.find import stat_shard
from dask_imgread.shards.samples import ShardIndex, index_members, index_stream
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import ByteSource, Member, NotTarError, walk_members
from dask_imgread.storage.filesystems import Place, connect, is_local
from dask_imgread.storage.ranges import Stopper
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.tasks import FileGroupTask, ImageObject

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("dask_imgread")

# Of a begun shard, beside what it reads ahead. Records of headers are small; images are not.
_EARLY_IMAGES, _EARLY_HEADERS = 1, 10_000
_EARLY_BYTES = 16 << 20  # of sidecars


class Found(NamedTuple):
    """An image that was read and is yet to be decoded."""

    image: ImageObject
    encoded: Encoded | None  # None if the image has failed
    more_bytes: int = 0  # of its sidecars


class ShardReader:
    """Reads the images of one shard, or of a task's part of it.

    Parameters
    ----------
    options, decoder_options
        What the reader was asked for.
    task, path, shard_id
        The shard.
    rows
        The rows of its images, if only these are read.
    read_ahead
        Maximum number of bytes fetched in advance.
    """

    def __init__(
        self,
        options: ReaderOptions,
        decoder_options: DecoderOptions,
        task: FileGroupTask,
        path: str,
        shard_id: str,
        rows: pd.DataFrame | None,
        read_ahead: int,
    ) -> None:
        self._options, self._decoder_options = options, decoder_options
        self._task, self._path, self._shard_id = task, path, shard_id
        self._shown = redact_url(path)
        self._read_ahead = read_ahead
        self._found = self._read_all() if rows is None else self._read_chosen(rows)
        self._early: Future[None] | None = None
        self._first: deque[Found] = deque()  # that were found early
        self._place: Place | None = None
        self._stopper = Stopper()
        self._last_stretch = self._find_last_stretch(whole=rows is None)

    def read(self, begin_next: Callable[[], None]) -> Iterator[Found]:
        """Yield the images; call ``begin_next`` when the next shards should be begun."""
        if self._last_stretch == 0:
            begin_next()
        if self._early is not None:
            wait([self._early])
            while self._first:
                yield self._first.popleft()
            self._early.result()  # raises what ended it
        for found in self._found:
            if found.image.offset >= self._last_stretch:
                begin_next()
            yield found

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Read the first images in a thread."""
        with suppress(Exception):  # it is raised again when the shard is opened
            # Not in the thread: some file systems are made, and some stores asked, by each thread.
            self._place = connect(self._path, self._task.storage_options)
        self._early = pool.submit(self._read_early)

    def stop(self) -> None:
        """Cancel all requests; the thread that reads comes to an end."""
        self._stopper.stop()

    def close(self) -> None:
        """Close the shard, once no thread reads it."""
        self._found.close()

    def _read_early(self) -> None:
        most = _EARLY_IMAGES if self._options.decode else _EARLY_HEADERS
        size = 0
        for found in islice(self._found, most):
            self._first.append(found)
            size += found.more_bytes
            if size >= _EARLY_BYTES:
                break

    def _find_last_stretch(self, *, whole: bool) -> float:
        """Return the offset from which on the next shards should be begun.

        A local shard is there when it is needed. Whole images are fetched so far ahead that those
        of the next shard would only take memory, until this one's end comes near.
        """
        if is_local(self._path):
            return math.inf
        if not (whole and self._options.decode):
            return 0
        size = self._task.find_size(self._path)
        return math.inf if size is None else max(0, size - self._read_ahead // 2)

    def _read_all(self) -> Generator[Found]:
        """Read all images of the task's part of the shard; its damage is a failed image, too."""
        path, shown, task = self._path, self._shown, self._task
        given = self._options.sidecars
        try:
            # Of a remote shard it is known from the listing, if there was one.
            version = task.find_version(path) if task.versions or is_local(path) else None
            with self._open() as source:
                sidecars = SidecarReader(source, None if isinstance(given, bool) else given)
                for index in self._index(source):
                    for note in index.notes.values():
                        logger.warning("%s: %s", shown, note)
                    for entry in index.images:
                        if is_apple_double(source, entry.member):
                            continue
                        image = describe_image(entry, shown, self._shard_id, version)
                        more = sidecars.attach(entry.sidecars, image) if given else 0
                        yield Found(image, self._load(source, entry.member, image), more)
                    for member in index.broken:
                        yield Found(describe_damage(member, shown, self._shard_id), None)
        except (OSError, NotTarError) as error:
            reason = hide_secrets(explain_lost(error, path), task.storage_options)
            yield Found(describe_lost(path, self._shard_id, task.start, reason), None)

    def _read_chosen(self, rows: pd.DataFrame) -> Generator[Found]:
        """Read some images, in the order of their offsets, and nothing else of the shard."""
        path, storage_options = self._path, self._task.storage_options
        described = describe_rows(rows, self._shown, self._shard_id)
        images = sorted(described, key=attrgetter("offset"))
        with ExitStack() as stack:
            problem = version = None
            try:
                _, size, version = stat_shard(path, storage_options, self._stopper, self._place)
                opened = open_shard(
                    path,
                    storage_options,
                    size=size,
                    read_ahead=self._read_ahead,
                    parts=list_parts(images, size),
                    stopper=self._stopper,
                    place=self._place,
                )
                source = stack.enter_context(opened)
            except (OSError, ValueError, ImportError) as error:  # no such store, for example
                problem = hide_secrets(explain_lost(error, path), storage_options)
            for image in images:
                image.error = image.error or problem or find_change(image, version)
                if image.error is not None:
                    yield Found(image, None)
                    continue
                source.keep(image.offset)
                member = Member(image.key, image.offset, image.offset, image.size)
                yield Found(image, self._load(source, member, image))

    def _open(self) -> AbstractContextManager[ByteSource]:
        task, options = self._task, self._options
        return open_shard(
            self._path,
            task.storage_options,
            start=task.start,
            plain=task.byte_range is not None,  # a compressed shard has no parts
            size=task.find_size(self._path),
            read_ahead=self._read_ahead,
            skipping=not (options.decode or options.digests) or task.index is not None,
            stopper=self._stopper,
            place=self._place,
        )

    def _index(self, source: ByteSource) -> Iterator[ShardIndex]:
        """Walk the headers of the task's part of the shard, and yield the index of its samples."""
        start, stop = self._task.byte_range or (0, None)
        if self._task.index is not None:
            yield self._task.index
        elif source.streamed:
            source.keep(start)
            yield from index_stream(walk_members(source, start, stop), source.keep)
        else:
            yield index_members(walk_members(source, start, stop))

    def _load(self, source: ByteSource, member: Member, image: ImageObject) -> Encoded | None:
        """Read an image's bytes and header; on failure set ``image.error`` and return None."""
        if image.error is not None:  # a sidecar could not be fetched
            return None
        whole, decoder_options = self._options.decode, self._decoder_options
        try:
            if member.problem is not None:
                raise ImageError(member.problem)
            header, content = read_encoded(
                source, member, image, whole=whole, digests=self._options.digests
            )
            image.format = header.format
            image.width, image.height, image.channels = header.width, header.height, header.channels
            size_options = decoder_options if whole else None
            check_size(content, header, self._options.max_pixels, size_options)
        except ImageError as error:
            image.error = str(error)
            return None
        except OSError as error:  # only this image's bytes: the next one's may be readable
            image.error = hide_secrets(
                f"{UNREACHABLE}: {error}"
                if isinstance(error, StorageError | PermissionError)
                else f"unreadable: {type(error).__name__}: {error}"
            )
            return None
        backend = choose_backend(content, header, decoder_options) if whole else ""
        return Encoded(image.image_path, content, header, backend)


class ShardQueue:
    """The shards of a task, in order, of which the next ones can be begun early.

    Parameters
    ----------
    shards
        The shards.
    at_once
        How many may be open at a time.
    """

    def __init__(self, shards: Iterable[ShardReader], at_once: int) -> None:
        self._waiting, self._begun = iter(shards), deque[ShardReader]()
        self._current: ShardReader | None = None
        self._at_once = at_once
        self._pool = ThreadPoolExecutor(at_once, "dask-imgread-shards")

    def __iter__(self) -> Iterator[ShardReader]:
        while shard := self._begun[0] if self._begun else next(self._waiting, None):
            self._current = shard
            if self._begun:
                self._begun.popleft()
            yield shard
            shard.close()

    def begin_next(self) -> None:
        """Begin the shards that follow the one in use."""
        for shard in islice(self._waiting, self._at_once - 1 - len(self._begun)):
            self._begun.append(shard)  # first: it is to be closed even if this is interrupted
            shard.begin(self._pool)

    def close(self) -> None:
        """End and close the shard in use and those that were begun.

        Not left to the generators that use it: from Python 3.14 on a traceback may keep those open.
        """
        shards = [*self._begun, *filter(None, [self._current])]
        for shard in shards:
            shard.stop()
        self._pool.shutdown(cancel_futures=True)
        for shard in shards:
            shard.close()
