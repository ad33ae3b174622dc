"""Decode batches of images: choose a decoder for each, and fall back to Pillow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np

from dask_imgread.buffers import BUFFERS
from dask_imgread.decoding.contract import (
    Content,
    Decoded,
    DecoderOptions,
    Encoded,
    Header,
    Pixels,
)
from dask_imgread.decoding.dali import DECODERS, DaliDecoding, can_apply_orientation
from dask_imgread.decoding.geometry import apply_orientation, resize
from dask_imgread.decoding.header import ImageError, to_image_error
from dask_imgread.decoding.libjpeg_turbo import decode_jpeg
from dask_imgread.decoding.parsers import is_intact, is_plain_jpeg
from dask_imgread.decoding.pillow import decode_with_pillow

_ALIGNMENT = 64  # bytes, a cache line
# WebP is decoded by libwebp whichever library is asked.
_FASTEST_ON_CPU = {"jpeg": "libjpeg-turbo", "png": "dali-cpu", "webp": "pillow"}


class Decoding:
    """A batch that is being decoded; on a GPU the work starts at once.

    JPEG is decoded by DALI on a GPU and by libjpeg-turbo on a CPU, PNG by DALI on the CPU in both
    cases. What they don't support, refuse or warn about is decoded by Pillow.

    Parameters
    ----------
    images
        The images to decode; at most ``decoder_options.batch_size``.
    decoder_options
        How to decode them.
    """

    def __init__(self, images: Sequence[Encoded], decoder_options: DecoderOptions) -> None:
        self._images, self._decoder_options = images, decoder_options
        self._by_dali: list[tuple[list[int], DaliDecoding]] = []
        for device in ("cpu", "gpu"):
            indices = [n for n, image in enumerate(images) if image.backend == f"dali-{device}"]
            dali = DaliDecoding(
                [images[n] for n in indices], decoder_options._replace(device=device)
            )
            self._by_dali.append((indices, dali))

    def result(self) -> list[Decoded]:
        """Return an entry for each image, in order: uint8 ``(H, W, 3)`` RGB pixels, or an error.

        All pixels on the host share one buffer. DALI never returns its own host memory to the
        system, so that it is held only until its pixels are copied.
        """
        images = self._images
        by_dali: dict[int, Pixels | None] = {}
        for indices, dali in self._by_dali:
            by_dali.update(zip(indices, dali.result(), strict=True))
        decoded = {
            n: Decoded(pixels, images[n].backend)
            for n, pixels in by_dali.items()
            if pixels is not None and not isinstance(pixels, np.ndarray)  # it is on the GPU
        }
        left = [n for n in range(len(images)) if n not in decoded]
        outputs = _allocate([images[n] for n in left], self._decoder_options)
        work = iter([(n, by_dali.get(n), out) for n, out in zip(left, outputs, strict=True)])
        threads = min(self._decoder_options.num_threads, len(left))
        if threads < 2:
            decoded |= self._finish_on_host(work)
        else:
            with ThreadPoolExecutor(threads) as pool:
                for done in pool.map(self._finish_on_host, [work] * threads):
                    decoded |= done
        return [decoded[n] for n in range(len(images))]

    def _finish_on_host(
        self, work: Iterator[tuple[int, Pixels | None, Pixels]]
    ) -> dict[int, Decoded]:
        """Finish images until the iterator, which all threads share, is exhausted.

        It yields an image's index, its pixels if DALI has decoded it, and the array to fill.
        """
        decoded = {}
        for n, pixels, out in work:
            image = self._images[n]
            if pixels is None:
                decoded[n] = _decode(image, self._decoder_options, out)
            else:
                upright = _copy_upright(pixels, out, image.header.orientation)
                decoded[n] = Decoded(upright, image.backend)
        return decoded


def release() -> None:
    """Release idle decoders and idle memory."""
    DECODERS.clear()
    BUFFERS.clear()


def choose_backend(content: Content, header: Header, decoder_options: DecoderOptions) -> str:
    """Return the decoder for an image: "libjpeg-turbo", "dali-gpu", "dali-cpu" or "pillow".

    Only plain JPEG is decoded on a GPU: PNG and WebP DALI would decode on the CPU, and copy to the
    GPU and back.
    """
    if not header.unambiguous:
        return "pillow"
    on_gpu = decoder_options.device == "gpu" and header.format == "jpeg" and is_plain_jpeg(content)
    device = "gpu" if on_gpu else "cpu"
    if device == "cpu" and decoder_options.decoder == "auto":
        backend = _FASTEST_ON_CPU[header.format]
    else:
        backend = f"dali-{device}"
    if backend.startswith("dali") and not (
        can_apply_orientation(header, decoder_options._replace(device=device))
        and is_intact(content, header.format)
    ):
        return "pillow"
    return backend


def _decode(image: Encoded, decoder_options: DecoderOptions, out: Pixels) -> Decoded:
    """Decode one image on the CPU, into ``out`` if the size fits."""
    if image.backend == "libjpeg-turbo":
        try:
            decode_jpeg(image.content, image.header, decoder_options, out)
        except (ValueError, MemoryError):
            pass
        else:
            return Decoded(out, image.backend)
    try:
        pixels = decode_with_pillow(image.content, image.header)
        if decoder_options.resize is not None:
            pixels = resize(pixels, decoder_options.choose_size(*pixels.shape[:2]))
        return Decoded(_copy_upright(pixels, out), "pillow")
    except ImageError as error:
        return Decoded(None, error=str(error))
    except MemoryError as error:
        return Decoded(None, error=str(to_image_error(error)))


def _copy_upright(pixels: Pixels, out: Pixels, orientation: int = 1) -> Pixels:
    """Return an upright copy of the pixels, in ``out`` if the size fits."""
    height, width, _ = pixels.shape
    shape = (height, width, 3) if orientation < 5 else (width, height, 3)
    if out.shape != shape:
        out = np.empty(shape, np.uint8)
    apply_orientation(pixels, orientation, out)
    return out


def _allocate(images: Sequence[Encoded], decoder_options: DecoderOptions) -> list[Pixels]:
    """Return an output array for each image, all in one buffer.

    If there is not enough memory for that, the arrays are empty. Each image is then decoded into
    memory of its own, and only those too large for it fail.
    """
    shapes = [(*decoder_options.choose_size(i.header.height, i.header.width), 3) for i in images]
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
