"""Decode with NVIDIA DALI, on a GPU or on the CPU: the only file that runs it.

Written from the documentation and sources of NVIDIA DALI 2.4.0 (``Pipeline``,
``fn.external_source``, ``fn.decoders.image``).
"""

from __future__ import annotations

import functools
import io
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple

import numpy as np
from PIL import Image

from dask_imgread.decoding import stderr
from dask_imgread.decoding.contract import Content, DecoderOptions, Encoded, Header, Pixels
from dask_imgread.decoding.faults import classify_error, extract_message

logger = logging.getLogger("dask_imgread")

DALI_ERRORS = (RuntimeError, MemoryError)
# Errors only: at the next level, a warning is printed for images that decode well.
_LOG_LEVEL = {"DALI_NVIMGCODEC_LOG_LEVEL": "1"}
# DALI keeps host memory for reuse, but only allocations above a threshold. Below it malloc would
# take fresh pages for each batch, since in Dask's workers it returns freed memory at once.
_ENVIRONMENT = {"cpu": _LOG_LEVEL, "gpu": _LOG_LEVEL | {"DALI_MALLOC_POOL_THRESHOLD": str(1 << 20)}}
_environment_lock = threading.Lock()


class DeviceError(RuntimeError):
    """The GPU fails to decode even images known to be valid."""


class DaliDevice(NamedTuple):
    """What DALI calls the device of a pipeline, and that of its image decoder."""

    device_id: int | None
    decoder: str


# A Dask-CUDA worker sees its own GPU first.
DALI_DEVICES = {"gpu": DaliDevice(0, "mixed"), "cpu": DaliDevice(None, "cpu")}


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
        self._to_host = decoder_options.output == "host" or decoder_options.device == "cpu"
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
            if isinstance(decoder_options.resize, int):
                images = fn.resize(images, resize_shorter=float(decoder_options.resize))
            elif decoder_options.resize is not None:
                images = fn.resize(images, size=[float(side) for side in decoder_options.resize])
            # In the graph, since `as_cpu()` would hold the GIL while it copies.
            self._pipeline.set_outputs(images.cpu() if self._to_host else images)
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

    def finish(self) -> list[Pixels]:
        """Wait for the batch that was started, without holding the GIL, and return its pixels.

        The arrays are views of DALI's memory, and stay valid after later batches.

        Raises
        ------
        RuntimeError
            If any image of the batch can't be decoded. The decoder must not be used again.
        """
        (images,) = self._pipeline.outputs()
        self._buffers = []
        return [np.asarray(image) for image in images] if self._to_host else list(images)


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

    def result(self) -> list[Pixels | None]:
        """Return the pixels of each image, in order; None for those that DALI refuses.

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
            try:
                decoded = self._decode([self._images[n] for n in part])
            except DALI_ERRORS as error:
                parts += self._split_failed(part, error)
            else:
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

    def _decode(self, images: Sequence[Encoded]) -> list[Pixels]:
        """Decode images in one run of the pipeline, which succeeds or fails as a whole."""
        decoder, self._started = self._started, None
        with self._capture_stderr(images):
            decoder = decoder or self._start(images)
            pixels = decoder.finish()
        DECODERS.give_back(self._decoder_options, decoder)
        return pixels

    def _start(self, images: Sequence[Encoded]) -> Decoder:
        decoder = DECODERS.take(self._decoder_options)
        decoder.start([image.content for image in images])
        return decoder

    @staticmethod
    def _capture_stderr(images: Sequence[Encoded]) -> AbstractContextManager[None]:
        return stderr.capture([image.name for image in images])


def can_apply_orientation(header: Header, decoder_options: DecoderOptions) -> bool:
    """Return whether DALI's output can be turned upright, which is done on the host."""
    if header.orientation == 1:
        return True
    on_device = decoder_options.device == "gpu" and decoder_options.output == "device"
    # DALI resizes before that: height and width would come out swapped.
    sideways = header.orientation >= 5 and isinstance(decoder_options.resize, tuple)
    return not on_device and not sideways
