"""The command line's arguments: the parser with its help texts, and further checks.

Importing Dask takes a second, so it is not imported here: help and refusals come at once.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dask_imgread import __version__
from dask_imgread.cli.config import read_config
from dask_imgread.reading.options import ReaderOptions

_EXAMPLES = {  # of each command, after the program's name
    "demo": "demo --images 200 --workers 2",
    "metadata": 'metadata "shards/*.tar" --out result\n'
    "metadata shards/ --out decoded --decode --blocksize 64MB\n"
    "metadata shards/ --out captions --sidecar txt=caption --sidecar json=url,similarity:float64",
    "apply": 'apply brightness:measure "shards/*.tar" --out brightness --workers 4',
    "fingerprint": 'fingerprint "shards/*.tar" --out fingerprints',
    "verify": 'verify "shards/{00000..00099}.tar" --out bad.parquet',
    "select": 'select "shards/*.tar" --where "width>=512" --out large --shuffle 1\n'
    "select decoded --failed --out broken\n"
    'select "shards/*.tar" --not-ids takedown.txt --out rewritten',
    "diff": "diff result result-of-today --out changes.parquet",
    "duplicates": "duplicates result --out drop.txt\n"
    "duplicates hashes --by phash --distance 6 --out duplicates.parquet",
    "report": "report result",
}
SUCCESS, BAD_IMAGES, WRONG_USAGE, UNFINISHED, FUNCTION_FAILED = range(5)
_STATUSES = """\
exit status:
  0 all was read or recorded     1 images failed (verify, --fail-on-error),
                                   or differ (diff --exit-code)
  2 wrong usage                  3 the job could not finish
  4 the function of apply raised for images"""
_REQUIRED = {
    "metadata": ("shards", "out"),
    "apply": ("function", "shards", "out"),
    "fingerprint": ("shards", "out"),
    "verify": ("shards",),
    "select": ("shards", "out"),
}
_NOT_WITH_NOT_IDS = (
    *("where", "failed", "decode", "sidecar"),
    *("images_per_shard", "sort_by", "shuffle", "index", "json_column"),
)
_MISSING = {
    "shards": 'SHARDS is missing: give files, folders, globs or URLs, such as "shards/*.tar"',
    "out": "--out is missing: give a folder or URL, such as --out result",
    "function": "MODULE:FUNCTION is missing: give a function, such as brightness:measure",
}


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse a command line, and the file that its ``--config`` names.

    Parameters
    ----------
    parser
        The parser.
    argv
        The words after the program's name; those of this process if None. They override the
        file's values.

    Raises
    ------
    ValueError
        If something is wrong in the configuration file.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    if getattr(arguments, "config", None) is None:
        return arguments
    positional, options = read_config(arguments.config, vars(arguments))
    # Parsed as part of the command line, the file's options are checked like any others. They
    # come first, since the last one counts where an option is given twice.
    at = given.index(arguments.command) + 1
    arguments = parser.parse_args([*given[:at], *options, *given[at:]])
    function = getattr(arguments, "function", None)
    if function and ":" not in function and "function" in positional:
        # The file gives the function, so the first word on the command line is a shard.
        arguments.shards.insert(0, function)
        arguments.function = None
    for name, value in positional.items():
        if not getattr(arguments, name):
            setattr(arguments, name, value)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError if a command lacks an argument, or has some that don't go together.

    The parser can't require arguments: they may stand in the configuration file.
    """
    for name in _REQUIRED.get(arguments.command, ()):
        not_needed = name == "out" and arguments.command == "select" and arguments.dry_run
        if not getattr(arguments, name) and not not_needed:
            raise ValueError(_MISSING[name])
    if arguments.command == "demo" and arguments.images < 1:
        raise ValueError(
            f"--images must be at least 1, not {arguments.images}: give a larger number"
        )
    if arguments.command == "metadata" and arguments.sidecar and arguments.sidecars:
        raise ValueError(
            "--sidecar and --sidecars can't be given together: the columns of the one hold what "
            "the other reads; leave one out"
        )
    if arguments.command == "select":
        _check_selection(arguments)
    for name in ("resize", "min_side"):
        given = getattr(arguments, name, None) is not None
        if arguments.command == "metadata" and given and not arguments.decode:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is for pixels, and only headers are read: add --decode, or leave {flag} "
                "out"
            )


