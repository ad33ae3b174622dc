"""The command line's options, from its arguments and from a configuration file."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_imgread.reader import ImageReaderStage
    from dask_imgread.rows import BatchFunction

_READER = [
    *("dali_batch_size", "num_threads", "num_gpus_per_worker", "device", "decode", "sidecars"),
    *("on_error", "max_pixels", "max_batch_bytes", "resize", "decoder", "scaled_decoding"),
    "isolate",
]

_SWITCHES = ("sidecars", "scaled_decoding", "isolate")  # of the reader, without a default here


class UsageError(Exception):
    """What the user asked for can't be done; the message says why in one line."""


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse the command line, over what the file given with ``--config`` says.

    Raises
    ------
    UsageError
        If the file has a key that is no option.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if getattr(options, "config", None) is None:
        return options
    positional, named = _read_config(options.config, vars(options))
    # As arguments, before those given, so that what is checked there is checked here.
    at = given.index(options.command) + 1
    options = parser.parse_args([*given[:at], *named, *given[at:]])
    function = getattr(options, "function", None)
    if function and ":" not in function and "function" in positional:
        options.shards.insert(0, function)  # the file gives the function: this is no other
        options.function = None
    for name, value in positional.items():
        if not getattr(options, name):
            setattr(options, name, value)
    return options


