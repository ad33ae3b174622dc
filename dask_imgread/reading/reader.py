"""ImageReaderStage: tar shards in, batches of decoded images out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask.tokenize import normalize_token

from dask_imgread.cluster import gpu
from dask_imgread.cluster.start import check_resources
from dask_imgread.cluster.worker import count_own_cores, release_with_worker
from dask_imgread.decoding.contract import DecoderOptions, Encoded
from dask_imgread.decoding.decode import Decoding, choose_backend, release
from dask_imgread.decoding.header import ImageError, check_size
from dask_imgread.decoding.isolation import DecoderProcess
from dask_imgread.errors import StorageError
from dask_imgread.reading.batches import BatchGatherer, BatchRules, BeginDecoding
from dask_imgread.reading.members import SidecarReader, is_apple_double, read_encoded
from dask_imgread.reading.options import ReaderOptions
from dask_imgread.reading.records import (
    UNREACHABLE,
    describe_damage,
    describe_image,
    describe_lost,
    explain_lost,
)
from dask_imgread.shards.samples import ShardIndex, index_members, index_stream
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import ByteSource, Member, NotTarError, walk_members
from dask_imgread.stage import ProcessingStage, Resources
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.tasks import FileGroupTask, ImageBatch, ImageObject

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger("dask_imgread")


@dataclass
class ImageReaderStage(ReaderOptions, ProcessingStage[FileGroupTask, ImageBatch]):
    """Read the images of WebDataset tar shards and decode them, on a GPU or on CPU cores.

    On a GPU NVIDIA DALI decodes JPEG; on a CPU libjpeg-turbo does. DALI decodes PNG, on the CPU.
    Pillow decodes everything else, and has the last word on what the others refuse.

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
        Threads that decode, at most. On a Dask worker a reader takes no more than the cores
        its thread has a right to: on the CPU one, beside a GPU its share of the machine.
    num_gpus_per_worker
        The share of a GPU that a reader holds while it runs; not used on a CPU.
    name
        The stage's name.
    device
        ``"auto"`` decodes on the worker's GPU where there is one and on its CPU cores
        where there is none; ``"gpu"`` and ``"cpu"`` insist. A worker that declares the
        resource ``GPU`` but has none raises RuntimeError.
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
        alone does. On a GPU two batches exist at a time: one is decoded while the one
        before is in use. With ``resize`` it is what comes out that counts where pictures are
        decoded and resized one by one, as JPEG is on a CPU; or their encoded bytes, if more.
    resize
        Resize each image after decoding, on the same device: an int is the length of the
        shorter side in pixels, a tuple the exact (height, width). ``width`` and ``height``
        of an ImageObject stay those of the source.
    decoder
        ``"auto"`` takes on a CPU what is fastest there. ``"dali"`` insists on DALI's pipeline,
        as on a GPU, for all that it decodes.
    scaled_decoding
        On a CPU, whether ``resize`` may begin with a JPEG decoded at 1/2, 1/4 or 1/8 of its
        size, the smallest that leaves 5/3 of what is wanted. A picture of 12 megapixels takes a
        third of the time; its pixels differ a little from those resized from full size
        (docs/decoding.md says by how much). False decodes at full size.
    isolate
        Decode each image by itself in a child process, so that one that kills its decoder
        costs only itself, and is recorded as ``kills its decoder``. Slower, and for shards
        that have killed workers; jobs, ``verify_shards`` and ``map_windowed`` do so by
        themselves. Arrays are then the host's, whatever ``output`` says.
    relative_to
        A folder or URL below which the shards lie. Their ids are then made from their paths below
        it, so that they stay the same where the set is copied, linked or uploaded. A task
        that was made with its own keeps that.
    read_ahead
        Bytes of a remote shard that are fetched, or of a compressed one that are inflated, while
        what came before is decoded, at most. All readers of a process together fetch no more than
        512 MiB in advance. A plain local shard is read in place.
    output
        ``"host"`` gives NumPy arrays. ``"device"`` leaves what a GPU decoded on it, as
        objects with ``__dlpack__`` and ``__cuda_array_interface__`` (``cupy.asarray`` and
        ``torch.from_dlpack`` take them without a copy): for use in ``map_images``, since
        they can't travel. Wait for your kernels before you let go of an array: its memory is
        DALI's again at once. What is not decoded on the GPU stays NumPy.

    Raises
    ------
    ValueError
        If an option has a value that it can't have.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> shards = make_shards("shards", images_per_shard=3)
    >>> batch, = ImageReaderStage(device="cpu").process(FileGroupTask(data=shards[:1]))
    >>> [image.image_data.shape for image in batch.data]
    [(96, 128, 3), (96, 128, 3), (96, 128, 3)]
    """

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
        with self._hold_share():
            yield from self.stream(task)

    def stream(self, task: FileGroupTask) -> Iterator[ImageBatch]:
        """Yield the batches of ``process`` one at a time, keeping none."""
        if not task.data:
            raise ValueError(f"No tar file paths in task {task.task_id!r}: its data is empty")
        with self._hold_share():
            yield from self._stream(task)

    def isolated(self) -> ImageReaderStage:
        """Return the same reader with ``isolate``: for a task whose worker died."""
        return self.with_options(isolate=True)

    def with_options(self, **options: Any) -> ImageReaderStage:
        """Return the same reader, of a subclass too, with other options."""
        reader = copy(self)  # a subclass may be made with other arguments than its options
        for name, value in options.items():
            setattr(reader, name, value)
        return reader

    def __dask_tokenize__(self) -> object:
        """Name all that a reader holds: of a dataclass Dask looks at nothing but its fields."""
        return normalize_token((type(self), self.__getstate__()))

    def _hold_share(self) -> AbstractContextManager[None]:
        return gpu.hold_share(self.num_gpus_per_worker) if self._wants_gpu() else nullcontext()

    def _wants_gpu(self) -> bool:
        return self.decode and self.device != "cpu"

    def _stream(self, task: FileGroupTask) -> Iterator[ImageBatch]:
        options = self._choose_decoder()
        shards = task.name_shards(self.relative_to)
        batches = 0
        images = failures = 0
        with self._open_decoder() as begin:
            for path, shard_id in shards.items():
                for batch in self._read_shard(path, shard_id, task, options, begin):
                    batch.dataset_name = task.dataset_name
                    batch.task_id = f"{task.task_id}_{batches}"
                    batches += 1
                    images += batch.num_items
                    failures += len(batch.failed) + batch.skipped
                    yield batch
                    del batch  # not to be held while the next one is decoded
        if self.verbose:
            logger.info(
                "%s: task %s: %d images, %d failed", self.name, task.task_id, images, failures
            )

    @contextmanager
    def _open_decoder(self) -> Iterator[BeginDecoding | None]:
        """Give what begins to decode a batch; None if no pixels are wanted."""
        if not self.decode:
            yield None
        elif self.isolate:
            with DecoderProcess() as process:
                yield process.begin
        else:
            release_with_worker("dask-imgread-decoders", release)
            yield Decoding

    def _choose_decoder(self) -> DecoderOptions:
        """Look at where this runs: which device there is, and how many cores are ours."""
        device = gpu.choose_device(self.device) if self.decode else "cpu"
        gpus = gpu.count_gpus() if device == "gpu" else 0
        threads = min(self.num_threads, count_own_cores(gpus, self.num_gpus_per_worker))
        return DecoderOptions(
            device,
            threads,
            self.dali_batch_size,
            self.resize,
            self.output,
            self.decoder,
            self.scaled_decoding,
        )

    def _read_shard(
        self,
        path: str,
        shard_id: str,
        task: FileGroupTask,
        options: DecoderOptions,
        begin: BeginDecoding | None,
    ) -> Iterator[ImageBatch]:
        """Yield one shard's batches; what is broken in it ends in them too."""
        rules = BatchRules(self.dali_batch_size, self.max_batch_bytes, self.on_error)
        gathered = BatchGatherer(rules, options, begin)
        shown = redact_url(path)
        try:
            with self._open(path, task) as source:
                sidecars = SidecarReader(source)
                for index in self._index(source, task):
                    for note in index.notes.values():
                        logger.warning("%s: %s", shown, note)
                    for entry in index.images:
                        if is_apple_double(source, entry.member):
                            continue
                        image = describe_image(entry, shown, shard_id)
                        more = sidecars.attach(entry.sidecars, image) if self.sidecars else 0
                        encoded = self._load(source, entry.member, image, options)
                        yield from gathered.add(image, encoded, more)
                    for member in index.broken:
                        yield from gathered.add(describe_damage(member, shown, shard_id), None)
        except (OSError, NotTarError) as error:
            reason = hide_secrets(explain_lost(error, path), task.storage_options)
            yield from gathered.add(describe_lost(path, shard_id, task.start, reason), None)
        yield from gathered.empty()

    def _open(self, path: str, task: FileGroupTask) -> AbstractContextManager[ByteSource]:
        return open_shard(
            path,
            task.storage_options,
            start=0 if task.index_whole_shard else task.start,
            plain=task.byte_range is not None,  # a compressed shard has no parts
            size=task.find_size(path),
            read_ahead=self.read_ahead,
            skipping=not self.decode,
        )

    def _index(self, source: ByteSource, task: FileGroupTask) -> Iterator[ShardIndex]:
        """Walk the headers of the task's part of a shard; yield its samples."""
        start, stop = task.byte_range or (0, None)
        if task.index_whole_shard:
            index = index_members(walk_members(source))
            last = stop if stop is not None else 1 << 63
            index.images = [e for e in index.images if start <= e.member.start < last]
            index.broken = [m for m in index.broken if start <= m.start < last]
            yield index
        elif source.streamed:
            source.keep(start)
            yield from index_stream(walk_members(source, start, stop), source.keep)
        else:
            yield index_members(walk_members(source, start, stop))

    def _load(
        self, source: ByteSource, member: Member, image: ImageObject, options: DecoderOptions
    ) -> Encoded | None:
        """Read an image's bytes and header; None, and ``image.error``, if it can't be."""
        try:
            if member.problem is not None:
                raise ImageError(member.problem)
            header, content = read_encoded(source, member, self.decode)
            image.format = header.format
            image.width, image.height, image.channels = header.width, header.height, header.channels
            check_size(content, header, self.max_pixels, options if self.decode else None)
        except ImageError as error:
            image.error = str(error)
            return None
        except OSError as error:  # the bytes can't be had: so for this image, perhaps not the next
            image.error = hide_secrets(
                f"{UNREACHABLE}: {error}"
                if isinstance(error, StorageError | PermissionError)
                else f"unreadable: {type(error).__name__}: {error}"
            )
            return None
        backend = choose_backend(content, header, options) if self.decode else ""
        return Encoded(image.image_path, content, header, backend)
