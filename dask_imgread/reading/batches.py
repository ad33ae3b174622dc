"""Images on their way into batches: gathered, cut to size, decoded, their failures treated."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from dask_imgread.decoding.contract import Decoded, DecoderOptions, Encoded, PendingDecoding
from dask_imgread.errors import ReadError
from dask_imgread.tasks import ImageBatch, ImageObject

logger = logging.getLogger("dask_imgread")

_BATCHES_AHEAD = {"gpu": 1, "cpu": 0}  # that are decoded while the one before is in use
_LOGGED_PER_BATCH = 5  # failures; all are in the batch itself
_HEADERS_PER_BATCH = 1000  # images of a batch from which no pixel is decoded


BeginDecoding: TypeAlias = Callable[[Sequence[Encoded], DecoderOptions], PendingDecoding]


class BatchRules(NamedTuple):
    """How a reader cuts its batches, and what it does with what fails."""

    batch_size: int
    max_batch_bytes: int
    on_error: str


class PendingBatch:
    """A batch whose images are being decoded.

    Parameters
    ----------
    images, failed
        The records of those that are, and of those that could not be read.
    decoding
        What decodes them; None if their headers are all that is wanted.
    on_error
        What becomes of failures.
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
                place = batch.failed if _complete(image, decoded) else batch.data
                place.append(image)
        _treat_failures(batch, self._on_error)
        return batch


class BatchGatherer:
    """Images on their way to the next batch.

    Parameters
    ----------
    rules
        When a batch is full.
    options
        The decoders' options.
    begin
        Begins to decode a batch; None if no pixels are wanted.
    """

    def __init__(
        self, rules: BatchRules, options: DecoderOptions, begin: BeginDecoding | None
    ) -> None:
        self._rules, self._options, self._begin = rules, options, begin
        self._images: list[ImageObject] = []
        self._encoded: list[Encoded] = []
        self._failed: list[ImageObject] = []
        self._bytes = 0
        self._limit = rules.batch_size if begin is not None else _HEADERS_PER_BATCH
        self._pending: deque[PendingBatch] = deque()
        self._ahead = _BATCHES_AHEAD[options.device]

    def add(
        self, image: ImageObject, encoded: Encoded | None, more_bytes: int = 0
    ) -> Iterator[ImageBatch]:
        """Take one more image, or a failed one; yield the batches that are to be done by now.

        ``more_bytes`` is what it takes besides its pixels.
        """
        size = more_bytes
        if encoded is not None and self._begin is not None:
            size += encoded.count_bytes(self._options)
        if (self._images or self._failed) and self._bytes + size > self._rules.max_batch_bytes:
            yield from self.empty(self._ahead)
        self._bytes += size
        if encoded is None:
            self._failed.append(image)
        else:
            self._images.append(image)
            self._encoded.append(encoded)
        # Failures alone fill a batch too: a shard of nothing else must not pile up.
        if max(len(self._images), len(self._failed)) >= self._limit:
            yield from self.empty(self._ahead)

    def empty(self, ahead: int = 0) -> Iterator[ImageBatch]:
        """Begin to decode what was gathered; yield all batches but the last ``ahead``."""
        if self._images or self._failed:
            decoding = self._begin(self._encoded, self._options) if self._begin else None
            self._pending.append(
                PendingBatch(self._images, self._failed, decoding, self._rules.on_error)
            )
            self._images, self._encoded, self._failed, self._bytes = [], [], [], 0
        while len(self._pending) > ahead:
            yield self._pending.popleft().result()


def _complete(image: ImageObject, decoded: Decoded) -> bool:
    image.image_data, image.backend = decoded.pixels, decoded.backend
    image.error = decoded.error
    return image.error is not None


def _treat_failures(batch: ImageBatch, on_error: str) -> None:
    """Log the batch's failures; raise or leave them out where the user asked for it."""
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
