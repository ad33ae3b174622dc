"""The command line's options, from its arguments and from a configuration file."""

from __future__ import annotations

import argparse
import difflib
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
    from dask_imgread.reading.reader import ImageReaderStage
    from dask_imgread.rows import BatchFunction

_READER = [
    *("dali_batch_size", "num_threads", "num_gpus_per_worker", "device", "decode", "sidecars"),
    *("on_error", "max_pixels", "max_batch_bytes", "resize", "decoder", "scaled_decoding"),
    *("isolate", "relative_to"),
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
            near = difflib.get_close_matches(name, known, 1)
            hint = f"do you mean {near[0].replace('_', '-')}?" if near else "--help lists them"
            raise UsageError(f"{path}: no such option: {key}; {hint}")
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
        ("images", "images in a partition, about (default: those of a shard)"),
        ("files", "whole shards in a partition (default 1)"),
    ):
        command.add_argument(f"--{name}-per-partition", type=int, metavar="N", help=what)
    command.add_argument(
        "--blocksize",
        type=_parse_bytes,
        metavar="BYTES",
        help="bytes in a partition, such as 64MB (default: those of a shard)",
    )
    command.add_argument(
        "--storage-option",
        action="append",
        default=[],
        type=parse_pair,
        metavar="KEY=VALUE",
        help="option of fsspec's file system, such as anon=true; true, numbers and JSON are "
        "taken as such (default: none)",
    )


def add_device(group: argparse._ActionsContainer) -> None:
    """Add what decodes."""
    group.add_argument(
        "--device",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help="what decodes (default auto: a GPU where there is one)",
    )


def add_reader(command: argparse.ArgumentParser, sidecars: bool) -> None:
    """Add the options of the reader; whether it reads sidecars if nothing is said."""
    reader = command.add_argument_group("reader")
    add_device(reader)
    reader.add_argument(
        "--dali-batch-size",
        type=int,
        metavar="N",
        help="images decoded together (default 100)",
    )
    reader.add_argument(
        "--num-threads", type=int, metavar="N", help="that decode, at most (default 8)"
    )
    reader.add_argument(
        "--num-gpus-per-worker",
        type=float,
        metavar="SHARE",
        help="share of a GPU that a reader holds (default 0.25)",
    )
    reader.add_argument(
        "--on-error",
        choices=("record", "skip", "raise"),
        help="what becomes of an image that can't be read (default record)",
    )
    reader.add_argument(
        "--max-pixels", type=int, metavar="N", help="refuse larger images (default 268435456)"
    )
    reader.add_argument(
        "--max-batch-bytes",
        type=_parse_bytes,
        metavar="BYTES",
        help="of a batch's decoded images, at most (default 256MiB)",
    )
    reader.add_argument(
        "--resize",
        type=_parse_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="resize images, such as to 256 or 224x224 (default: none)",
    )
    reader.add_argument(
        "--decoder",
        choices=("auto", "dali"),
        help="dali: on a CPU too (default auto: what is fastest)",
    )
    reader.add_argument(
        "--scaled-decoding",
        action=argparse.BooleanOptionalAction,
        help="begin --resize with JPEGs decoded at 1/2, 1/4 or 1/8 of their size (default yes)",
    )
    reader.add_argument(
        "--relative-to",
        metavar="FOLDER",
        help="make ids from the shards' paths below it (default none: from whole paths)",
    )
    reader.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        help="decode each image in a child process that it may kill (default no)",
    )
    reader.add_argument(
        "--sidecars",
        action=argparse.BooleanOptionalAction,
        help=f"read the samples' other members too (default {'yes' if sidecars else 'no'})",
    )


def add_cluster(command: argparse.ArgumentParser) -> None:
    """Add where the work is done."""
    cluster = command.add_argument_group("cluster (default: one is started on this machine)")
    which = cluster.add_mutually_exclusive_group()
    which.add_argument("--scheduler", metavar="ADDRESS", help="a scheduler that is there")
    which.add_argument("--scheduler-file", metavar="FILE", help="the file that it writes")
    cluster.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="to start (default: one for each GPU or core), or to wait for (default 1)",
    )