def _check_selection(arguments: argparse.Namespace) -> None:
    given = {
        name
        for name, value in vars(arguments).items()
        if value is not None and value is not False and value != []
    }
    if "not_ids" in given:
        others = [f"--{name.replace('_', '-')}" for name in _NOT_WITH_NOT_IDS if name in given]
        if others:
            raise ValueError(
                f"--not-ids copies shards without some images, and takes no {', '.join(others)}: "
                "leave that out"
            )
    if {"sort_by", "shuffle"} <= given:
        raise ValueError("--sort-by and --shuffle can't be given together: give one")
    if arguments.images_per_shard is not None and arguments.images_per_shard < 1:
        raise ValueError(f"--images-per-shard must be at least 1, not {arguments.images_per_shard}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="dask-imgread",
        description="Read WebDataset tar shards of images on a Dask cluster.",
        epilog=_format_examples(*_EXAMPLES.values()) + "\n\n" + _STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dask-imgread {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    demo = _add_command(commands, "demo", "make a few shards of pictures and read them")
    demo.add_argument("--folder", help="folder to make for all files (default dask-imgread-demo)")
    demo.add_argument("--images", type=int, default=1000, help="how many pictures (default 1000)")
    demo.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="worker processes (default: one for each GPU or core)",
    )
    _add_reader(demo, ["device"])

    metadata = _add_command(commands, "metadata", "write one row for each image as Parquet")
    _add_shards(metadata)
    _add_metadata(metadata)
    _add_job(metadata)
    _add_reader(metadata.add_argument_group("reader"), READER_HELP, {"sidecars": False})
    _add_cluster(metadata)

    apply = _add_command(commands, "apply", "write what a function makes of the images")
    apply.add_argument("function", nargs="?", metavar="MODULE:FUNCTION", help="what makes the rows")
    _add_shards(apply)
    _add_job(apply)
    _add_reader(apply.add_argument_group("reader"), READER_HELP)
    _add_cluster(apply)

    fingerprint = _add_command(
        commands, "fingerprint", "write hashes and measures of the images, to find duplicates by"
    )
    _add_shards(fingerprint)
    fingerprint.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="decode whole pictures; hashes of scaled ones differ by a few bits (default no)",
    )
    _add_job(fingerprint)
    _add_reader(
        fingerprint.add_argument_group("reader"),
        (name for name in READER_HELP if name not in _FIXED_FOR_FINGERPRINTS),
    )
    _add_cluster(fingerprint)

    verify = _add_command(commands, "verify", "decode everything and say what is broken")
    _add_shards(verify)
    verify.add_argument(
        "--out", metavar="FILE", help="Parquet file for the list of bad images (default: none)"
    )
    _add_reader(verify, ["device"])
    _add_cluster(verify)

    _add_select(_add_command(commands, "select", "write chosen images as new shards"))

    diff = _add_command(commands, "diff", "say what changed between two jobs' outputs")
    diff.add_argument("old", metavar="OLD", help="an earlier output of metadata")
    diff.add_argument("new", metavar="NEW", help="a later one")
    diff.add_argument("--out", metavar="FILE", help="Parquet file for all changes (default: none)")
    diff.add_argument(
        "--exit-code",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="exit with 1 if an image differs (default no)",
    )
    _add_pairs(
        diff,
        "--storage-option",
        "option of the file system of OLD, NEW and FILE, where they are remote (default: none)",
    )
    _add_log_format(diff)

    duplicates = _add_command(commands, "duplicates", "find equal or similar images")
    duplicates.add_argument("folder", metavar="DIR", help="the output of metadata or apply")
    duplicates.add_argument(
        "--by",
        metavar="COLUMN",
        default="sha256",
        help="digests, or 64-bit hashes such as phash or dhash (default sha256)",
    )
    duplicates.add_argument(
        "--distance",
        type=int,
        default=4,
        metavar="BITS",
        help="in how many bits hashes of the same group differ (default 4)",
    )
    duplicates.add_argument(
        "--prefer",
        metavar="COLUMN",
        help="keep the image that has most of it (default: of the most pixels)",
    )
    duplicates.add_argument(
        "--out",
        metavar="FILE",
        help="Parquet file for all duplicates, or a text file, FILE.txt, for the ids of all but "
        "one of each group, as select --not-ids takes it (default: none)",
    )
    _add_pairs(
        duplicates,
        "--storage-option",
        "option of the file system of DIR and FILE, where they are remote (default: none)",
    )
    _add_log_format(duplicates)

    report = _add_command(commands, "report", "write a page to look at from a job's output")
    report.add_argument(
        "folder", metavar="DIR", help="the output of metadata, apply or fingerprint"
    )
    report.add_argument("--out", metavar="FILE", help="the page (default DIR/_report.html)")
    report.add_argument(
        "--since", metavar="OLD", help="an earlier output, to show what changed (default: none)"
    )
    _add_pairs(
        report,
        "--storage-option",
        "option of the shards' file system, and of DIR's if it is remote (default: none)",
    )
    _add_pairs(
        report, "--out-option", "option of the file system of DIR (default: as --storage-option)"
    )
    return parser


