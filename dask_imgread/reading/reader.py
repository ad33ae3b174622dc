"""ImageReaderStage: tar shards in, batches of decoded images out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dask.tokenize import normalize_token

from dask_imgread.cluster import gpu
from dask_imgread.cluster.start import check_resources
from dask_imgread.cluster.worker import count_own_cores, release_with_worker
from dask_imgread.decoding.contract import DecoderOptions
from dask_imgread.decoding.decode import Decoding, release
from dask_imgread.decoding.isolation import DecoderProcess
from dask_imgread.hints import explain_keywords, suggest
from dask_imgread.reading.batches import BatchBuilder, BatchRules, BeginDecoding
from dask_imgread.reading.options import ReaderOptions
from dask_imgread.reading.shard_reader import ShardQueue, ShardReader
from dask_imgread.shards.ahead import SHARDS_AT_ONCE
from dask_imgread.shards.frames import group_by_shard
from dask_imgread.stage import ProcessingStage, Resources
from dask_imgread.storage.filesystems import is_local
from dask_imgread.storage.redaction import hide_secrets
from dask_imgread.tasks import FileGroupTask, ImageBatch, adopt_task
from dask_imgread.texts import render_table, shorten

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger("dask_imgread")

_SHOWN = 150  # characters of the options, in a line


@explain_keywords
@dataclass(repr=False)
class ImageReaderStage(ReaderOptions, ProcessingStage[FileGroupTask, ImageBatch]):
    """Read the images of WebDataset tar shards and decode them, on a GPU or on CPU cores.

    JPEG is decoded by NVIDIA DALI on a GPU, by libjpeg-turbo on a CPU; PNG by DALI on the CPU.
    Pillow decodes all other formats, and every image that another decoder rejects.

    Until it runs, a reader consists of plain values: it is made on the client, which may have no
    GPU, and chooses device and decoders on the worker. Several threads may use one reader at once.

    Parameters
    ----------
    dali_batch_size
        Maximum number of images decoded together: the size of a batch.
    verbose
        Log a line for each task, at level INFO of the logger ``dask_imgread``.
    num_threads
        Maximum number of decoding threads. On a Dask worker a reader uses no more than its
        thread's share of the cores: one on a CPU; with a GPU, in proportion to its GPU share.
    num_gpus_per_worker
        The share of a GPU that a reader holds while it runs; not used on a CPU.
    name
        The stage's name.
    device
        ``"auto"`` decodes on the worker's GPU if it has one, else on its CPU cores; ``"gpu"``
        and ``"cpu"`` force either. A worker that declares the resource ``GPU`` but has none
        raises RuntimeError.
    decode
        If False, only headers are read, and ``image_data`` is None.
    sidecars
        Whether to read the samples' other members into ``ImageObject.metadata``, or the extensions
        of those to read, such as ``("json", "txt")``.
    checksum
        Whether to compute ``ImageObject.sha256``. This reads all bytes of each image, even where
        only its header is needed otherwise.
    md5
        Whether to compute ``ImageObject.md5``, as ``checksum``: for lists of MD5 digests.
    on_error
        What to do with an image that can't be read: ``"record"`` puts it, with the
        reason, into ``ImageBatch.failed``; ``"skip"`` only counts it; ``"raise"`` raises.
    max_pixels
        Images with more pixels fail before anything is decoded; None for no limit.
    max_batch_bytes
        Maximum size of a batch's decoded images and sidecars, unless one image alone is larger.
        On a GPU two batches exist at a time: one is decoded while the one before is in use. With
        ``resize`` or ``min_side``, an image that is decoded and resized by itself, as JPEG is on a
        CPU, counts with its resized or its encoded size, whichever is larger.
    resize
        Resize each image after decoding, on the same device: an int is the length of the
        shorter side in pixels, a tuple the exact (height, width), unless ``fit`` says otherwise.
        ``width`` and ``height`` of an ImageObject stay those of the source.
    fit
        How ``resize`` is meant. ``"shorter"``: the length of the shorter side; the shape of the
        image stays. ``"exact"``: height and width, equal if an int is given; the image is
        stretched. ``"crop"``: the same size, but the image is scaled until it covers that, and
        what sticks out on two sides is cut off: half on each, to fractions of a pixel, as
        ``ImageOps.fit`` of Pillow does. (``Resize`` and ``CenterCrop`` of torchvision round to
        whole pixels.) ``"auto"`` is ``"shorter"`` for an int and ``"exact"`` for a tuple.
    resample
        The filter of ``resize``, as Pillow calls it: ``"bilinear"``, ``"bicubic"`` or
        ``"lanczos"``, antialiased where an image shrinks.
    output
        ``"host"`` gives NumPy arrays. ``"device"`` leaves images decoded by a GPU in its memory,
        as objects with ``__dlpack__`` and ``__cuda_array_interface__`` (``cupy.asarray`` and
        ``torch.from_dlpack`` take them without a copy): for use in ``map_images``, since they
        can't be pickled. Wait for your kernels before you release an array: DALI reuses its
        memory at once. Images not decoded on the GPU are NumPy arrays.
    decoder
        On a CPU, ``"auto"`` uses the fastest decoder of each format; ``"dali"`` uses DALI for
        all formats that it decodes, as on a GPU.
    scaled_decoding
        On a CPU, whether ``resize`` may begin with a JPEG decoded at 1/2, 1/4 or 1/8 of its
        size, the smallest that is at least 5/3 of the target. A 12-megapixel image takes a third
        of the time; its pixels differ slightly from those resized from full size
        (docs/decoding.md has the numbers). False decodes at full size.
    min_side
        Reduce each image to 1/8, 1/4 or 1/2 of its size, the smallest of which the shorter side is
        at least so long; leave an image alone if none is. On a CPU a JPEG is decoded at that scale,
        and not resampled: this is the fastest way to pixels that need not be of one size, as for
        ``fingerprint``. Not together with ``resize``.
    isolate
        Decode each image by itself in a child process, so that an image that crashes its decoder
        costs only itself, and is recorded as ``kills its decoder``. Slower; meant for shards
        that have killed workers. Jobs, ``verify_shards`` and ``map_windowed`` turn it on for
        these by themselves. Arrays are then on the host, whatever ``output`` is.
    relative_to
        A folder or URL that contains the shards. Ids are then made from paths relative to it, so
        that they stay the same when the dataset is copied, linked or uploaded. A task's own
        ``relative_to`` takes precedence.
    read_ahead
        Maximum number of bytes that are fetched (of a remote shard) or decompressed (of a
        compressed one) in advance. All readers of a process together fetch at most 512 MiB in
        advance. An uncompressed local shard is read in place.

    Raises
    ------
    ValueError
        If an option's value is not allowed.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> shards = make_shards("shards", images_per_shard=3)
    >>> batch, = ImageReaderStage(device="cpu").process(FileGroupTask(data=shards[:1]))
    >>> [image.image_data.shape for image in batch.data]
    [(96, 128, 3), (96, 128, 3), (96, 128, 3)]
    >>> ImageReaderStage(device="cpu", resize=224)
    ImageReaderStage(device='cpu', resize=224)
    >>> batch, = ImageReaderStage(device="cpu", resize=64, fit="crop").process(
    ...     FileGroupTask(data=shards[:1])
    ... )
    >>> batch.stack().shape
    (3, 64, 64, 3)
    """

    @property
    def resources(self) -> Resources:
        """The GPU share that the reader would hold in this process; 0 if it would use no GPU."""
        used = self._wants_gpu() and (self.device == "gpu" or gpu.count_gpus() > 0)
        return Resources(gpus=self.num_gpus_per_worker if used else 0.0)

    def outputs(self) -> tuple[list[str], list[str]]:
        """Return what the reader provides.

        Returns
        -------
        tuple of list of str
            The names of the attributes that a batch has, and those that its images have.
        """
        return ["data"], ["image_data", "image_path", "image_id"]

    def annotations(self, client: Client) -> dict[str, Any]:
        """Return the keyword arguments that make the scheduler reserve a GPU share per task.

        Parameters
        ----------
        client
            A client of the cluster that will run the reader.

        Returns
        -------
        dict
            ``{"resources": {"GPU": num_gpus_per_worker}}`` if the workers declare ``GPU``, else
            ``{}``; for ``client.map``, ``client.submit``, ``client.compute`` and
            ``dask.annotate``.

        Raises
        ------
        RuntimeError
            If no worker declares a share as large: Dask would let the tasks wait forever,
            without an error. With ``device="auto"`` the workers may declare none.
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
            The shards to read: a FileGroupTask, this package's or NeMo Curator's.

        Returns
        -------
        list of ImageBatch
            All batches, in the shards' order. ``stream`` yields them one at a time, for less
            memory.

        Raises
        ------
        ValueError
            If the task has no shards.
        ReadError
            If an image can't be read, under ``on_error="raise"``.
        """
        return list(self.read(task))

    def read(self, task: FileGroupTask) -> Iterator[ImageBatch]:
        """Yield the batches of ``stream`` while holding a share of the worker's GPU.

        The whole package reads with this method, so that a subclass's ``stream`` is used
        everywhere, and runs within its GPU share.

        Parameters
        ----------
        task
            The shards to read.

        Yields
        ------
        ImageBatch
            As ``stream`` yields them.
        """
        with self._hold_share():
            yield from self.stream(task)

    def stream(self, task: FileGroupTask) -> Iterator[ImageBatch]:
        """Yield the batches of ``process`` one at a time, and keep none of them.

        Parameters
        ----------
        task
            The shards to read.

        Yields
        ------
        ImageBatch
            In the shards' order.

        Raises
        ------
        ValueError
            If the task has no shards.
        ReadError
            If an image can't be read, under ``on_error="raise"``.
        """
        task = adopt_task(task)
        if not task.data:
            raise ValueError(f"No tar file paths in task {task.task_id!r}: its data is empty")
        with self._hold_share():
            yield from self._stream(task)

    def isolated(self) -> ImageReaderStage:
        """Return a copy for a task whose worker died.

        Returns
        -------
        ImageReaderStage
            It has ``isolate=True``.
        """
        return self.with_options(isolate=True)

    def with_options(self, **options: Any) -> ImageReaderStage:
        """Return a copy with some options changed.

        Parameters
        ----------
        **options
            The options to change.

        Returns
        -------
        ImageReaderStage
            Of the same class as this one.

        Raises
        ------
        TypeError
            If there is no such option.
        ValueError
            If an option can't have the value.
        """
        reader = copy(self)  # not a call of the class: a subclass's arguments may be different
        names = [field.name for field in fields(self)]
        for name, value in options.items():
            if name not in names and name not in vars(self):
                raise TypeError(
                    f"{type(self).__name__} has no option {name!r}{suggest(name, names)}"
                )
            setattr(reader, name, value)
        ReaderOptions.__post_init__(reader)
        return reader

    def __dask_tokenize__(self) -> object:
        """Return all of the reader's state: by default Dask uses only a dataclass's fields."""
        return normalize_token((type(self), self.__getstate__()))

    def __repr__(self) -> str:
        """Return the options that differ from their defaults, without secrets."""
        changed, _ = self._describe_options()
        options = ", ".join(f"{name}={value}" for name, value in changed)
        return f"{type(self).__name__}({shorten(options, _SHOWN)})"

    def _repr_html_(self) -> str:
        changed, others = self._describe_options()
        return (
            render_table(changed, type(self).__name__)
            + f"<details><summary>{len(others)} options with their defaults</summary>"
            + f"{render_table(others)}</details>"
        )

    def _describe_options(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Return as texts the options that differ from their defaults, and the others."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: list[tuple[str, str]] = []
        others: list[tuple[str, str]] = []
        for field in fields(self):
            value = options[field.name]
            shown = field.name, hide_secrets(repr(value), options)
            (others if value == field.default else changed).append(shown)
        return changed, others

    def _hold_share(self) -> AbstractContextManager[None]:
        return gpu.hold_share(self.num_gpus_per_worker) if self._wants_gpu() else nullcontext()

    def _wants_gpu(self) -> bool:
        return self.decode and self.device != "cpu"

    def _stream(self, task: FileGroupTask) -> Iterator[ImageBatch]:
        decoder_options = self._choose_decoder()
        rules = BatchRules(self.dali_batch_size, self.max_batch_bytes, self.on_error)
        batches = images = failures = 0
        with (
            self._open_decoder() as begin_decoding,
            closing(self._list_shards(task, decoder_options)) as shards,
        ):
            for shard in shards:
                builder = BatchBuilder(rules, decoder_options, begin_decoding)
                for batch in _fill_batches(shard, shards, builder):
                    batch.dataset_name = task.dataset_name
                    batch.task_id = f"{task.task_id}_{batches}"
                    batch._metadata = task._metadata.copy()
                    batch._stage_perf = task._stage_perf.copy()
                    batch.image_size = decoder_options.target if self.decode else None
                    batches += 1
                    images += batch.num_items
                    failures += len(batch.failed) + batch.skipped
                    yield batch
                    del batch  # or it would stay in memory while the next one is decoded
        if self.verbose:
            logger.info(
                "%s: task %s: %d images, %d failed", self.name, task.task_id, images, failures
            )

    def _list_shards(self, task: FileGroupTask, decoder_options: DecoderOptions) -> ShardQueue:
        shards = task.name_shards(self.relative_to)
        rows = dict.fromkeys(shards) if task.rows is None else group_by_shard(task.rows)
        at_once, read_ahead = SHARDS_AT_ONCE, self.read_ahead
        if self.decode and task.rows is None:
            at_once = 2  # of the next one, the beginning is enough to go on without a pause
        else:
            remote = sum(not is_local(path) for path in shards)
            read_ahead //= min(at_once, max(1, remote))
        readers = (
            ShardReader(self, decoder_options, task, path, shard_id, rows[path], read_ahead)
            for path, shard_id in shards.items()
        )
        return ShardQueue(readers, at_once)

    @contextmanager
    def _open_decoder(self) -> Iterator[BeginDecoding | None]:
        """Open a decoder; yield its function that begins a batch, None if only headers are read."""
        if not self.decode:
            yield None
        elif self.isolate:
            with DecoderProcess() as process:
                yield process.begin
        else:
            release_with_worker("dask-imgread-decoders", release)
            yield Decoding

    def _choose_decoder(self) -> DecoderOptions:
        """Choose the device and the number of threads for the process that this runs in."""
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
            self.min_side,
            self.fit,
            self.resample,
        )


def _fill_batches(
    shard: ShardReader, shards: ShardQueue, builder: BatchBuilder
) -> Iterator[ImageBatch]:
    """Yield one shard's batches."""
    for found in shard.read(shards.begin_next):
        yield from builder.add(*found)
        del found
    yield from builder.flush()
