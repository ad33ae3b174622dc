"""The command line's ``main``: what signals do, and what an error prints and exits with."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Any

from dask_imgread.cli.arguments import (
    UNFINISHED,
    WRONG_USAGE,
    check_arguments,
    make_parser,
    merge_pairs,
    parse_arguments,
)
from dask_imgread.errors import FolderInUseError, StorageError
from dask_imgread.progress import logs_json
from dask_imgread.storage.redaction import hide_secrets
from dask_imgread.storage.retries import GIVEN_UP

logger = logging.getLogger("dask_imgread")

_MODULES = {  # that have the functions of the commands, such as `run_demo`
    "demo": "demo",
    "metadata": "commands",
    "apply": "commands",
    "fingerprint": "commands",
    "verify": "commands",
    "select": "select",
    "diff": "diff",
    "duplicates": "duplicates",
    "report": "report",
}
# The commands that resume where they stopped.
_JOBS = ("metadata", "apply", "fingerprint", "select")
_WRONG = (  # what is raised for wrong arguments, paths and functions
    *(ValueError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError),
    PermissionError,
)


class Stopped(BaseException):
    """A signal has asked the process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


class _StandardStream(io.FileIO):
    """Standard output or error, whose reader may have closed it, as ``head`` does."""

    def write(self, content: Any) -> int:
        """Write, or drop what can't be read any more."""
        try:
            return super().write(content)
        except BrokenPipeError:
            return len(content)


@contextmanager
def outlive_readers() -> Iterator[None]:
    """Let the work go on when the reader of stdout or stderr closes it."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if isinstance(stream, io.TextIOWrapper) and stream in (sys.__stdout__, sys.__stderr__):
                stream.flush()
                patient = io.TextIOWrapper(
                    io.BufferedWriter(_StandardStream(stream.fileno(), "w", closefd=False)),
                    encoding=stream.encoding,
                    errors=stream.errors,
                    line_buffering=stream.line_buffering,
                )
                stack.enter_context(redirect(patient))
                stack.callback(patient.flush)
        yield


@outlive_readers()
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, this process's if none is given; return the exit status.

    0 if all was read or recorded; 1 if `verify`, or a job with `--fail-on-error`, found an
    image that can't be read, or `diff --exit-code` one that differs; 2 if the command, its paths or
    its options are wrong; 3 if the job could not finish, or another process works on its folder; 4
    if the function of `apply` raised for an image that could be read; 130 and 143 after SIGINT and
    SIGTERM.
    """
    secrets: dict[str, Any] = {}
    arguments = argparse.Namespace(command=None)
    try:
        with stop_on_signals():
            arguments = parse_arguments(make_parser(), argv)
            for name in ("storage_option", "out_option"):
                secrets |= merge_pairs(getattr(arguments, name, []))
            check_arguments(arguments)
            # Imported only now, with what this command needs of Dask and pandas.
            module = importlib.import_module(f"dask_imgread.cli.{_MODULES[arguments.command]}")
            status: int = getattr(module, f"run_{arguments.command}")(arguments)
            return status
    except Stopped as stopped:
        kept = "; what is done is kept" if arguments.command in _JOBS else ""
        print_error(f"stopped by {stopped.signal.name}{kept}")
        return 128 + stopped.signal
    except Exception as error:
        wrong = isinstance(error, _WRONG) and not isinstance(error, StorageError | FolderInUseError)
        logger.debug("%s", type(error).__name__, exc_info=error)
        print_error(hide_secrets(str(error) or repr(error), secrets))
        return WRONG_USAGE if wrong else UNFINISHED


def print_error(text: str) -> None:
    """Print on stderr in one line why a command ends, or log it where the log is JSON."""
    if logs_json():
        logger.error("%s", text)
    else:
        print(f"dask-imgread: {text}", file=sys.stderr)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise Stopped at SIGTERM or SIGINT, so that clusters are closed; a second signal kills."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for each in earlier:
            signal.signal(each, signal.SIG_DFL)
        GIVEN_UP.set()  # else threads that wait to retry would keep the process alive
        raise Stopped(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    earlier = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        GIVEN_UP.clear()
        for number, handler in earlier.items():
            signal.signal(number, handler)
