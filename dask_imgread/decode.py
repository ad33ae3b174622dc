"""Decode encoded images to RGB arrays: the one file that runs DALI.

Written from the documentation and sources of NVIDIA DALI 2.4.0 (``Pipeline``,
``fn.external_source``, ``fn.decoders.image``).
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import ImageOps
from PIL.Image import Resampling, fromarray

from dask_imgread import chatter
from dask_imgread.header import ImageError, explain_error, open_with_pillow
from dask_imgread.worker import release_with_worker

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

    from dask_imgread.tasks import Pixels

# Only errors: the level below prints a warning for a picture that decodes well.
os.environ.setdefault("DALI_NVIMGCODEC_LOG_LEVEL", "1")


_SPARE_BYTES, _SPARE_BATCHES = 32 << 20, 4  # free memory that a process may keep
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BITS_PER_SAMPLE = 258  # TIFF's tag


class DecoderOptions(NamedTuple):
    """What a decoder is made for: decoders with equal options can stand in for each other."""

    device: str  # "cpu" or "gpu"
    num_threads: int
    batch_size: int
    resize: int | tuple[int, int] | None = None  # shorter side, or (height, width)
    output: str = "host"  # or "device": the arrays stay where they were decoded


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


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep the memory of one batch for the next one.

    Dask's nanny starts workers with ``MALLOC_TRIM_THRESHOLD_=65536``, with which glibc gives
    each decoded batch back to the system at once, and gets it again page by page: that costs
    as much as a third of the decoding (mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD).
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another libc may have none
        if mallopt is not None:
            mallopt(_M_TRIM_THRESHOLD, 128 << 20)
            mallopt(_M_MMAP_THRESHOLD, 4 << 20)  # larger pictures go back at once


class _MallocState(ctypes.Structure):
    """What glibc's mallinfo2(3) returns."""

    # Ten sizes; the ninth is that of all free blocks.
    _fields_ = tuple((f"size_{n}", ctypes.c_size_t) for n in range(10))


