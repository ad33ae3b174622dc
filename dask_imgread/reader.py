"""ImageReaderStage: tar shards in, batches of decoded images out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dask_imgread import gpu
from dask_imgread.cluster import check_resources
from dask_imgread.decode import Decoded, DecoderOptions, decode_images
from dask_imgread.header import HEAD_BYTES, Header, ImageError, read_header
from dask_imgread.samples import (
    MAX_SIDECAR_BYTES,
    ImageEntry,
    ShardIndex,
    index_members,
    make_shard_id,
    parse_sidecar,
)
from dask_imgread.shards import open_shard, resolve_path
from dask_imgread.stage import ProcessingStage, Resources
from dask_imgread.tar import ByteSource, Member, NotTarError, walk_members
from dask_imgread.tasks import FileGroupTask, ImageBatch, ImageObject
from dask_imgread.worker import count_own_cores

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger("dask_imgread")

_LOGGED_PER_BATCH = 5  # failures; all are in the batch itself
_HEADERS_PER_BATCH = 1000  # images of a batch from which no pixel is decoded


class ReadError(RuntimeError):
    """An image could not be read, under ``on_error="raise"``. Names shard and member."""


class _Encoded(NamedTuple):
    """An image that is to be decoded: its bytes, and the record that it will complete."""

    image: ImageObject
    content: bytes
    backend: str
    decoded_bytes: int


@dataclass
class ImageReaderStage(ProcessingStage[FileGroupTask, ImageBatch]):
    """Read the images of WebDataset tar shards: NVIDIA DALI decodes, and Pillow what DALI can't.

    A reader is plain values until it runs: it is made on the client, which may have no
    GPU, and decides on the worker what to decode with. One reader may be used by several
    threads at once.

    Parameters
    ----------
    dali_batch_size
        Images decoded together, at most.
    verbose
        Log a line for each task, at level INFO of the logger ``dask_imgread``.
    num_threads
        DALI's CPU threads, at most. On a Dask worker a reader takes no more than the cores
        its thread has a right to: on the CPU one, beside a GPU its share of the machine.
    num_gpus_per_worker
        The share of a GPU that a reader holds while it runs; not used on a CPU.
    name
        The stage's name.
    device
        ``"auto"`` decodes on the worker's GPU where there is one and on its CPU cores
        where there is none; ``"gpu"`` and ``"cpu"`` insist.
    decode
        If False, only headers are read, and ``image_data`` is None.
    sidecars
        Whether to read the samples' other members into ``ImageObject.metadata``.
    on_error
        What becomes of an image that can't be read: ``"record"`` puts it, with the
        reason, into ``ImageBatch.failed``; ``"skip"`` only counts it; ``"raise"`` raises.
    max_pixels
        Images with more pixels are refused before anything is decoded; None for no limit.
    max_batch_bytes
        A batch is cut so that its decoded images take no more bytes, unless one image
        alone does.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> shards = make_shards("shards", images_per_shard=3)
    >>> batch, = ImageReaderStage(device="cpu").process(FileGroupTask(data=shards[:1]))
    >>> [image.image_data.shape for image in batch.data]
    [(96, 128, 3), (96, 128, 3), (96, 128, 3)]
    """

    dali_batch_size: int = 100
    verbose: bool = True
    num_threads: int = 8
    num_gpus_per_worker: float = 0.25
    name: str = "image_reader"
    _: KW_ONLY
    device: Literal["auto", "gpu", "cpu"] = "auto"
    decode: bool = True
    sidecars: bool = True
    on_error: Literal["record", "skip", "raise"] = "record"
    max_pixels: int | None = 1 << 28
    max_batch_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        """Check the values."""
        for field in ("dali_batch_size", "num_threads", "max_batch_bytes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)!r}")
        if not 0 < self.num_gpus_per_worker <= 1:
            raise ValueError(
                "num_gpus_per_worker must be above 0 and at most 1, "
                f"not {self.num_gpus_per_worker!r}"
            )
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1 or None, not {self.max_pixels!r}")
        for field, choices in (
            ("device", ("auto", "gpu", "cpu")),
            ("on_error", ("record", "skip", "raise")),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {choices}, not {getattr(self, field)!r}")

    @property
    def resources(self) -> Resources:
        """The share of a GPU that is held where this is asked, 0 where no GPU is to be used."""
        used = self._wants_gpu() and (self.device == "gpu" or gpu.count_gpus() > 0)
        return Resources(gpus=self.num_gpus_per_worker if used else 0.0)

    def outputs(self) -> tuple[list[str], list[str]]:
        """Return the names of the attributes that a batch and its images have."""
        return ["data"], ["image_data", "image_path", "image_id"]

    def annotations(self, client: Client) -> dict[str, Any]:
        """Return the keyword arguments that make the scheduler hold a GPU share for each task.

        Parameters
        ----------
        client
            A client of the cluster that is to run the reader.

        Returns
        -------
        dict
            ``{"resources": {"GPU": num_gpus_per_worker}}`` where the workers declare
            ``GPU``, ``{}`` for a CPU cluster. It fits ``client.map``, ``client.submit``,
            ``client.compute`` and ``dask.annotate``.

        Raises
        ------
        RuntimeError
            If the workers declare less than is asked for, or nothing while the device must
            be a GPU: Dask would let the tasks wait for ever, in silence.
        """
        if self.device == "cpu" or not self.decode:
            return {}
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        declared = any(gpu.RESOURCE in worker.get("resources", {}) for worker in workers)
        if not declared and self.device == "auto":
            return {}
        resources = {gpu.RESOURCE: self.num_gpus_per_worker}
        check_resources(client, resources)
        return {"resources": resources}

    def process(self, task: FileGroupTask) -> list[ImageBatch]:
        """Read all images of a task's shards.

        Parameters
        ----------
        task
            The shards to read.

        Returns
        -------
        list of ImageBatch
            The batches in the shards' order, all pixels in memory; see ``stream``.

        Raises
        ------
        ValueError
            If the task names no shard.
        ReadError
            If an image can't be read, under ``on_error="raise"``.
        """
        return list(self.read(task))

    def read(self, task: FileGroupTask) -> Iterator[ImageBatch]:
        """Yield what ``stream`` does, holding a share of the worker's GPU meanwhile.

        Every path through Dask reads with this, so that a ``stream`` extended in a subclass
        is seen by all of them, and runs within its share.
        """
        with gpu.hold_share(self.num_gpus_per_worker) if self._wants_gpu() else nullcontext():
            yield from self.stream(task)

    def stream(self, task: FileGroupTask) -> Iterator[ImageBatch]:
        """Yield the batches of ``process`` one at a time, keeping none."""
        if not task.data:
            raise ValueError(f"No tar file paths in task {task.task_id!r}: its data is empty")
        with gpu.hold_share(self.num_gpus_per_worker) if self._wants_gpu() else nullcontext():
            yield from self._stream(task)

    def _wants_gpu(self) -> bool:
        return self.decode and self.device != "cpu"

    def _stream(self, task: FileGroupTask) -> Iterator[ImageBatch]:
        options = self._choose_decoder()
        batches = 0
        images = failures = 0
        for path in task.data:
            for batch in self._read_shard(resolve_path(path), task, options):
                batch.dataset_name = task.dataset_name
                batch.task_id = f"{task.task_id}_{batches}"
                batches += 1
                images += batch.num_items
                failures += len(batch.failed) + batch.skipped
                yield batch
        if self.verbose:
            logger.info(
                "%s: task %s: %d images, %d failed", self.name, task.task_id, images, failures
            )

    def _choose_decoder(self) -> DecoderOptions:
        """Look at where this runs: which device there is, and how many cores are ours."""
        available = gpu.count_gpus() if self.device != "cpu" else 0
        if self.device == "gpu" and not available and self.decode:
            raise RuntimeError(
                'device="gpu", but no GPU was found: NVML (the NVIDIA driver) was asked, and '
                f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}"
            )
        device = "gpu" if available else "cpu"
        threads = min(self.num_threads, count_own_cores(available, self.num_gpus_per_worker))
        return DecoderOptions(device, threads, self.dali_batch_size)

    def _read_shard(
        self, path: str, task: FileGroupTask, options: DecoderOptions
    ) -> Iterator[ImageBatch]:
        """Yield one shard's batches; what is broken in it ends in them too."""
        gathered = _Gathered(self, options)
        try:
            with open_shard(path, task.storage_options) as source:
                index = self._index(source, task)
                repeated = [entry.member.name for entry in index.images if entry.repeated]
                if repeated:
                    logger.warning(
                        "%s: %d duplicate names, such as %s", path, len(repeated), repeated[0]
                    )
                shard_id = make_shard_id(path)
                for entry in index.images:
                    image = _describe(entry, path, shard_id)
                    encoded = self._load(source, entry, image)
                    if encoded is not None and not gathered.has_room_for(encoded):
                        yield gathered.empty()
                    gathered.add(image, encoded)
                    if gathered.full():
                        yield gathered.empty()
                for member in index.broken:
                    gathered.add(_describe_damage(member, path, shard_id), None)
        except (OSError, NotTarError) as error:
            gathered.add(_describe_lost(path, f"unreadable shard: {error}"), None)
        if not gathered.nothing():
            yield gathered.empty()

    def _index(self, source: ByteSource, task: FileGroupTask) -> ShardIndex:
        """Walk the headers of the task's part of a shard."""
        start, stop = task.byte_range or (0, None)
        if not task.index_whole_shard:
            return index_members(walk_members(source, start, stop))
        index = index_members(walk_members(source))
        last = stop if stop is not None else 1 << 63
        index.images = [e for e in index.images if start <= e.member.start < last]
        index.broken = [m for m in index.broken if start <= m.start < last]
        return index

    def _load(self, source: ByteSource, entry: ImageEntry, image: ImageObject) -> _Encoded | None:
        """Read an image's bytes, header and sidecars; None, and ``image.error``, if it can't be."""
        member = entry.member
        if self.sidecars:
            _read_sidecars(source, entry, image)
        try:
            if member.problem is not None:
                raise ImageError(member.problem)
            header, content = _read_encoded(source, member, self.decode)
            image.format = header.format
            image.width, image.height, image.channels = header.width, header.height, header.channels
            pixels = header.width * header.height
            if self.max_pixels is not None and pixels > self.max_pixels:
                raise ImageError(
                    f"too large: {header.width} x {header.height} pixels, "
                    f"max_pixels is {self.max_pixels}"
                )
        except ImageError as error:
            image.error = str(error)
            return None
        except OSError as error:  # the bytes can't be had: so for this image, perhaps not the next
            image.error = f"unreadable: {type(error).__name__}: {error}"
            return None
        return _Encoded(image, content, header.backend, 3 * pixels)