def add_job(command: argparse.ArgumentParser) -> None:
    """Add what a job writes, and how it is run."""
    job = command.add_argument_group("job")
    job.add_argument("--out", metavar="DIR", help="folder or URL for the Parquet dataset")
    job.add_argument(
        "--out-option",
        action="append",
        type=parse_pair,
        metavar="KEY=VALUE",
        help="for the file system of DIR (default: as --storage-option if it is remote)",
    )
    job.add_argument(
        "--config", metavar="FILE", help="TOML file with any of these options (default: none)"
    )
    job.add_argument(
        "--retries",
        type=int,
        default=2,
        metavar="N",
        help="times that a partition is tried again (default 2)",
    )
    for name, what in (
        ("retry-failed", "read partitions with failed images again"),
        ("overwrite", "remove what is in DIR and begin anew"),
        ("fail-on-error", "exit with 1 if an image could not be read"),
    ):
        job.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=False,
            help=f"{what} (default no)",
        )
    job.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="of the log and the summary (default text)",
    )


def make_reader(options: argparse.Namespace, **defaults: Any) -> ImageReaderStage:
    """Return the reader that the options ask for."""
    from dask_imgread.reading.reader import ImageReaderStage

    given = {name: getattr(options, name, None) for name in _READER}
    return ImageReaderStage(
        verbose=False, **(defaults | {name: v for name, v in given.items() if v is not None})
    )


def require(options: argparse.Namespace, *names: str) -> None:
    """Raise UsageError if one of some arguments was given neither here nor in the file."""
    missing = {
        "shards": 'SHARDS is missing: give files, folders, globs or URLs, such as "shards/*.tar"',
        "out": "--out is missing: give a folder or URL for the rows, such as --out result",
        "function": "MODULE:FUNCTION is missing: give a function, such as brightness:measure",
    }
    for name in names:
        if not getattr(options, name):
            raise UsageError(missing[name])


def load_function(name: str) -> BatchFunction:
    """Import ``MODULE:FUNCTION``, from the current folder too.

    Raises
    ------
    UsageError
        If there is no such thing.
    """
    import cloudpickle

    module_name, _, path = name.partition(":")
    if module_name.endswith(".py") or not path:
        raise UsageError(f"{name}: MODULE:FUNCTION is expected{_hint_function(module_name, path)}")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # the module may raise anything
        raise UsageError(
            f"{name}: {type(error).__name__}: {error}. Modules are looked for in this folder and "
            "where Python finds its own: run the command where this one can be imported"
        ) from error
    if not callable(found):
        raise UsageError(f"{name} is no function: give one that takes an ImageBatch")
    here = Path.cwd()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).parent == here and module.__name__ != "__main__":
            cloudpickle.register_pickle_by_value(module)  # workers elsewhere can't import it
    function: Callable[..., Any] = found
    return function


def _hint_function(module: str, path: str) -> str:
    """Return what was probably meant by the path of a file, or by a name without a colon."""
    if not path and module.count(".") == 1 and not module.endswith(".py"):
        return f": do you mean {module.replace('.', ':')}?"
    folder, _, file = module.rpartition("/")
    where = f" in the folder {folder}" if folder else ""
    return f": do you mean {file.removesuffix('.py')}:{path or 'FUNCTION'}{where}?"


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
                raise UsageError(
                    f"storage option {parent} has a value, and {name} another: leave one out"
                )
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


def _parse_bytes(text: str) -> int:
    """Parse a number of bytes.

    >>> _parse_bytes("64MB"), _parse_bytes("1.5 GiB"), _parse_bytes("1000")
    (64000000, 1610612736, 1000)
    """
    from dask.utils import parse_bytes

    try:
        number: int = parse_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"bytes such as 64MB or 67108864 are expected, not {text!r}"
        ) from None
    return number


def _parse_size(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"SIDE or HEIGHTxWIDTH is expected, such as 224x224, not {text!r}"
        )
    first, second = match.groups()
    return int(first) if second is None else (int(first), int(second))
