"""Decode with NVIDIA DALI, on a GPU or on the CPU: the one file that runs it.

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
from dask_imgread.decoding.faults import read_fault, shorten

logger = logging.getLogger("dask_imgread")

DALI_ERRORS = (RuntimeError, MemoryError)
# Only errors: the level below prints a warning for a picture that decodes well.
_QUIET = {"DALI_NVIMGCODEC_LOG_LEVEL": "1"}
# From a size on DALI keeps host memory for later. Malloc would take fresh pages for each batch: in
# Dask's workers it gives back all that is freed.
_SETTINGS = {"cpu": _QUIET, "gpu": _QUIET | {"DALI_MALLOC_POOL_THRESHOLD": str(1 << 20)}}
_environment = threading.Lock()


class DeviceError(RuntimeError):
    """The GPU does not decode, whatever it is given."""


class Place(NamedTuple):
    """Where a pipeline runs, in DALI's words."""

    device_id: int | None
    decoder: str


# A Dask-CUDA worker sees its own GPU first.
PLACES = {"gpu": Place(0, "mixed"), "cpu": Place(None, "cpu")}


@contextmanager
def _keep_in_environment(settings: dict[str, str]) -> Iterator[None]:
    """Keep settings in the environment meanwhile, where DALI looks for them.

    It does when a pipeline is built: for the level each time, for the memory the first time.
    """
    with _environment:
        ours = {name: value for name, value in settings.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)


class Decoder:
    """One DALI pipeline: a batch of encoded images in, a batch of RGB arrays out.

    Raises
    ------
    RuntimeError
        If there is no such device, or it does not decode.
    """

    def __init__(self, options: DecoderOptions) -> None:
        from nvidia.dali import Pipeline, fn, types

        place = PLACES[options.device]
        self._to_host = options.output == "host" or options.device == "cpu"
        self._pipeline = Pipeline(
            batch_size=options.batch_size,
            num_threads=options.num_threads,
            device_id=place.device_id,
            prefetch_queue_depth=1,
        )
        with self._pipeline:
            encoded = fn.external_source(name="encoded", no_copy=True)
            images = fn.decoders.image(
                encoded,
                device=place.decoder,
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # as libjpeg, and so Pillow, does
                # Two readers of EXIF in it take one picture for two sizes, and write past its end.
                adjust_orientation=False,
            )
            if isinstance(options.resize, int):
                images = fn.resize(images, resize_shorter=float(options.resize))
            elif options.resize is not None:
                images = fn.resize(images, size=[float(side) for side in options.resize])
            # In the graph, since `as_cpu()` copies under the interpreter's lock.
            self._pipeline.set_outputs(images.cpu() if self._to_host else images)
        with _keep_in_environment(_SETTINGS[options.device]):
            self._pipeline.build()
        self._buffers: list[np.ndarray] = []
        if options.device == "gpu":
            self._begin_full()

    def _begin_full(self) -> None:
        """Decode a full batch of small pictures.

        The first batch sets, once for all, how many of a batch the hardware that decodes JPEG gets.
        And DALI may say of any picture that it can't be decoded when it is the GPU that fails:
        then these fail too.
        """
        try:
            self.start([_make_sound_jpeg()] * self._pipeline.max_batch_size)
            self.finish()
        except DALI_ERRORS as error:
            if read_fault(error).kind == "memory":
                raise
            raise DeviceError(f"the GPU does not decode: {shorten(error)}") from error

    def start(self, contents: Sequence[Content]) -> None:
        """Begin to decode a batch."""
        self._buffers = [np.frombuffer(content, np.uint8) for content in contents]
        self._pipeline.feed_input("encoded", self._buffers)
        self._pipeline.schedule_run()

    def finish(self) -> list[Pixels]:
        """Return the batch that was begun; the arrays are views, and stay as they are.

        Waits without the interpreter's lock.

        Raises
        ------
        RuntimeError
            If any image of the batch can't be decoded. The decoder is of no use then.
        """
        (images,) = self._pipeline.outputs()
        self._buffers = []
        return [np.asarray(image) for image in images] if self._to_host else list(images)


@functools.cache
def _make_sound_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