class _Gathered:
    """Images on their way to the next batch."""

    def __init__(self, reader: ImageReaderStage, options: DecoderOptions) -> None:
        self._reader, self._options = reader, options
        self._encoded: list[_Encoded] = []
        self._failed: list[ImageObject] = []
        self._bytes = 0
        self._limit = reader.dali_batch_size if reader.decode else _HEADERS_PER_BATCH

    def has_room_for(self, encoded: _Encoded) -> bool:
        if not self._encoded or not self._reader.decode:
            return True
        return self._bytes + encoded.decoded_bytes <= self._reader.max_batch_bytes

    def add(self, image: ImageObject, encoded: _Encoded | None) -> None:
        if encoded is None:
            self._failed.append(image)
        else:
            self._encoded.append(encoded)
            self._bytes += encoded.decoded_bytes

    def full(self) -> bool:
        # Failures alone fill a batch too: a shard of nothing else must not pile up.
        return max(len(self._encoded), len(self._failed)) >= self._limit

    def nothing(self) -> bool:
        return not self._encoded and not self._failed

    def empty(self) -> ImageBatch:
        """Decode what was gathered, and begin anew."""
        batch = ImageBatch(failed=self._failed)
        if self._reader.decode:
            _decode_into(batch, self._encoded, self._options)
        else:
            batch.data = [encoded.image for encoded in self._encoded]
        self._encoded, self._failed, self._bytes = [], [], 0
        _treat_failures(batch, self._reader.on_error)
        return batch


