"""Images on their way into batches: gathered, cut to size, decoded, their failures treated."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dask_imgread.decode import Decoded, DecoderOptions, start_decoding
from dask_imgread.tasks import ImageBatch, ImageObject

logger = logging.getLogger("dask_imgread")

_BATCHES_AHEAD = {"gpu": 1, "cpu": 0}  # that are decoded while the one before is in use
_LOGGED_PER_BATCH = 5  # failures; all are in the batch itself
_HEADERS_PER_BATCH = 1000  # images of a batch from which no pixel is decoded


class ReadError(RuntimeError):
    """An image could not be read, under ``on_error="raise"``. Names shard and member."""


class EncodedImage(NamedTuple):
    """An image that is to be decoded: its bytes, and the record that it will complete."""

    image: ImageObject
    content: bytes
    backend: str
    decoded_bytes: int


class BatchRules(NamedTuple):
    """How a reader cuts its batches, and what it does with what fails."""

    batch_size: int
    max_batch_bytes: int
    decode: bool
    on_error: str


class BatchGatherer:
    """Images on their way to the next batch."""

    def __init__(self, rules: BatchRules, options: DecoderOptions) -> None:
        self._rules, self._options = rules, options
        self._encoded: list[EncodedImage] = []
        self._failed: list[ImageObject] = []
        self._bytes = 0
        self._limit = rules.batch_size if rules.decode else _HEADERS_PER_BATCH
        self._begun: deque[Callable[[], ImageBatch]] = deque()
        self._ahead = _BATCHES_AHEAD[options.device]

    def add(self, image: ImageObject, encoded: EncodedImage | None) -> Iterator[ImageBatch]:
        """Take one more image, or a failed one; yield the batches that are to be done by now."""
        if encoded is None:
            self._failed.append(image)
        else:
            self._bytes += encoded.decoded_bytes
            if self._encoded and self._rules.decode and self._bytes > self._rules.max_batch_bytes:
                yield from self.empty(self._ahead)
                self._bytes = encoded.decoded_bytes
            self._encoded.append(encoded)
        # Failures alone fill a batch too: a shard of nothing else must not pile up.
        if max(len(self._encoded), len(self._failed)) >= self._limit:
            yield from self.empty(self._ahead)

    def empty(self, ahead: int = 0) -> Iterator[ImageBatch]:
        """Begin to decode what was gathered; yield all batches but the last ``ahead``."""
        if self._encoded or self._failed:
            self._begun.append(self._begin())
            self._encoded, self._failed, self._bytes = [], [], 0
        while len(self._begun) > ahead:
            yield self._begun.popleft()()

    def _begin(self) -> Callable[[], ImageBatch]:
        encoded, failed, on_error = self._encoded, self._failed, self._rules.on_error
        finish_decoding = None
        if self._rules.decode:
            finish_decoding = start_decoding(
                [item.content for item in encoded],
                [item.image.image_path for item in encoded],
                [item.backend for item in encoded],
                self._options,
            )

        def finish() -> ImageBatch:
            batch = ImageBatch(failed=failed)
            if finish_decoding is None:
                batch.data = [item.image for item in encoded]
            else:
                for item, result in zip(encoded, finish_decoding(), strict=True):
                    place = batch.failed if _complete(item.image, result) else batch.data
                    place.append(item.image)
            _treat_failures(batch, on_error)
            return batch

        return finish


def _complete(image: ImageObject, result: Decoded) -> bool:
    image.image_data, image.backend = result.pixels, result.backend
    image.error = str(result.error) if result.error else None
    if result.size is not None:  # a PNG's orientation can stand behind its pixels
        image.width, image.height = result.size
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
