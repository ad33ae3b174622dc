"""Decode with NVIDIA DALI, on a GPU or on the CPU: the one file that runs it.

Written from the documentation and sources of NVIDIA DALI 2.4.0 (``Pipeline``,
``fn.external_source``, ``fn.decoders.image``).
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np

from dask_imgread.decoding import stderr
from dask_imgread.decoding.contract import DecoderOptions, Encoded, Pixels
from dask_imgread.decoding.header import Header

# Only errors: the level below prints a warning for a picture that decodes well.
os.environ.setdefault("DALI_NVIMGCODEC_LOG_LEVEL", "1")

_METADATA_BYTES = 1 << 17  # a JPEG's EXIF fills 64 KiB at most, and comes first


class Decoder:
    """One DALI pipeline: a batch of encoded images in, a batch of RGB arrays out."""

    def __init__(self, options: DecoderOptions) -> None:
        from nvidia.dali import Pipeline, fn, types

        gpu = options.device == "gpu"
        self._to_host = options.output == "host" or not gpu
        self._pipeline = Pipeline(
            batch_size=options.batch_size,
            num_threads=options.num_threads,
            device_id=0 if gpu else None,  # a Dask-CUDA worker sees its own GPU first
            prefetch_queue_depth=1,
        )
        with self._pipeline:
            encoded = fn.external_source(name="encoded", no_copy=True)
            images = fn.decoders.image(
                encoded,
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # as libjpeg, and so Pillow, does
            )
            if isinstance(options.resize, int):
                images = fn.resize(images, resize_shorter=float(options.resize))
            elif options.resize is not None:
                images = fn.resize(images, size=[float(side) for side in options.resize])
            self._pipeline.set_outputs(images)
        self._pipeline.build()
        self._buffers: list[np.ndarray] = []

    def start(self, contents: Sequence[bytes]) -> None:
        """Begin to decode a batch."""
        self._buffers = [np.frombuffer(content, np.uint8) for content in contents]
        self._pipeline.feed_input("encoded", self._buffers)
        self._pipeline.schedule_run()

    def finish(self) -> list[Pixels]:
        """Return the batch that was begun; the arrays are views, and stay as they are.

        Raises
        ------
        RuntimeError
            If any image of the batch can't be decoded. The decoder is of no use then.
        """
        (images,) = self._pipeline.outputs()
        self._buffers = []
        if self._to_host:
            return [np.asarray(image) for image in images.as_cpu()]  # one copy for the batch
        return list(images)


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
        What to decode, each of which `is_accepted`; not more than the options' batch size.
    options
        The decoder to use.
    """

    def __init__(self, images: Sequence[Encoded], options: DecoderOptions) -> None:
        self._images, self._options = images, options
        self._contents = [image.content for image in images]
        self._decoder: Decoder | None = None
        if images and options.device == "gpu":
            self._start()

    def _start(self) -> Decoder:
        self._decoder = decoder = DECODERS.take(self._options)
        decoder.start(self._contents)
        return decoder

    def result(self) -> list[Pixels | None]:
        """Return the pixels of each image in order; None for each that DALI refuses."""
        if not self._images:
            return []
        try:
            with stderr.catch([image.name for image in self._images]):
                decoder = self._decoder or self._start()
                pixels: list[Pixels | None] = [*decoder.finish()]
        except RuntimeError as error:
            if "CUDA" in str(error):
                raise
        else:
            DECODERS.give_back(self._options, decoder)
            return pixels
        if len(self._images) == 1:
            return [None]
        # One image has failed its batch, and the error does not say which: take each by itself.
        alone = (DaliDecoding([image], self._options).result() for image in self._images)
        return list(chain.from_iterable(alone))


def is_accepted(content: bytes, header: Header) -> bool:
    """Whether DALI decodes an image of a plain variant, and turns it as its metadata say."""
    if header.format == "jpeg" and b"tiff:Orientation" in content[:_METADATA_BYTES]:
        return False  # DALI looks into EXIF alone
    if header.format != "jpeg" and header.orientation != 1:
        return False  # DALI turns JPEG only
    return is_whole(content)


def is_whole(content: bytes) -> bool:
    """Whether a JPEG has its end mark, a PNG whole chunks up to its own, a WebP its length.

    One without makes its whole batch fail; and of a chunk that is longer than the file
    OpenCV, which decodes PNG in DALI, allocates and clears the length stated, up to 4 GiB.
    """
    if content[:2] == b"\xff\xd8":
        return content.endswith(b"\xff\xd9") or content.rfind(b"\xff\xd9", -4096) > 0
    if content[:4] == b"\x89PNG":
        chunk = 8
        while (end := chunk + 12 + int.from_bytes(content[chunk : chunk + 4], "big")) <= len(
            content
        ):
            if content[chunk + 4 : chunk + 8] == b"IEND":
                return True
            chunk = end
        return False
    if content[:4] == b"RIFF":
        return int.from_bytes(content[4:8], "little") + 8 <= len(content)
    return True
