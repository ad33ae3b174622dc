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
from dask_imgread.decoding.contract import Content, DecoderOptions, Encoded, Pixels
from dask_imgread.decoding.header import Header

# Only errors: the level below prints a warning for a picture that decodes well.
os.environ.setdefault("DALI_NVIMGCODEC_LOG_LEVEL", "1")


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
                # Two readers of EXIF in it take one picture for two sizes, and write past its end.
                adjust_orientation=False,
            )
            if isinstance(options.resize, int):
                images = fn.resize(images, resize_shorter=float(options.resize))
            elif options.resize is not None:
                images = fn.resize(images, size=[float(side) for side in options.resize])
            self._pipeline.set_outputs(images)
        self._pipeline.build()
        self._buffers: list[np.ndarray] = []

    def start(self, contents: Sequence[Content]) -> None:
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
        What to decode, with sound headers; not more than the options' batch size.
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


def can_be_turned(header: Header, options: DecoderOptions) -> bool:
    """Say whether what DALI gives can be turned upright, which is done on the host."""
    if header.orientation == 1:
        return True
    on_device = options.device == "gpu" and options.output == "device"
    # The sides of a resized picture would have to change places.
    sideways = header.orientation >= 5 and isinstance(options.resize, tuple)
    return not on_device and not sideways
