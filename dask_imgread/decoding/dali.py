"""Decode with NVIDIA DALI, on a GPU or on the CPU: the only file that runs it.

Written from the documentation and sources of NVIDIA DALI 2.4.0 (``Pipeline``,
``fn.external_source``, ``fn.decoders.image``).
"""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dask_imgread.buffers import SharedBuffer
from dask_imgread.decoding import stderr
from dask_imgread.decoding.contract import SCALES, Content, DecoderOptions, Encoded, Header, Pixels
from dask_imgread.decoding.faults import classify_error, extract_message
from dask_imgread.decoding.geometry import apply_orientation
from dask_imgread.decoding.threads import map_in_threads

logger = logging.getLogger("dask_imgread")

DALI_ERRORS = (RuntimeError, MemoryError)
# Errors only: at the next level, a warning is printed for images that decode well.
_LOG_LEVEL = {"DALI_NVIMGCODEC_LOG_LEVEL": "1"}
# DALI keeps host memory for reuse, but only allocations above a threshold. Below it malloc would
# take fresh pages for each batch, since in Dask's workers it returns freed memory at once.
_ENVIRONMENT = {"cpu": _LOG_LEVEL, "gpu": _LOG_LEVEL | {"DALI_MALLOC_POOL_THRESHOLD": str(1 << 20)}}
_environment_lock = threading.Lock()
_MIN_COPY_BYTES = 16 << 20  # of a thread that copies: 2 ms, where it takes 0.1 ms to start


class DeviceError(RuntimeError):
    """The GPU fails to decode even images known to be valid."""


class DaliDevice(NamedTuple):
    """What DALI calls the device of a pipeline, and that of its image decoder."""

    device_id: int | None
    decoder: str


# A Dask-CUDA worker sees its own GPU first.
DALI_DEVICES = {"gpu": DaliDevice(0, "mixed"), "cpu": DaliDevice(None, "cpu")}
# What DALI calls the filters. It has no others of Pillow's, but NEAREST.
_FILTERS = {"bilinear": "INTERP_LINEAR", "bicubic": "INTERP_CUBIC", "lanczos": "INTERP_LANCZOS3"}


@contextmanager
def _set_environment(settings: dict[str, str]) -> Iterator[None]:
    """Set environment variables in the ``with`` block, unless they are set already.

    DALI reads them while it builds a pipeline: the log level each time, the threshold once.
    """
    with _environment_lock:
        added = {name: value for name, value in settings.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)


class Decoder:
    """One DALI pipeline: a batch of encoded images in, a batch of RGB arrays out.

    Raises
    ------
    RuntimeError
        If there is no such device, or it fails to decode.
    """

    def __init__(self, decoder_options: DecoderOptions) -> None:
        from nvidia.dali import Pipeline, fn, types

        device = DALI_DEVICES[decoder_options.device]
        self._pipeline = Pipeline(
            batch_size=decoder_options.batch_size,
            num_threads=decoder_options.num_threads,
            device_id=device.device_id,
            prefetch_queue_depth=1,
        )
        with self._pipeline:
            encoded = fn.external_source(name="encoded", no_copy=True)
            images = fn.decoders.image(
                encoded,
                device=device.decoder,
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # as in libjpeg, and so in Pillow
                # DALI has two EXIF parsers. Where they disagree, it writes past the image's end.
                adjust_orientation=False,
            )
            target = decoder_options.target
            options = {"interp_type": getattr(types, _FILTERS[decoder_options.resample])}
            if target is not None and decoder_options.fit == "crop":
                options["roi_start"], options["roi_end"] = _find_middle(images, target)
            if target is not None:
                images = fn.resize(images, size=[float(side) for side in target], **options)
            elif isinstance(decoder_options.resize, int):
                shorter = float(decoder_options.resize)
                images = fn.resize(images, resize_shorter=shorter, **options)
            elif decoder_options.min_side is not None:
                images = fn.resize(images, size=_reduce_sides(images, decoder_options.min_side))
            # In the graph, since `as_cpu()` would hold the GIL while it copies.
            self._pipeline.set_outputs(images if decoder_options.on_device else images.cpu())
        with _set_environment(_ENVIRONMENT[decoder_options.device]):
            self._pipeline.build()
        self._buffers: list[np.ndarray] = []
        if decoder_options.device == "gpu":
            self._warm_up()

    def _warm_up(self) -> None:
        """Decode a full batch of small images.

        The size of the first batch fixes how many images of a batch DALI gives to the GPU's JPEG
        engines. It is also a test: when the GPU fails, DALI may blame an image, but then these
        valid ones fail, too.
        """
        try:
            self.start([_make_warmup_jpeg()] * self._pipeline.max_batch_size)
            self.finish()
        except DALI_ERRORS as error:
            if classify_error(error).kind == "memory":
                raise
            raise DeviceError(f"the GPU does not decode: {extract_message(error)}") from error

    def start(self, contents: Sequence[Content]) -> None:
        """Start to decode a batch."""
        self._buffers = [np.frombuffer(content, np.uint8) for content in contents]
        self._pipeline.feed_input("encoded", self._buffers)
        self._pipeline.schedule_run()

    def finish(self) -> Any:
        """Wait for the batch that was started, without holding the GIL.

        Returns a ``TensorList`` in DALI's memory, which stays valid after later batches.

        Raises
        ------
        RuntimeError
            If any image of the batch can't be decoded. The decoder must not be used again.
        """
        (images,) = self._pipeline.outputs()
        self._buffers = []
        return images


