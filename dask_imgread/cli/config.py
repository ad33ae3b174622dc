"""A configuration file: the command line's arguments, in TOML."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dask_imgread.hints import find_near

_PAIRS = ("storage_option", "out_option")  # tables in the file, KEY=VALUE on the command line


def read_config(path: str, known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the positional arguments, and the options as a command line has them.

    Parameters
    ----------
    path
        A TOML file. Its keys are option names without the leading dashes, ``shards`` and
        ``function``.
    known
        The command's arguments, as they are without the file.

    Raises
    ------
    ValueError
        If the file can't be read, or holds a key or a type of value that the command doesn't take.
    """
    try:
        config = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    names = known.keys() - {"command", "config"}
    positional: dict[str, Any] = {}
    options: list[str] = []
    for key, value in config.items():
        name = key.replace("-", "_")
        if name not in names:
            near = find_near(name, names)
            hint = f"do you mean {near.replace('_', '-')}?" if near else "--help lists them"
            raise ValueError(f"{path}: no such option: {key}; {hint}")
        try:
            if name == "shards":
                positional[name] = _check([value] if isinstance(value, str) else value, list)
                _check("".join(value), str)
            elif name == "function":
                positional[name] = _check(value, str)
            else:
                options += _format_option(name, value, known[name])
        except TypeError as error:
            raise ValueError(f"{path}: {key}: {error}") from None
    return positional, options


def _format_option(name: str, value: Any, default: Any) -> list[str]:
    """Return an option as it would be given on the command line.

    >>> _format_option("overwrite", False, True), _format_option("retries", 3, 2)
    (['--no-overwrite'], ['--retries=3'])
    """
    flag = f"--{name.replace('_', '-')}"
    if name in _PAIRS:
        return [f"{flag}={key}={json.dumps(item)}" for key, item in _check(value, dict).items()]
    if name == "sidecar":
        return [f"{flag}={key}={_join(item)}" for key, item in _check(value, dict).items()]
    if isinstance(default, list):
        return [f"{flag}={item}" for item in _check(value, list)]
    if isinstance(default, bool):
        return [flag if _check(value, bool) else flag.replace("--", "--no-", 1)]
    if isinstance(value, bool | list | dict):
        raise TypeError(f"a string or a number is expected, not {value!r}")
    return [f"{flag}={value}"]


def _join(value: Any) -> str:
    """Return one string, or several with commas between."""
    return value if isinstance(value, str) else ",".join(_check(value, list))


def _check(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {kind.__name__} is expected, not {value!r}")
    return value
