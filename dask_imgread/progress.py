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
_DRAWN_EVERY = 1.0  # seconds: a line of the log takes the bar's place until then
_ERASE = "\r\x1b[K"  # what stands in a terminal's line
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class Progress:
    """What shows how far a run has come, again and again; a context manager. This shows nothing.

    Parameters
    ----------
    partitions, done
        How many there are, and how many were done before this run.
    """

    every: float | None = None  # seconds

    def __init__(self, partitions: int, done: int = 0) -> None:
        self._partitions, self._before = partitions, done
        self._start = time.monotonic()
        self._last = (0, 0, 0)
        self._ended = threading.Event()
        # A thread: that nothing comes to an end is to be seen too.
        self._teller = threading.Thread(target=self._tell_often, daemon=True)

    def __enter__(self) -> Self:
        if self.every is not None:
            self._teller.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self.every is not None:
            self._teller.join()
        self.tell()

    def update(self, done: int, images: int, failed: int) -> None:
        """Note that ``done`` partitions are done, with so many images so far, this run's."""
        self._last = done, images, failed

    def tell_rate(self) -> float:
        """Return the images done in a second, those that failed too, since the run began."""
        _, images, failed = self._last
        return (images + failed) / max(time.monotonic() - self._start, 1e-9)

    def tell(self) -> None:
        """Show how far it has come."""

    def _tell_often(self) -> None:
        while not self._ended.wait(self.every):
            self.tell()


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

    every = _DRAWN_EVERY

    def __init__(self, partitions: int, done: int = 0) -> None:
        super().__init__(partitions, done)
        self._bar = tqdm(
            total=partitions, initial=done, unit="partition", file=sys.stderr, dynamic_ncols=True
        )

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._bar.close()

    def update(self, done: int, images: int, failed: int) -> None:
        """Draw that ``done`` partitions are done, with so many images so far, this run's."""
        super().update(done, images, failed)
        self._bar.set_postfix_str(self._tell_images(), refresh=False)
        self._bar.update(done + self._before - self._bar.n)

    def tell(self) -> None:
        """Draw the bar."""
        self._bar.set_postfix_str(self._tell_images())

    def _tell_images(self) -> str:
        _, images, failed = self._last
        return f"{images} images, {failed} failed, {self.tell_rate():.0f} images/s"


class ProgressLog(Progress):
    """A line every ten seconds, and one at the end: in the log, or on stderr as it is."""

    every = _LINE_EVERY

    def tell(self) -> None:
        """Write a line."""
        done, images, failed = self._last
        seconds = time.monotonic() - self._start
        left = self._partitions - self._before - done
        figures = {
            "partitions_done": self._before + done,
            "partitions": self._partitions,
            "images": images,
            "failed": failed,
            "images_per_second": round(self.tell_rate(), 1),
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


class StderrHandler(logging.StreamHandler[Any]):
    """Writes the log, and Python's warnings, to stderr; on a terminal in place of the bar.

    The bar is another process's, where a worker writes: so its line is erased, whoever drew it,
    and drawn again below.
    """

    def __init__(self) -> None:
        super().__init__()
        logging.captureWarnings(True)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with what erases a bar before it."""
        line = super().format(record)
        return f"{_ERASE}{line}" if self.stream.isatty() else line


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
        "handlers": {"stderr": {"()": f"{__name__}.{StderrHandler.__name__}", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {"dask_imgread": {"level": "INFO"}},
    }
    initialize_logging({"logging": settings})
    # Worker processes set up their logs when they import Dask, by what they inherit.
    os.environ["DASK_INTERNAL_INHERIT_CONFIG"] = dask.config.serialize({"logging": settings})