class DecoderPool:
    """Decoders that wait to be used again, at most ``limit`` of them. Thread-safe."""

    def __init__(self, limit: int = 16) -> None:
        self._limit = limit
        self._idle: dict[DecoderOptions, list[Decoder]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, options: DecoderOptions) -> Decoder:
        """Give a decoder to one thread."""
        with self._lock:
            idle = self._idle[options]
            decoder = idle.pop() if idle else None
        return decoder or Decoder(options)

    def give_back(self, options: DecoderOptions, decoder: Decoder) -> None:
        """Keep a decoder for later. One that has raised must not come back."""
        with self._lock:
            self._idle[options].append(decoder)
            while sum(map(len, self._idle.values())) > self._limit:
                oldest = next(option for option, waiting in self._idle.items() if waiting)
                self._idle[oldest].pop(0)

    def clear(self) -> None:
        """Release all decoders that wait."""
        with self._lock:
            self._idle.clear()


DECODERS = DecoderPool()


class DaliDecoding:
    """A batch that DALI decodes.

    On a GPU the work begins at once, so that it goes on while the batch before is in use; on
    the CPU, where nothing would be gained, when the result is asked for.

    Parameters
    ----------
    images
        What to decode, with sound headers; not more than the options' batch size.
    options
        The decoder to use.
    """

    def __init__(self, images: Sequence[Encoded], options: DecoderOptions) -> None:
        self._images, self._options = images, options
        self._begun: Decoder | None = None
        if images and options.device == "gpu":
            with suppress(*DALI_ERRORS), self._catch(images):  # sorted in the second attempt
                self._begun = self._start(images)

    def result(self) -> list[Pixels | None]:
        """Return the pixels of each image in order; None for each that DALI refuses.

        One image fails its batch, which is then decoded again without it. Where the error does not
        say which one it was, or the memory does not do for all, the two halves are.

        Raises
        ------
        RuntimeError
            If it is not an image that is at fault, but the GPU or its memory.
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
                parts += self._divide(part, error)
            else:
                for n, image in zip(part, decoded, strict=True):
                    pixels[n] = image
        return pixels

    def _divide(self, part: list[int], error: Exception) -> list[list[int]]:
        """Return what of a part of the batch, which has failed, is to be decoded again."""
        kind, sample = read_fault(error)
        if kind == "driver" or isinstance(error, DeviceError):
            raise error
        if kind == "memory":
            DECODERS.clear()
            if len(part) == 1 and self._options.device == "gpu":
                raise self._explain_no_memory(self._images[part[0]], error) from error
            logger.warning(
                "DALI has no memory for %d images at once: %s", len(part), shorten(error)
            )
        if kind == "picture" and sample is not None and sample < len(part):
            return [part[:sample] + part[sample + 1 :]]
        half = len(part) // 2
        return [part[half:], part[:half]] if half else []

    @staticmethod
    def _explain_no_memory(image: Encoded, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"{image.name}: no memory on the GPU for {image.header.width} x {image.header.height} "
            f"pixels beside what else is there: {shorten(error)}. Less is taken by fewer readers a "
            "GPU (a larger num_gpus_per_worker), a smaller dali_batch_size or max_batch_bytes"
        )

    def _decode(self, images: Sequence[Encoded]) -> list[Pixels]:
        """Decode images that are to succeed or fail together."""
        decoder, self._begun = self._begun, None
        with self._catch(images):
            decoder = decoder or self._start(images)
            pixels = decoder.finish()
        DECODERS.give_back(self._options, decoder)
        return pixels

    def _start(self, images: Sequence[Encoded]) -> Decoder:
        decoder = DECODERS.take(self._options)
        decoder.start([image.content for image in images])
        return decoder

    @staticmethod
    def _catch(images: Sequence[Encoded]) -> AbstractContextManager[None]:
        return stderr.catch([image.name for image in images])


def can_be_turned(header: Header, options: DecoderOptions) -> bool:
    """Say whether what DALI gives can be turned upright, which is done on the host."""
    if header.orientation == 1:
        return True
    on_device = options.device == "gpu" and options.output == "device"
    # The sides of a resized picture would have to change places.
    sideways = header.orientation >= 5 and isinstance(options.resize, tuple)
    return not on_device and not sideways
