"""Show on stderr how far a run has come: a bar on a terminal, lines in a log."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any, Literal, Self

from tqdm import tqdm

logger = logging.getLogger("dask_imgread")

_LINE_EVERY = 10.0  # seconds
_LINE = (
    "%(partitions_done)d of %(partitions)d partitions, %(images)d images, %(failed)d failed, "
    "%(images_per_second).0f images/s"
)
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class Progress:
    """What shows how far a run has come; a context manager.

    Parameters
    ----------
    partitions, done
        How many there are, and how many were done before this run.
    """

    def __init__(self, partitions: int, done: int = 0) -> None:
        self._partitions, self._before = partitions, done
        self._start = time.monotonic()

    def update(self, done: int, images: int, failed: int) -> None:
        """Show that ``done`` partitions are done, with so many images so far, this run's."""

    def tell_rate(self, images: int, failed: int) -> float:
        """Return the images done in a second, those that failed too, since the run began."""
        return (images + failed) / max(time.monotonic() - self._start, 1e-9)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def choose_progress(partitions: int, done: int = 0, *, hidden: bool = False) -> Progress:
    """Return a bar where stderr is a terminal and the log is not JSON, else lines in the log.

    Parameters
    ----------
    partitions, done
        How many there are, and how many were done before this run.
    hidden
        Show nothing.
    """
    if hidden:
        return Progress(partitions, done)
    if sys.stderr.isatty() and not logs_json():
        return ProgressBar(partitions, done)
    return ProgressLog(partitions, done)


class ProgressBar(Progress):
    """A bar: partitions done, images, failures, images per second, time left."""

    def __init__(self, partitions: int, done: int = 0) -> None:
        super().__init__(partitions, done)
        self._bar = tqdm(
            total=partitions, initial=done, unit="partition", file=sys.stderr, dynamic_ncols=True
        )

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, done: int, images: int, failed: int) -> None:
        """Show that ``done`` partitions are done, with so many images so far, this run's."""
        rate = self.tell_rate(images, failed)
        self._bar.set_postfix_str(
            f"{images} images, {failed} failed, {rate:.0f} images/s", refresh=False
        )
        self._bar.update(done + self._before - self._bar.n)


class ProgressLog(Progress):
    """A line every ten seconds, and one at the end: in the log, or on stderr as it is."""

    def __init__(self, partitions: int, done: int = 0) -> None:
        super().__init__(partitions, done)
        self._last = (0, 0, 0)
        self._ended = threading.Event()
        # A thread: that nothing comes to an end is to be seen too.
        self._teller = threading.Thread(target=self._tell_often, daemon=True)

    def __enter__(self) -> Self:
        self._teller.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._teller.join()
        self._tell()

    def update(self, done: int, images: int, failed: int) -> None:
        """Show that ``done`` partitions are done, with so many images so far, this run's."""
        self._last = done, images, failed

    def _tell_often(self) -> None:
        while not self._ended.wait(_LINE_EVERY):
            self._tell()

    def _tell(self) -> None:
        done, images, failed = self._last
        seconds = time.monotonic() - self._start
        left = self._partitions - self._before - done
        figures = {
            "partitions_done": self._before + done,
            "partitions": self._partitions,
            "images": images,
            "failed": failed,
            "images_per_second": round(self.tell_rate(images, failed), 1),
            "seconds_left": round(seconds / done * left) if done else None,
        }
        line = _LINE % figures
        if done:
            line += f", {figures['seconds_left']} s left"
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", line, extra=figures)
        else:  # whoever asked to see it has not set up a log that shows it
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}", file=sys.stderr)


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON, with whatever ``extra`` it carries."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def logs_json() -> bool:
    """Whether this process's log is JSON."""
    return any(isinstance(h.formatter, JsonFormatter) for h in logging.getLogger().handlers)


def start_logging(log_format: Literal["text", "json"]) -> None:
    """Send this process's log, Dask's and that of workers it starts, to stderr."""
    import dask
    from distributed.config import initialize_logging

    form = (
        {"()": f"{__name__}.{JsonFormatter.__name__}"}
        if log_format == "json"
        else {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    )
    settings = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": form},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {"dask_imgread": {"level": "INFO"}},
    }
    initialize_logging({"logging": settings})
    logging.captureWarnings(True)
    # Worker processes set up their logs when they import Dask, by what they inherit.
    os.environ["DASK_INTERNAL_INHERIT_CONFIG"] = dask.config.serialize({"logging": settings})
