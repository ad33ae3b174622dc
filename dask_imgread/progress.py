"""Show on stderr how far a run has come."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class ProgressBar:
    """A bar: partitions done, images, failures, images per second, time left."""

    def __init__(self, partitions: int, *, hidden: bool = False) -> None:
        self._bar = tqdm(
            total=partitions, unit="partition", file=sys.stderr, dynamic_ncols=True, disable=hidden
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def update(self, done: int, images: int, failed: int) -> None:
        """Show that ``done`` partitions are done, with so many images so far."""
        if self._bar.disable:
            return
        rate = (images + failed) / max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(
            f"{images} images, {failed} failed, {rate:.0f} images/s", refresh=False
        )
        self._bar.update(done - self._bar.n)
