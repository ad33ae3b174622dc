"""Gather images into batches of bounded size, begin to decode them, handle their failures."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from dask_imgread.decoding.contract import Decoded, DecoderOptions, Encoded, PendingDecoding
from dask_imgread.errors import ReadError
from dask_imgread.tasks import ImageBatch, ImageObject

logger = logging.getLogger("dask_imgread")

_BATCHES_AHEAD = {"gpu": 1, "cpu": 0}  # batches decoded while the user works on an earlier one
_LOGGED_PER_BATCH = 5  # failures; the batch itself has all of them
_HEADERS_PER_BATCH = 1000  # images of a batch, if only headers are read

BeginDecoding: TypeAlias = Callable[[Sequence[Encoded], DecoderOptions], PendingDecoding]


class BatchRules(NamedTuple):
    """When a reader's batch is full, and how its failures are handled."""

    batch_size: int
    max_batch_bytes: int
    on_error: str


class PendingBatch:
    """A batch whose images are being decoded.

    Parameters
    ----------
    images, failed
        The records of the images to be decoded, and of those that could not be read.
    decoding
        The decoding of ``images`` that was begun; None if only headers are read.
    on_error
        What to do with failures, as for the reader.
    """

    def __init__(
        self,
        images: list[ImageObject],
        failed: list[ImageObject],
        decoding: PendingDecoding | None,
        on_error: str,
    ) -> None:
        self._images, self._failed = images, failed
        self._decoding, self._on_error = decoding, on_error

    def result(self) -> ImageBatch:
        """Wait for the decoders, and return the batch."""
        batch = ImageBatch(failed=self._failed)
        if self._decoding is None:
            batch.data = self._images
        else:
            for image, decoded in zip(self._images, self._decoding.result(), strict=True):
                _add_pixels(image, decoded)
                (batch.data if image.error is None else batch.failed).append(image)
        _handle_failures(batch, self._on_error)
        return batch


class BatchBuilder:
    """Gathers images until a batch is full, then begins to decode it.

    Parameters
    ----------
    rules
        When a batch is full.
    decoder_options
        Passed to ``begin_decoding``; its device decides how many batches are decoded ahead.
    begin_decoding
        Begins to decode a batch; None if only headers are read.
    """

    def __init__(
        self,
        rules: BatchRules,
        decoder_options: DecoderOptions,
        begin_decoding: BeginDecoding | None,
    ) -> None:
        self._rules, self._decoder_options = rules, decoder_options
        self._begin_decoding = begin_decoding
        self._images: list[ImageObject] = []
        self._encoded: list[Encoded] = []
        self._failed: list[ImageObject] = []
        self._bytes = 0
        self._limit = rules.batch_size if begin_decoding is not None else _HEADERS_PER_BATCH
        self._pending: deque[PendingBatch] = deque()
        self._ahead = _BATCHES_AHEAD[decoder_options.device]

    def add(
        self, image: ImageObject, encoded: Encoded | None, more_bytes: int = 0
    ) -> Iterator[ImageBatch]:
        """Add an image, failed if ``encoded`` is None; yield the batches that are due.

        ``more_bytes`` are those that it needs besides its pixels.
        """
        size = more_bytes
        if encoded is not None and self._begin_decoding is not None:
            size += encoded.count_bytes(self._decoder_options)
        if (self._images or self._failed) and self._bytes + size > self._rules.max_batch_bytes:
            yield from self.flush(self._ahead)
        self._bytes += size
        if encoded is None:
            self._failed.append(image)
        else:
            self._images.append(image)
            self._encoded.append(encoded)
        # Failures alone can fill a batch: those of a shard without any good image take memory too.
        if max(len(self._images), len(self._failed)) >= self._limit:
            yield from self.flush(self._ahead)

    def flush(self, ahead: int = 0) -> Iterator[ImageBatch]:
        """Begin to decode what was gathered; yield all pending batches but the last ``ahead``."""
        if self._images or self._failed:
            decoding = None
            if self._begin_decoding is not None:
                decoding = self._begin_decoding(self._encoded, self._decoder_options)
            self._pending.append(
                PendingBatch(self._images, self._failed, decoding, self._rules.on_error)
            )
            self._images, self._encoded, self._failed, self._bytes = [], [], [], 0
        while len(self._pending) > ahead:
            yield self._pending.popleft().result()


def _add_pixels(image: ImageObject, decoded: Decoded) -> None:
    image.image_data, image.backend = decoded.pixels, decoded.backend
    image.error = decoded.error


def _handle_failures(batch: ImageBatch, on_error: str) -> None:
    """Log a batch's failures; with ``on_error`` "raise" or "skip", raise or remove them."""
    if not batch.failed:
        return
    first = batch.failed[0]
    if on_error == "raise":
        raise ReadError(f"{first.image_path}: {first.error}")
    for image in batch.failed[:_LOGGED_PER_BATCH]:
        logger.warning("%s: %s", image.image_path, image.error)
    if len(batch.failed) > _LOGGED_PER_BATCH:
        logger.warning("and %d more of %s", len(batch.failed) - _LOGGED_PER_BATCH, first.shard)
    if on_error == "skip":
        batch.skipped, batch.failed = len(batch.failed), []