def _find_middle(images: Any, target: tuple[int, int]) -> tuple[Any, Any]:
    """Return the nodes of a pipeline with the corners of ``DecoderOptions.choose_box``."""
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali_math

    sides = fn.cast(images.shape()[:2], dtype=types.FLOAT)  # on the host
    scale = dali_math.min(sides[0] / target[0], sides[1] / target[1])
    taken = scale * types.Constant([float(side) for side in target])
    return (sides - taken) / 2, (sides + taken) / 2


def _reduce_sides(images: Any, min_side: int) -> Any:
    """Return the node of a pipeline with the sizes that ``DecoderOptions.choose_size`` chooses."""
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali_math

    sides = images.shape()[:2]  # on the host
    short = dali_math.min(sides[0], sides[1])
    scale = 1
    for larger in SCALES:  # 1 + 4 + 2 + 1 is 8, 1 + 2 + 1 is 4
        scale = scale + (short >= larger * min_side) * (larger // 2)
    return fn.cast((sides + scale - 1) // scale, dtype=types.FLOAT)


@functools.cache
def _make_warmup_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


class DecoderPool:
    """At most ``limit`` idle decoders, to be used again. Thread-safe."""

    def __init__(self, limit: int = 16) -> None:
        self._limit = limit
        self._idle: dict[DecoderOptions, list[Decoder]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, decoder_options: DecoderOptions) -> Decoder:
        """Return an idle decoder, or a new one, for the caller alone."""
        with self._lock:
            idle = self._idle[decoder_options]
            decoder = idle.pop() if idle else None
        return decoder or Decoder(decoder_options)

    def give_back(self, decoder_options: DecoderOptions, decoder: Decoder) -> None:
        """Keep a decoder for later; it must not have raised an error."""
        with self._lock:
            self._idle[decoder_options].append(decoder)
            while sum(map(len, self._idle.values())) > self._limit:
                oldest = next(key for key, decoders in self._idle.items() if decoders)
                self._idle[oldest].pop(0)

    def clear(self) -> None:
        """Release all idle decoders."""
        with self._lock:
            self._idle.clear()


DECODERS = DecoderPool()


class DaliDecoding:
    """A batch that is being decoded by DALI.

    On a GPU the work starts at once, and overlaps with the use of the previous batch. On the CPU,
    where nothing would be gained by that, it starts in ``result()``.

    Parameters
    ----------
    images
        The images to decode, with valid headers; at most ``decoder_options.batch_size``.
    decoder_options
        The decoder's options.
    """

    def __init__(self, images: Sequence[Encoded], decoder_options: DecoderOptions) -> None:
        self._images, self._decoder_options = images, decoder_options
        self._started: Decoder | None = None
        if images and decoder_options.device == "gpu":
            # An error is dealt with in result(), which tries again.
            with suppress(*DALI_ERRORS), self._capture_stderr(images):
                self._started = self._start(images)

    def result(self, buffer: SharedBuffer) -> list[Pixels | None]:
        """Return the pixels of each image, in order; None for those that DALI refuses.

        Those on the host are copied to ``buffer``: DALI never returns its own host memory to the
        system, so that it is not kept.

        If one image fails its batch, the batch is decoded again without it. If the error doesn't
        say which image it was, or memory is short, the batch is split in half.

        Raises
        ------
        RuntimeError
            If the GPU or its memory is at fault, not an image.
        """
        pixels: list[Pixels | None] = [None] * len(self._images)
        parts = [list(range(len(self._images)))]
        while parts:
            part = parts.pop()
            if not part:
                continue
            images = [self._images[n] for n in part]
            try:
                decoded = self._decode(images)
            except DALI_ERRORS as error:
                parts += self._split_failed(part, error)
                continue
            if not self._decoder_options.on_device:
                orientations = [image.header.orientation for image in images]
                threads = self._decoder_options.num_threads
                decoded = _copy_upright(decoded, orientations, buffer, threads)
            for n, image in zip(part, decoded, strict=True):
                pixels[n] = image
        return pixels

    def _split_failed(self, part: list[int], error: Exception) -> list[list[int]]:
        """Return the parts in which a failed part of the batch is to be decoded again."""
        kind, sample = classify_error(error)
        if kind == "driver" or isinstance(error, DeviceError):
            raise error
        if kind == "memory":
            DECODERS.clear()
            if len(part) == 1 and self._decoder_options.device == "gpu":
                raise self._make_memory_error(self._images[part[0]], error) from error
            logger.warning(
                "DALI has no memory for %d images at once: %s", len(part), extract_message(error)
            )
        if kind == "image" and sample is not None and sample < len(part):
            return [part[:sample] + part[sample + 1 :]]
        half = len(part) // 2
        return [part[half:], part[:half]] if half else []

    @staticmethod
    def _make_memory_error(image: Encoded, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"{image.name}: no memory on the GPU for {image.header.width} x {image.header.height} "
            f"pixels, besides what is in use: {extract_message(error)}. To use less, run fewer "
            "readers on a GPU (a larger num_gpus_per_worker), or reduce dali_batch_size or "
            "max_batch_bytes"
        )

    def _decode(self, images: Sequence[Encoded]) -> Any:
        """Decode images in one run of the pipeline, which succeeds or fails as a whole."""
        decoder, self._started = self._started, None
        with self._capture_stderr(images):
            decoder = decoder or self._start(images)
            decoded = decoder.finish()
        DECODERS.give_back(self._decoder_options, decoder)
        return decoded

    def _start(self, images: Sequence[Encoded]) -> Decoder:
        decoder = DECODERS.take(self._decoder_options)
        decoder.start([image.content for image in images])
        return decoder

    @staticmethod
    def _capture_stderr(images: Sequence[Encoded]) -> AbstractContextManager[None]:
        return stderr.capture([image.name for image in images])


def _copy_upright(
    images: Any, orientations: Sequence[int], buffer: SharedBuffer, threads: int
) -> list[Pixels]:
    """Return upright copies of a ``TensorList`` on the host.

    All images are copied together, and those to be turned once more: a copy for each would do
    little but pass on the GIL.
    """
    shapes = images.shape()
    size = sum(map(math.prod, shapes))
    stored, memory = _view_flat(images, size), buffer.take(size)
    if not memory.size:
        memory = np.empty(size, np.uint8)
    pieces = min(threads, 1 + size // _MIN_COPY_BYTES)
    map_in_threads(
        pieces, np.copyto, np.array_split(memory, pieces), np.array_split(stored, pieces)
    )
    upright = [
        shape if orientation < 5 else (shape[1], shape[0], 3)
        for shape, orientation in zip(shapes, orientations, strict=True)
    ]
    pixels = _cut(memory, upright)
    turns = zip(_cut(stored, shapes), orientations, pixels, strict=True)
    turned = [turn for turn in turns if turn[1] != 1]
    map_in_threads(min(threads, len(turned)), lambda turn: apply_orientation(*turn), turned)
    return pixels


def _view_flat(images: Any, size: int) -> Pixels:
    """Return all bytes of a ``TensorList``: not copied if they lie back to back, as usual."""
    try:
        return np.asarray(images.as_reshaped_tensor([size]))
    except RuntimeError:
        return np.concatenate([np.asarray(image).reshape(-1) for image in images])


def _cut(memory: Pixels, shapes: Sequence[tuple[int, ...]]) -> list[Pixels]:
    """Return the arrays that lie back to back in memory."""
    ends = [0, *accumulate(map(math.prod, shapes))]
    return [
        memory[start:end].reshape(shape)
        for (start, end), shape in zip(pairwise(ends), shapes, strict=True)
    ]


def can_apply_orientation(header: Header, decoder_options: DecoderOptions) -> bool:
    """Return whether DALI's output can be turned upright, which is done on the host."""
    if header.orientation == 1:
        return True
    # DALI resizes before that: height and width would come out swapped.
    sideways = header.orientation >= 5 and decoder_options.target is not None
    return not decoder_options.on_device and not sideways
