"""Decode batches of images: choose a decoder for each, and fall back to Pillow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dask_imgread.buffers import BLOCKS, BUFFERS, SharedBuffer
from dask_imgread.decoding.contract import (
    Content,
    Decoded,
    DecoderOptions,
    Encoded,
    Header,
    Pixels,
)
from dask_imgread.decoding.dali import DECODERS, DaliDecoding, can_apply_orientation
from dask_imgread.decoding.geometry import reduce, resize
from dask_imgread.decoding.header import ImageError, to_image_error
from dask_imgread.decoding.libjpeg_turbo import decode_jpeg
from dask_imgread.decoding.parsers import is_intact, is_plain_jpeg
from dask_imgread.decoding.pillow import decode_with_pillow
from dask_imgread.decoding.threads import map_in_threads

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

        All pixels on the host share one buffer.
        """
        shapes = [self._find_shape(image) for image in self._images]
        buffer = SharedBuffer(map(math.prod, shapes))
        decoded: dict[int, Decoded] = {}
        for indices, dali in self._by_dali:
            for n, pixels in zip(indices, dali.result(buffer), strict=True):
                if pixels is not None:
                    decoded[n] = Decoded(pixels, self._images[n].backend)
        left = [n for n in range(len(self._images)) if n not in decoded]
        work = iter([(n, buffer.take(*shapes[n])) for n in left])
        threads = min(self._decoder_options.num_threads, len(left))
        for done in map_in_threads(threads, self._decode_on_host, [work] * threads):
            decoded |= done
        return [decoded[n] for n in range(len(self._images))]

    def _find_shape(self, image: Encoded) -> tuple[int, int, int]:
        """Return the shape of an image's pixels on the host."""
        if image.backend == "dali-gpu" and self._decoder_options.on_device:
            return 0, 0, 3
        height, width = image.header.height, image.header.width
        return *self._decoder_options.choose_size(height, width), 3

    def _decode_on_host(self, work: Iterator[tuple[int, Pixels]]) -> dict[int, Decoded]:
        """Decode images until the iterator, which all threads share, is exhausted.

        It yields an image's index and the array to fill.
        """
        return {n: _decode(self._images[n], self._decoder_options, out) for n, out in work}


def release() -> None:
    """Release idle decoders and idle memory."""
    DECODERS.clear()
    BUFFERS.clear()
    BLOCKS.clear()


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
            size = pixels.shape[:2]
            pixels = resize(
                pixels,
                decoder_options.choose_size(*size),
                decoder_options.choose_box(*size),
                decoder_options.resample,
            )
        scale = decoder_options.choose_scale(*pixels.shape[:2])
        if scale > 1:
            pixels = reduce(pixels, scale)
        if out.shape != pixels.shape:
            out = np.empty(pixels.shape, np.uint8)
        np.copyto(out, pixels)
        return Decoded(out, "pillow")
    except ImageError as error:
        return Decoded(None, error=str(error))
    except MemoryError as error:
        return Decoded(None, error=str(to_image_error(error)))
