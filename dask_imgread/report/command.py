"""The command that a job is of: its options, and the line that does it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from dask_imgread.fingerprints import MIN_SIDE, fingerprint
from dask_imgread.reading.options import ReaderOptions
from dask_imgread.rows import name_function
from dask_imgread.shards.samples import find_sidecar_type

_MOST_NAMES = 8  # of shards in a command
_FINGERPRINT = name_function(fingerprint)
_DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in fields(ReaderOptions)},
    "reader": "ImageReaderStage",
    **dict.fromkeys(("files_per_partition", "images_per_partition", "blocksize", "rows_per_file")),
}
_OTHER_DEFAULTS: dict[str, dict[str, Any]] = {  # those that a command has for itself
    "fingerprint": {"sidecars": False, "checksum": True, "min_side": MIN_SIDE},
    "metadata": {"decode": False, "sidecars": False},
}
_MISSING = object()


def name_command(description: Mapping[str, Any]) -> str:
    """Return the command of a job."""
    command: str = description["command"]
    return "fingerprint" if description.get("function") == _FINGERPRINT else command


def list_options(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a job that are not its command's defaults."""
    defaults = _DEFAULTS | _OTHER_DEFAULTS.get(name_command(description), {})
    options = dict(description.get("options", {}))
    if "sidecar_columns" in options:
        options.pop("sidecars", None)  # those that the columns need
    return {n: value for n, value in options.items() if defaults.get(n, _MISSING) != value}


def describe_options(description: Mapping[str, Any]) -> str:
    """Return these options in words."""
    options = list_options(description)
    if columns := options.pop("sidecar_columns", None):
        options["sidecars"] = [f"{name} from {extension}" for name, extension, *_ in columns]
    return " · ".join(f"{n.replace('_', ' ')}: {_describe(v)}" for n, v in options.items())


def _describe(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def write_command(
    description: Mapping[str, Any], shards: Iterable[str], out: str, *flags: str
) -> str:
    """Return the command line that does a job; nothing if only Python can ask for it.

    Shards that can't be named in a few words are left to the user, as ``SHARDS``; so are storage
    options, which no job keeps.
    """
    command, function = name_command(description), description.get("function") or ""
    words = ["dask-imgread", command]
    if command == "apply":
        if not re.fullmatch(r"(?!__main__:)[\w.]+:\w+", function):
            return ""
        words.append(function)
    try:
        options = [flag for pair in list_options(description).items() for flag in _write(*pair)]
    except ValueError:
        return ""
    return shlex.join([*words, *name_shards(shards), *options, "--out", out, *flags])


def _write(name: str, value: Any) -> list[str]:
    """Return the words for an option; raise ValueError if the command line lacks it."""
    flag = f"--{name.replace('_', '-')}"
    if name == "sidecar_columns":
        columns: dict[str, list[str]] = {}
        for column, extension, key, kind in value:
            columns.setdefault(extension, []).append(_write_column(column, extension, key, kind))
        return [
            word
            for extension, names in columns.items()
            for word in ("--sidecar", f"{extension}={','.join(names)}")
        ]
    if name == "min_side" and value is None:
        return ["--exact"]
    if name not in _DEFAULTS or name in ("reader", "output"):
        raise ValueError(name)
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if name == "resize" and isinstance(value, list):
        return [flag, "x".join(map(str, value))]
    if isinstance(value, str | int):
        return [flag, str(value)]
    raise ValueError(name)


def _write_column(name: str, extension: str, key: str | None, kind: str | None) -> str:
    own = find_sidecar_type(extension)
    if (own == "json") != (key is not None) or re.search("[,:]", name):
        raise ValueError(name)
    return name if kind in (None, own) else f"{name}:{kind}"


def name_shards(paths: Iterable[str]) -> list[str]:
    """Return few names for shards, with ranges; ``SHARDS`` if they can't be named so.

    >>> name_shards(["a/s-08.tar", "a/s-09.tar", "a/s-10.tar", "b.tar"])
    ['a/s-{08..10}.tar', 'b.tar']
    """
    ranges: list[tuple[str, str, str, str]] = []
    for path in paths:
        match = re.fullmatch(r"(.*?)(\d*)(\D*)", path, re.DOTALL)
        head, number, tail = match.groups() if match else (path, "", "")
        if ranges and number:
            *around, first, last = ranges[-1]
            follows = len(last) == len(number) and int(last) + 1 == int(number)
            if follows and around == [head, tail]:
                ranges[-1] = head, tail, first, number
                continue
        ranges.append((head, tail, number, number))
        if len(ranges) > _MOST_NAMES or re.search(r"[{}]|::|\*\*\*", path):
            return ["SHARDS"]
    return [
        f"{head}{first if first == last else f'{{{first}..{last}}}'}{tail}"
        for head, tail, first, last in ranges
    ] or ["SHARDS"]