def trim_spare_memory(batch_bytes: int) -> None:
    """Give back to the system what malloc keeps but does not use again.

    Some of the time each freed picture is left as a hole a little too small for the next one
    (aligned allocations ask for more than they leave, seen in glibc 2.36), and a worker grows
    by every batch that it decodes. Where all is well a few batches' memory is free at most.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):  # another libc, or one before glibc 2.33
        return
    libc.mallinfo2.restype = _MallocState
    if libc.mallinfo2().size_8 > _SPARE_BYTES + _SPARE_BATCHES * batch_bytes:
        libc.malloc_trim(0)


class DecoderPool:
    """Decoders that wait to be used again, at most ``limit`` of them. Thread-safe."""

    def __init__(self, limit: int = 16) -> None:
        self._limit = limit
        self._idle: dict[DecoderOptions, list[Decoder]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, options: DecoderOptions) -> Decoder:
        """Give a decoder to one thread."""
        release_with_worker("dask-imgread-decoders", self.clear)
        keep_freed_memory()
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


class Decoded(NamedTuple):
    """The pixels of one image and what decoded it, or the error."""

    pixels: Pixels | None
    backend: str | None
    error: ImageError | None
    size: tuple[int, int] | None = None  # upright width and height, where Pillow found them


def start_decoding(
    contents: Sequence[bytes],
    names: Sequence[str],
    backends: Sequence[str],
    options: DecoderOptions,
) -> Callable[[], list[Decoded]]:
    """Begin to decode each image with its backend; with Pillow what DALI refuses.

    On a GPU the decoding begins at once, so that it goes on while the batch before is in
    use; on the CPU, where nothing would be gained, when the result is asked for.

    Parameters
    ----------
    contents
        Encoded images.
    names
        A name for each, for log records.
    backends
        ``"dali"`` or ``"pillow"`` for each, as its header says.
    options
        The decoder to use; ``len(contents)`` must not exceed its batch size.

    Returns
    -------
    callable
        Returns a list of Decoded, one for each image in order: uint8 ``(H, W, 3)`` RGB,
        or an error.
    """
    for_dali = [
        i for i, content in enumerate(contents) if backends[i] == "dali" and is_whole(content)
    ]
    chosen = [contents[i] for i in for_dali]
    finish_dali = _start_dali(chosen, [names[i] for i in for_dali], options)

    def finish() -> list[Decoded]:
        decoded = dict(zip(for_dali, finish_dali(), strict=True))
        return [
            decoded.get(i) or decode_with_pillow(content, names[i], options.resize)
            for i, content in enumerate(contents)
        ]

    return finish


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


def _start_dali(
    contents: list[bytes], names: list[str], options: DecoderOptions
) -> Callable[[], list[Decoded | None]]:
    """Begin to decode with DALI; the callable returns None for each image that it refuses."""
    if not contents:
        return list
    decoder = DECODERS.take(options)
    if options.device == "gpu":
        decoder.start(contents)

    def finish() -> list[Decoded | None]:
        try:
            with chatter.catch(names):
                if options.device != "gpu":
                    decoder.start(contents)
                decoded = [Decoded(pixels, backend, None) for pixels in decoder.finish()]
        except RuntimeError as error:
            if "CUDA" in str(error):
                raise
        else:
            DECODERS.give_back(options, decoder)
            if options.output == "host":
                trim_spare_memory(sum(getattr(item.pixels, "nbytes", 0) for item in decoded))
            return list(decoded)
        if len(contents) == 1:
            return [None]
        # One image has failed its batch, and the error does not say which: take each by itself.
        pairs = zip(contents, names, strict=True)
        return [_start_dali([content], [name], options)()[0] for content, name in pairs]

    backend = f"dali-{options.device}"
    return finish


def decode_with_pillow(
    content: bytes, name: str, resize: int | tuple[int, int] | None = None
) -> Decoded:
    """Decode one image on the CPU with Pillow: the first frame, upright, as RGB."""
    try:
        with chatter.catch([name]), open_with_pillow(content) as image:
            pixels = _to_rgb(image)
    except ImageError as error:
        return Decoded(None, None, error)
    except Exception as error:  # Pillow's decoders let through whatever they run into
        return Decoded(None, None, explain_error(error))
    height, width = pixels.shape[:2]
    if resize is not None:
        pixels = _resize(pixels, resize)
    return Decoded(pixels, "pillow", None, (width, height))


def _resize(pixels: Pixels, resize: int | tuple[int, int]) -> Pixels:
    """Resize as DALI does: linear, and smoothed where it shrinks."""
    height, width = pixels.shape[:2]
    if isinstance(resize, int):
        scale = resize / min(height, width)
        resize = max(1, round(height * scale)), max(1, round(width * scale))
    resized = fromarray(pixels).resize(resize[::-1], Resampling.BILINEAR)
    return np.asarray(resized)


def _to_rgb(image: ImageFile) -> Pixels:
    """Convert to 8-bit RGB. Of 16 bits the upper 8 are kept; Pillow would clip some of them."""
    if image.format == "PPM" and image.tile and image.tile[0][3] == ("RGB", 0xFFFF):
        return _read_wide_ppm(image)
    upright = ImageOps.exif_transpose(image)
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    if wide:
        bits: int = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        grey = np.asarray(upright) >> (bits - 8)
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    rgb: Pixels = np.array(upright.convert("RGB"))
    return rgb


def _read_wide_ppm(image: ImageFile) -> Pixels:
    """Read a binary colour PPM of 16 bits, the one source of which Pillow rounds the upper 8."""
    assert image.fp is not None  # it is open: nothing was loaded yet
    image.fp.seek(image.tile[0][2])
    content = image.fp.read(image.width * image.height * 6)
    if len(content) < image.width * image.height * 6:
        raise OSError(f"image file is truncated ({len(content)} bytes of pixels)")
    wide = np.frombuffer(content, ">u2").reshape(image.height, image.width, 3)
    return (wide >> 8).astype(np.uint8)