def _read_config(path: str, known: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a file's values for positional arguments, and the others as arguments."""
    try:
        config = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    positional: dict[str, Any] = {}
    named: list[str] = []
    for key, value in config.items():
        name = key.replace("-", "_")
        if name not in known or name in ("run", "command", "config"):
            raise UsageError(f"{path}: no such option: {key}")
        try:
            if name == "shards":
                positional[name] = _check([value] if isinstance(value, str) else value, list)
                _check("".join(value), str)
            elif name == "function":
                positional[name] = _check(value, str)
            else:
                named += _to_arguments(name, value, known[name])
        except TypeError as error:
            raise UsageError(f"{path}: {key}: {error}") from None
    return positional, named


def _to_arguments(name: str, value: Any, default: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if name in ("storage_option", "out_option"):
        pairs = _check(value, dict).items()
        return [f"{flag}={key}={json.dumps(item)}" for key, item in pairs]
    if isinstance(default, bool) or name in _SWITCHES:
        return [flag if _check(value, bool) else flag.replace("--", "--no-", 1)]
    if isinstance(value, bool | list | dict):
        raise TypeError(f"a string or a number is expected, not {value!r}")
    return [f"{flag}={value}"]


def _check(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {kind.__name__} is expected, not {value!r}")
    return value


def add_shards(command: argparse.ArgumentParser) -> None:
    """Add what is read, and how it is divided."""
    command.add_argument("shards", nargs="*", metavar="SHARDS", help="file, folder, glob or URL")
    for name, what in (
        ("images", "images in a partition, about"),
        ("files", "whole shards in a partition"),
    ):
        command.add_argument(f"--{name}-per-partition", type=int, metavar="N", help=what)
    command.add_argument("--blocksize", type=int, metavar="BYTES", help="bytes in a partition")
    command.add_argument(
        "--storage-option",
        action="append",
        default=[],
        type=parse_pair,
        metavar="KEY=VALUE",
        help="option of fsspec's file system; true, numbers and JSON are taken as such",
    )


def add_reader(command: argparse.ArgumentParser) -> None:
    """Add the options of the reader."""
    reader = command.add_argument_group("reader")
    reader.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto")
    reader.add_argument("--dali-batch-size", type=int, metavar="N")
    reader.add_argument("--num-threads", type=int, metavar="N", help="that decode, at most")
    reader.add_argument("--num-gpus-per-worker", type=float, metavar="SHARE")
    reader.add_argument("--on-error", choices=("record", "skip", "raise"))
    reader.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images")
    reader.add_argument("--max-batch-bytes", type=int, metavar="BYTES")
    reader.add_argument("--resize", type=_parse_size, metavar="SIDE|HEIGHTxWIDTH")
    reader.add_argument("--decoder", choices=("auto", "dali"), help="dali: on a CPU too")
    reader.add_argument(
        "--scaled-decoding",
        action=argparse.BooleanOptionalAction,
        help="begin --resize with JPEGs decoded at 1/2, 1/4 or 1/8 of their size",
    )
    reader.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        help="decode each image in a child process that it may kill",
    )
    reader.add_argument(
        "--sidecars",
        action=argparse.BooleanOptionalAction,
        help="read the samples' other members too",
    )


def add_cluster(command: argparse.ArgumentParser) -> None:
    """Add where the work is done."""
    cluster = command.add_argument_group("cluster (one is started if no scheduler is given)")
    which = cluster.add_mutually_exclusive_group()
    which.add_argument("--scheduler", metavar="ADDRESS", help="a scheduler that is there")
    which.add_argument("--scheduler-file", metavar="FILE", help="the file that it writes")
    cluster.add_argument("--workers", type=int, metavar="N", help="to start, or to wait for")


def add_job(command: argparse.ArgumentParser) -> None:
    """Add what a job writes, and how it is run."""
    job = command.add_argument_group("job")
    job.add_argument("--out", metavar="DIR", help="folder or URL for the Parquet dataset")
    job.add_argument(
        "--out-option",
        action="append",
        type=parse_pair,
        metavar="KEY=VALUE",
        help="for the file system of DIR, if others than --storage-option",
    )
    job.add_argument("--config", metavar="FILE", help="TOML file with any of these options")
    job.add_argument("--retries", type=int, default=2, metavar="N", help="tries more, a partition")
    job.add_argument(
        "--retry-failed",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read partitions with failed images again",
    )
    job.add_argument(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="remove what is in DIR and begin anew",
    )
    job.add_argument(
        "--fail-on-error",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="exit with 1 if an image could not be read",
    )
    job.add_argument("--log-format", choices=("text", "json"), default="text")


def make_reader(options: argparse.Namespace, **defaults: Any) -> ImageReaderStage:
    """Return the reader that the options ask for."""
    from dask_imgread.reader import ImageReaderStage

    given = {name: getattr(options, name, None) for name in _READER}
    return ImageReaderStage(
        verbose=False, **(defaults | {name: v for name, v in given.items() if v is not None})
    )


def require(options: argparse.Namespace, *names: str) -> None:
    """Raise UsageError if one of some arguments was given neither here nor in the file."""
    for name in names:
        if not getattr(options, name):
            shown = "--out" if name == "out" else name.upper()
            raise UsageError(f"{shown} is missing")


def load_function(name: str) -> BatchFunction:
    """Import ``MODULE:FUNCTION``, from the current folder too.

    Raises
    ------
    UsageError
        If there is no such thing.
    """
    import cloudpickle

    module_name, _, path = name.partition(":")
    if not path:
        raise UsageError(f"{name}: MODULE:FUNCTION is expected")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # the module may raise anything
        raise UsageError(f"{name}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UsageError(f"{name} can't be called")
    here = Path.cwd()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).parent == here and module.__name__ != "__main__":
            cloudpickle.register_pickle_by_value(module)  # workers elsewhere can't import it
    function: Callable[..., Any] = found
    return function


def read_storage_options(
    options: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the options for the shards' file system, and those for the output's, if given."""
    out = merge_pairs(options.out_option) if options.out_option else None
    return merge_pairs(options.storage_option or []), out


def merge_pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return storage options as a dict; ``a.b`` is the ``b`` of the dict ``a``.

    >>> merge_pairs([("anon", True), ("client_kwargs.region_name", "eu-west-1")])
    {'anon': True, 'client_kwargs': {'region_name': 'eu-west-1'}}
    """
    merged: dict[str, Any] = {}
    for name, value in pairs:
        *parents, last = name.split(".")
        inner = merged
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise UsageError(f"storage option {parent} has a value, and {name} another")
        inner[last] = value
    return merged


def parse_pair(text: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError("KEY=VALUE is expected")  # what was given may be secret
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _parse_size(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"SIDE or HEIGHTxWIDTH is expected, not {text!r}")
    first, second = match.groups()
    return int(first) if second is None else (int(first), int(second))