def _decode_into(batch: ImageBatch, encoded: list[_Encoded], options: DecoderOptions) -> None:
    """Decode images and put each into ``batch.data`` or ``batch.failed``."""
    decoded = decode_images(
        [item.content for item in encoded],
        [item.image.image_path for item in encoded],
        [item.backend for item in encoded],
        options,
    )
    for item, result in zip(encoded, decoded, strict=True):
        batch_of = batch.failed if _complete(item.image, result) else batch.data
        batch_of.append(item.image)


def _complete(image: ImageObject, result: Decoded) -> bool:
    image.image_data, image.backend = result.pixels, result.backend
    image.error = str(result.error) if result.error else None
    if result.pixels is not None:  # a PNG's orientation can stand behind its pixels
        image.height, image.width = result.pixels.shape[:2]
    return image.error is not None


def _treat_failures(batch: ImageBatch, on_error: str) -> None:
    """Log the batch's failures; raise or leave them out where the user asked for it."""
    if not batch.failed:
        return
    first = batch.failed[0]
    if on_error == "raise":
        raise ReadError(f"{first.image_path}: {first.error}")
    for image in batch.failed[:_LOGGED_PER_BATCH]:
        logger.warning("%s: %s", image.image_path, image.error)
    if len(batch.failed) > _LOGGED_PER_BATCH:
        logger.warning("and %d more of %s", len(batch.failed) - _LOGGED_PER_BATCH, first.shard)
    if on_error == "skip":
        batch.skipped, batch.failed = len(batch.failed), []