def _add_metadata(container: argparse._ActionsContainer) -> None:
    """Add the arguments for what is read of each image where metadata is made."""
    container.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="decode, and so find broken images (default no: only headers are read)",
    )
    container.add_argument(
        "--sidecar",
        action="append",
        default=[],
        type=_parse_sidecar,
        metavar="EXT=NAME[:TYPE],...",
        help="columns of what the samples' .EXT members hold: of .json keys (a.b is the b in a), "
        "of others the whole, in a column NAME; types such as float64 are found on the first "
        "images if not given (default: none)",
    )


def _add_select(select: argparse.ArgumentParser) -> None:
    _add_shards(select, "file, folder, glob or URL of shards; or the output of metadata")
    choice = select.add_argument_group("which images (default: all)")
    choice.add_argument(
        "--where",
        metavar="CONDITION",
        help="those for which this is true, such as \"width >= 512 and format == 'jpeg'\": an "
        "expression of columns, as pandas' query takes it (default: none)",
    )
    lists = choice.add_mutually_exclusive_group()
    lists.add_argument(
        "--ids",
        metavar="FILE",
        help="those with these image_ids or SHA-256 digests, one in each line; in shards "
        "digests need --checksum (default: none)",
    )
    lists.add_argument(
        "--not-ids",
        metavar="FILE",
        help="copy the shards that hold one of these, without them, and leave other shards alone "
        "(default: none)",
    )
    choice.add_argument(
        "--failed",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="those that could not be read, with their errors as .json (default no)",
    )
    _add_metadata(choice)
    shards = select.add_argument_group("new shards")
    shards.add_argument(
        "--images-per-shard", type=int, metavar="N", help="images in a shard (default 10000)"
    )
    order = shards.add_mutually_exclusive_group()
    for container, flag, metavar, what in (
        (order, "--sort-by", "COLUMN", "column to sort by; may be given again"),
        (shards, "--json-column", "COLUMN", "column to write as .json; may be given again"),
    ):
        container.add_argument(
            flag, action="append", default=[], metavar=metavar, help=f"{what} (default: none)"
        )
    order.add_argument(
        "--shuffle", type=int, metavar="SEED", help="shuffle, always alike for a seed (default: no)"
    )
    shards.add_argument(
        "--index",
        action="append",
        default=[],
        choices=("dali", "wids"),
        help="index files to write; may be given again (default: none)",
    )
    shards.add_argument(
        "--dry-run",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="only say what would be written (default no)",
    )
    _add_job(select, "folder or URL for the new shards", ["overwrite"])
    _add_reader(select.add_argument_group("reader"), ["device", "relative_to", "checksum"])
    _add_cluster(select)


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=_format_examples(_EXAMPLES[name]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _format_examples(*examples: str) -> str:
    lines = [f"  dask-imgread {line}" for example in examples for line in example.splitlines()]
    return "\n".join(["examples:", *lines])


def _add_shards(command: argparse.ArgumentParser, what: str = "file, folder, glob or URL") -> None:
    """Add the arguments for the shards, and for dividing them into partitions."""
    command.add_argument("shards", nargs="*", metavar="SHARDS", help=what)
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
    _add_pairs(
        command,
        "--storage-option",
        "option of fsspec's file system, such as anon=true; true, numbers and JSON are taken as "
        "such (default: none)",
    )


_JOB_FLAGS = (
    ("retry-failed", "read partitions with failed images again"),
    ("update", "read what is new or has changed since the last run"),
    ("prune", "with --update: remove the rows of shards that are gone"),
    ("dry-run", "say what would be done, and do nothing"),
    ("overwrite", "remove what is in DIR and begin anew"),
    ("fail-on-error", "exit with 1 if an image could not be read"),
)


def _add_job(
    command: argparse.ArgumentParser,
    out: str = "folder or URL for the Parquet dataset",
    flags: Collection[str] = tuple(dict(_JOB_FLAGS)),
) -> None:
    """Add the arguments for a job's output, and for how it runs."""
    job = command.add_argument_group("job")
    job.add_argument("--out", metavar="DIR", help=out)
    _add_pairs(
        job,
        "--out-option",
        "option of the file system of DIR (default: as --storage-option if it is remote)",
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
    for name, what in _JOB_FLAGS:
        if name in flags:
            job.add_argument(
                f"--{name}",
                action=argparse.BooleanOptionalAction,
                default=False,
                help=f"{what} (default no)",
            )
    if "update" in flags:
        job.add_argument(
            "--rows-per-file",
            type=int,
            metavar="N",
            help="merge partitions into files of N rows (default: a file for each)",
        )
    _add_log_format(job)


def _add_log_format(container: argparse._ActionsContainer) -> None:
    container.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="format of the log and the summary (default text)",
    )


def _add_cluster(command: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the cluster."""
    cluster = command.add_argument_group("cluster (default: one is started on this machine)")
    which = cluster.add_mutually_exclusive_group()
    which.add_argument("--scheduler", metavar="ADDRESS", help="address of a running scheduler")
    which.add_argument(
        "--scheduler-file",
        metavar="FILE",
        help="file that the scheduler has written its address to",
    )
    cluster.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="workers to start (default: one for each GPU or core), or, with a scheduler, to wait "
        "for (default 1)",
    )


def _add_pairs(container: argparse._ActionsContainer, flag: str, what: str) -> None:
    """Add an option that is given once for each storage option."""
    container.add_argument(
        flag, action="append", default=[], type=_parse_pair, metavar="KEY=VALUE", help=what
    )


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
                raise ValueError(
                    f"storage option {parent} has a value, and {name} another: leave one out"
                )
        inner[last] = value
    return merged


def _parse_pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError("KEY=VALUE is expected")  # what was given may be secret
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def merge_sidecars(
    given: Iterable[tuple[str, list[tuple[str, str | None]]]],
) -> dict[str, dict[str, str | None]]:
    """Return the columns of all ``--sidecar`` by extension, with their types.

    >>> merge_sidecars([("json", [("url", None)]), ("json", [("similarity", "float64")])])
    {'json': {'url': None, 'similarity': 'float64'}}
    """
    merged: dict[str, dict[str, str | None]] = {}
    for extension, columns in given:
        for name, dtype in columns:
            if name in merged.setdefault(extension, {}):
                raise ValueError(f"--sidecar gives {name} of {extension} twice: leave one out")
            merged[extension][name] = dtype
    return merged


def _parse_sidecar(text: str) -> tuple[str, list[tuple[str, str | None]]]:
    """Parse ``EXT=NAME[:TYPE],...``.

    >>> _parse_sidecar("json=url,similarity:float64")
    ('json', [('url', None), ('similarity', 'float64')])
    """
    extension, _, names = text.partition("=")
    pairs = [name.partition(":") for name in names.split(",")]
    complete = all(name and bool(dtype) == bool(colon) for name, colon, dtype in pairs)
    if not extension or not complete:
        raise argparse.ArgumentTypeError(
            f"EXT=NAME[:TYPE],... is expected, such as json=url,similarity:float64, not {text!r}"
        )
    return extension, [(name, dtype or None) for name, _, dtype in pairs]


def _parse_bytes(text: str) -> int:
    """Parse a number of bytes.

    >>> _parse_bytes("64MB"), _parse_bytes("1.5 GiB"), _parse_bytes("1000")
    (64000000, 1610612736, 1000)
    """
    from dask.utils import parse_bytes  # here: help does not wait for Dask

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


# The reader's options: names, types and defaults come from ReaderOptions.

READER_HELP = {
    "device": "what decodes; auto is a GPU where there is one",
    "dali_batch_size": "images decoded together",
    "num_threads": "threads that decode, at most",
    "num_gpus_per_worker": "share of a GPU that a reader holds",
    "on_error": "what to do with an image that can't be read",
    "max_pixels": "refuse larger images",
    "max_batch_bytes": "maximum bytes of decoded images and sidecars in a batch",
    "read_ahead": "maximum bytes of a remote or compressed shard read in advance",
    "resize": "resize images, such as to 256 or 224x224",
    "fit": "scale the shorter side, stretch to the exact size, or cover it and crop the rest; auto "
    "is shorter for SIDE, exact for HEIGHTxWIDTH",
    "resample": "filter of --resize",
    "decoder": "auto is the fastest for each format, dali is DALI on a CPU too",
    "scaled_decoding": "begin --resize with JPEGs decoded at 1/2, 1/4 or 1/8 of their size",
    "min_side": "reduce images to 1/8, 1/4 or 1/2, not below this length of the shorter side",
    "relative_to": "make ids from the shards' paths below it, not from whole paths",
    "isolate": "decode each image in a child process, which a broken one may crash",
    "sidecars": "read the samples' other members too",
    "checksum": "compute the SHA-256 of each image's encoded bytes",
    "md5": "compute their MD5, for lists of these",
}
# What a fingerprint needs of the reader.
_FIXED_FOR_FINGERPRINTS = (
    *("sidecars", "checksum", "md5", "resize", "fit", "resample", "scaled_decoding", "min_side"),
)
NOT_OFFERED = {  # the reader's other options, and why they are not on this list
    "decode": "only metadata has it, with a default of its own; apply and verify always decode",
    "verbose": "the progress shows what these log lines would",
    "name": "it stands in those log lines alone",
    "output": "with arrays on a GPU a function of apply would work only where there is one",
}
_METAVARS = {
    "num_gpus_per_worker": "SHARE",
    "max_batch_bytes": "BYTES",
    "read_ahead": "BYTES",
    "resize": "SIDE|HEIGHTxWIDTH",
    "relative_to": "FOLDER",
}
_PARSERS: dict[str, Callable[[str], Any]] = {
    "max_batch_bytes": _parse_bytes,
    "read_ahead": _parse_bytes,
    "resize": _parse_size,
}


def _add_reader(
    container: argparse._ActionsContainer,
    names: Iterable[str],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add options of the reader, with other defaults than its own where some are given."""
    hints = get_type_hints(ReaderOptions)
    own = {field.name: field.default for field in fields(ReaderOptions)}
    for name in names:
        default = {**own, **(defaults or {})}[name]
        container.add_argument(
            f"--{name.replace('_', '-')}",
            default=default,
            help=f"{READER_HELP[name]} (default {_format_default(name, default)})",
            **_describe_values(name, hints[name]),
        )


def _describe_values(name: str, hint: Any) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for the type of an option's values."""
    if bool in (hint, *get_args(hint)):
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    parse = _PARSERS.get(name)
    if parse is None:
        (parse,) = {*(get_args(hint) or [hint])} - {NoneType}
    return {"type": parse, "metavar": _METAVARS.get(name, "N")}


def _format_default(name: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value >> 20}MiB" if _PARSERS.get(name) is _parse_bytes else str(value)
