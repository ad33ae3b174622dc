"""Decode batches of encoded images: which decoder gets each, and who has the last word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np

from dask_imgread.decoding.buffers import BUFFERS
from dask_imgread.decoding.contract import Content, Decoded, DecoderOptions, Encoded, Header, Pixels
from dask_imgread.decoding.dali import DECODERS, DaliDecoding, can_be_turned
from dask_imgread.decoding.geometry import resize, turn
from dask_imgread.decoding.header import ImageError, explain_error
from dask_imgread.decoding.libjpeg_turbo import decode_jpeg
from dask_imgread.decoding.parsers import is_whole
from dask_imgread.decoding.pillow import decode_with_pillow

_ALIGNMENT = 64  # bytes, a cache line
# A WebP is libwebp's to decode, whoever is asked.
_FASTEST_ON_CPU = {"jpeg": "libjpeg-turbo", "png": "dali-cpu", "webp": "pillow"}


class Decoding:
    """A batch on its way through the decoders, begun when it is made.

    On a GPU DALI decodes JPEG. On a CPU libjpeg-turbo does; PNG is decoded by DALI, there too. What
    they don't know, refuse or warn of is Pillow's to decide.

    Parameters
    ----------
    images
        What to decode; not more than the options' batch size.
    options
        What to decode it with.
    """

    def __init__(self, images: Sequence[Encoded], options: DecoderOptions) -> None:
        self._images, self._options = images, options
        self._by_dali: list[tuple[list[int], DaliDecoding]] = []
        for device in ("cpu", "gpu"):
            numbers = [n for n, image in enumerate(images) if image.backend == f"dali-{device}"]
            dali = DaliDecoding([images[n] for n in numbers], options._replace(device=device))
            self._by_dali.append((numbers, dali))

    def result(self) -> list[Decoded]:
        """Return what became of each image, in order: uint8 ``(H, W, 3)`` RGB, or an error.

        All that is in the host's memory lies side by side in one buffer. DALI's own memory is held
        no longer than it takes to copy: it is never given back to the system.
        """
        images, options = self._images, self._options
        by_dali: dict[int, Pixels | None] = {}
        for numbers, dali in self._by_dali:
            by_dali.update(zip(numbers, dali.result(), strict=True))
        done = {
            n: Decoded(pixels, images[n].backend)
            for n, pixels in by_dali.items()
            if pixels is not None and not isinstance(pixels, np.ndarray)  # it is on the GPU
        }
        left = [n for n in range(len(images)) if n not in done]
        places = dict(zip(left, _allocate([images[n] for n in left], options), strict=True))

        def decode(n: int) -> None:
            pixels = by_dali.get(n)
            if pixels is None:
                done[n] = _decode(images[n], options, places[n])
            else:
                kept = _keep(pixels, places[n], images[n].header.orientation)
                done[n] = Decoded(kept, images[n].backend)

        _run_in_threads(decode, left, options.num_threads)
        return [done[n] for n in range(len(images))]


def release() -> None:
    """Give back the decoders and the memory that wait to be used again."""
    DECODERS.clear()
    BUFFERS.clear()


def choose_backend(content: Content, header: Header, options: DecoderOptions) -> str:
    """Return what is to decode an image: "libjpeg-turbo", "dali-gpu", "dali-cpu" or "pillow".

    Only JPEG is decoded on a GPU: PNG and WebP DALI would decode on the CPU, and copy to the GPU
    and back.
    """
    if not header.plain:
        return "pillow"
    device = "gpu" if options.device == "gpu" and header.format == "jpeg" else "cpu"
    if device == "cpu" and options.decoder == "auto":
        backend = _FASTEST_ON_CPU[header.format]
    else:
        backend = f"dali-{device}"
    if backend.startswith("dali") and not (
        can_be_turned(header, options._replace(device=device)) and is_whole(content, header.format)
    ):
        return "pillow"
    return backend


def _decode(image: Encoded, options: DecoderOptions, out: Pixels) -> Decoded:
    """Decode one image on the CPU, into ``out`` if its header has told its size."""
    if image.backend == "libjpeg-turbo":
        try:
            decode_jpeg(image.content, image.header, options, out)
        except (ValueError, MemoryError):
            pass
        else:
            return Decoded(out, image.backend)
    try:
        pixels = decode_with_pillow(image.content, image.header)
        if options.resize is not None:
            pixels = resize(pixels, options.choose_size(*pixels.shape[:2]))
        return Decoded(_keep(pixels, out), "pillow")
    except ImageError as error:
        return Decoded(None, error=str(error))
    except MemoryError as error:
        return Decoded(None, error=str(explain_error(error)))


def _keep(pixels: Pixels, out: Pixels, orientation: int = 1) -> Pixels:
    """Return a copy of pixels, turned upright: ``out``, if they fit."""
    height, width, _ = pixels.shape
    shape = (height, width, 3) if orientation < 5 else (width, height, 3)
    if out.shape != shape:
        out = np.empty(shape, np.uint8)
    turn(pixels, orientation, out)
    return out


def _allocate(images: Sequence[Encoded], options: DecoderOptions) -> list[Pixels]:
    """Return an array for each image, all of them in one piece of memory.

    Where there is not so much memory they are of no size: then each is decoded into its own, and
    only those that are too large for that are lost.
    """
    shapes = [(*options.choose_size(i.header.height, i.header.width), 3) for i in images]
    sizes = [height * width * 3 for height, width, _ in shapes]
    starts = [0, *accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    try:
        memory = BUFFERS.take(starts[-1])
    except (MemoryError, OverflowError):
        return [np.empty((0, 0, 3), np.uint8) for _ in images]
    return [
        memory[start : start + size].reshape(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]


def _run_in_threads(work: Callable[[int], None], numbers: Sequence[int], threads: int) -> None:
    """Call ``work`` with each number, in so many threads."""
    waiting = iter(numbers)

    def run(_: int = 0) -> None:
        for number in waiting:  # shared: each thread takes the next one
            work(number)

    if threads == 1 or len(numbers) < 2:
        run()
        return
    with ThreadPoolExecutor(min(threads, len(numbers))) as pool:
        list(pool.map(run, range(threads)))