def _describe(entry: ImageEntry, path: str, shard_id: str) -> ImageObject:
    """Make the record of an image before it is read."""
    name, start, offset, size, _ = entry.member
    image_id = f"{shard_id}/{name}"
    image = ImageObject(
        f"{path}/{name}", image_id, shard=path, key=entry.key, offset=offset, size=size
    )
    if entry.repeated:
        image.image_id = f"{image_id}@{start}"
        image.warning = f"duplicate name: an earlier member of the shard has the id {image_id}"
    return image


def _describe_damage(member: Member, path: str, shard_id: str) -> ImageObject:
    """Make the record of a place where the archive is damaged."""
    where = f"@{member.start}"
    return ImageObject(
        f"{path}/{where}",
        f"{shard_id}/{where}",
        shard=path,
        offset=member.start,
        error=member.problem,
    )


def _describe_lost(path: str, reason: str) -> ImageObject:
    """Make the record of a whole shard that can't be read."""
    return ImageObject(path, f"{make_shard_id(path)}/", shard=path, error=reason)


def describe_lost_shards(task: FileGroupTask, error: BaseException) -> list[ImageObject]:
    """Make a record for each shard of a task that could not be run."""
    paths = map(resolve_path, task.data)
    return [_describe_lost(path, f"killed its worker: {error}") for path in paths]


def _read_encoded(source: ByteSource, member: Member, whole: bool) -> tuple[Header, bytes]:
    """Read an image's header, and all its bytes if ``whole``."""
    if not whole:
        head = source.read_at(member.offset, min(member.size, HEAD_BYTES))
        try:
            return read_header(head), b""
        except ImageError:
            pass  # the header may lie further on
    content = source.read_at(member.offset, member.size)
    if len(content) < member.size:
        raise ImageError(f"truncated archive: {len(content)} of {member.size} bytes are there")
    return read_header(content), content


def _read_sidecars(source: ByteSource, entry: ImageEntry, image: ImageObject) -> None:
    """Read the sample's other members; one that can't be read is a warning."""
    for extension, member in entry.sidecars:
        try:
            if member.problem is not None:
                raise ValueError(member.problem)
            if member.size > MAX_SIDECAR_BYTES:
                raise ValueError(f"{member.size} bytes are more than {MAX_SIDECAR_BYTES}")
            content = source.read_at(member.offset, member.size)
            if len(content) < member.size:
                raise ValueError("truncated")
            image.metadata[extension] = parse_sidecar(extension, content)
        except (ValueError, OSError) as error:
            problem = f"sidecar {member.name}: {error}"
            image.warning = f"{image.warning}; {problem}" if image.warning else problem
            logger.warning("%s: %s", image.image_path, problem)
