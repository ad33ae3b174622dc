"""Report progress on stderr: a bar on a terminal, lines in a log."""

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

_LOG_INTERVAL = 10.0  # seconds
_LOG_LINE = (
    "%(partitions_done)d of %(partitions)d partitions, %(images)d images, %(failed)d failed, "
    "%(images_per_second).0f images/s"
)
_BAR_INTERVAL = 1.0  # seconds; a log line erases the bar for as long
_ERASE_LINE = "\r\x1b[K"  # ANSI: to the start of the line, and erase it
_STANDARD_ATTRIBUTES = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class Progress:
    """Counts the partitions and images that are done; subclasses show the counts at intervals.

    A context manager. This class itself shows nothing.

    Parameters
    ----------
    partitions, done
        How many there are, and how many were done before this run.
    """

    interval: float | None = None  # seconds between two calls of `show`

    def __init__(self, partitions: int, done: int = 0) -> None:
        self._partitions, self._before = partitions, done
        self._start = time.monotonic()
        self._counts = (0, 0, 0)
        self._ended = threading.Event()
        # A thread, so that progress is shown even while no partition gets done.
        self._thread = threading.Thread(target=self._show_repeatedly, daemon=True)

    def __enter__(self) -> Self:
        if self.interval is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self.interval is not None:
            self._thread.join()
        self.show()

    def update(self, done: int, images: int, failed: int) -> None:
        """Set the totals of this run: partitions done, images read, images failed."""
        self._counts = done, images, failed

    def measure_rate(self) -> float:
        """Return images per second since the run began; failed images count too."""
        _, images, failed = self._counts
        return (images + failed) / max(time.monotonic() - self._start, 1e-9)

    def show(self) -> None:
        """Show the counts."""

    def _show_repeatedly(self) -> None:
        while not self._ended.wait(self.interval):
            self.show()


def choose_progress(partitions: int, done: int = 0, *, hidden: bool = False) -> Progress:
    """Return a progress bar if stderr is a terminal and the log is not JSON, else log lines.

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

    interval = _BAR_INTERVAL

    def __init__(self, partitions: int, done: int = 0) -> None:
        super().__init__(partitions, done)
        self._bar = tqdm(
            total=partitions, initial=done, unit="partition", file=sys.stderr, dynamic_ncols=True
        )

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._bar.close()

    def update(self, done: int, images: int, failed: int) -> None:
        """Set the totals of this run and draw the bar."""
        super().update(done, images, failed)
        self._bar.set_postfix_str(self._format_counts(), refresh=False)
        self._bar.update(done + self._before - self._bar.n)

    def show(self) -> None:
        """Draw the bar."""
        self._bar.set_postfix_str(self._format_counts())

    def _format_counts(self) -> str:
        _, images, failed = self._counts
        return f"{images} images, {failed} failed, {self.measure_rate():.0f} images/s"


class ProgressLog(Progress):
    """A line every ten seconds, and one at the end: in the log, or printed to stderr."""

    interval = _LOG_INTERVAL

    def show(self) -> None:
        """Write a line."""
        done, images, failed = self._counts
        seconds = time.monotonic() - self._start
        left = self._partitions - self._before - done
        figures = {
            "partitions_done": self._before + done,
            "partitions": self._partitions,
            "images": images,
            "failed": failed,
            "images_per_second": round(self.measure_rate(), 1),
            "seconds_left": round(seconds / done * left) if done else None,
        }
        line = _LOG_LINE % figures
        if done:
            line += f", {figures['seconds_left']} s left"
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", line, extra=figures)
        else:  # progress was asked for, but the log is not set up to show it
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}", file=sys.stderr)


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON, with the fields given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {
            name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class StderrHandler(logging.StreamHandler[Any]):
    """Writes the log and Python's warnings to stderr; on a terminal, over the progress bar.

    A worker process shares the terminal with the process that draws the bar. So each record
    erases the line that it is written to, and the bar is drawn again below it.
    """

    def __init__(self) -> None:
        super().__init__()
        logging.captureWarnings(True)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; on a terminal it begins with what erases the bar."""
        line = super().format(record)
        return f"{_ERASE_LINE}{line}" if self.stream.isatty() else line


def logs_json() -> bool:
    """Whether this process's log is JSON."""
    return any(isinstance(h.formatter, JsonFormatter) for h in logging.getLogger().handlers)


def start_logging(log_format: Literal["text", "json"]) -> None:
    """Send the logs of this process, of Dask, and of the workers started here to stderr."""
    import dask
    from distributed.config import initialize_logging

    formatter = (
        {"()": f"{__name__}.{JsonFormatter.__name__}"}
        if log_format == "json"
        else {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    )
    settings = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": formatter},
        "handlers": {"stderr": {"()": f"{__name__}.{StderrHandler.__name__}", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {"dask_imgread": {"level": "INFO"}},
    }
    initialize_logging({"logging": settings})
    # Worker processes set up their logs when they import Dask, from the inherited configuration.
    os.environ["DASK_INTERNAL_INHERIT_CONFIG"] = dask.config.serialize({"logging": settings})
