"""What ``select`` chooses, writes and prints."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from dask.utils import format_bytes

from dask_imgread.cli.arguments import SUCCESS, merge_sidecars
from dask_imgread.cli.commands import (
    check_readable,
    connect,
    keep_stdout,
    make_reader,
    read_partitioning,
    read_storage_options,
)
from dask_imgread.collections import read_metadata
from dask_imgread.jobs.folder import resolve_out
from dask_imgread.selection.choose import (
    find_digests,
    find_failed,
    find_ids,
    match_rows,
    read_ids,
)
from dask_imgread.selection.folder import NOT_FOUND, REMOVED
from dask_imgread.selection.remove import find_copies, remove_images
from dask_imgread.selection.write import (
    check_apart,
    convert_to_arrow,
    plan_shards,
    write_shards,
)
from dask_imgread.shards.find import find_shards
from dask_imgread.shards.frames import is_lazy, open_frame
from dask_imgread.storage.redaction import redact_url
from dask_imgread.tasks import CHECKSUM

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger("dask_imgread")


def run_select(arguments: argparse.Namespace) -> int:
    """Write chosen images as new shards, or shards without some images."""
    with keep_stdout(arguments):
        result = select(arguments)
    if arguments.log_format == "json":
        print(json.dumps(result | {"out": arguments.out and redact_url(arguments.out)}))
    else:
        print(format_selection(result, arguments))
    return SUCCESS


def select(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do what ``select`` is to do; return the numbers."""
    choice = Choice(arguments)
    storage_options, out_options = read_storage_options(arguments)
    options = {
        "storage_options": storage_options,
        "out_options": out_options,
        "retries": arguments.retries,
        "overwrite": arguments.overwrite,
    }
    frames: list[Any] = []
    paths = []
    for path in arguments.shards:
        frame = open_frame(path, storage_options)
        paths += [path] if frame is None else []
        frames += [] if frame is None else [frame]
    if paths and arguments.failed and not arguments.decode:
        raise ValueError("--failed: only decoding shows which images are broken: add --decode")
    for name in ("sidecar", "checksum", "decode"):
        if getattr(arguments, name) and not paths:
            raise ValueError(
                f"--{name} is for shards: the output of metadata has its columns; leave it out"
            )
    if choice.digests and paths and not arguments.checksum:
        raise ValueError(
            f"{len(choice.digests)} of the ids are SHA-256 digests, and the rows have no column "
            "sha256: add --checksum"
        )
    if arguments.out:
        check_apart(resolve_out(arguments.out, {}, {})[0], paths)
    reader = make_reader(arguments, sidecars=False)
    client: Any = connect(arguments, reader)
    with ExitStack() as stack:
        if paths:
            shards = find_shards(paths, storage_options)
            check_readable(shards, storage_options)
            client = stack.enter_context(client)
            found = read_metadata(
                shards,
                reader=reader,
                decode=arguments.decode,
                sidecars=merge_sidecars(arguments.sidecar),
                storage_options=storage_options,
                **read_partitioning(arguments),
            )
            frames.append(found.compute(scheduler=client))
        rows = concat_rows([f.compute(scheduler="threads") if is_lazy(f) else f for f in frames])
        chosen = choice.find(rows)
        if arguments.not_ids:
            return write_removal(rows, chosen, choice.missing, arguments, client, **options)
        return write_selection(rows, chosen, arguments, client, **options)


def concat_rows(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all frames, indexed by ``image_id``, with Arrow's types."""
    frames = [f.set_index("image_id") if "image_id" in f else f for f in frames]
    return convert_to_arrow(pd.concat(frames))


class Choice:
    """The rows that the arguments choose; ids are read at once, so that a wrong file is told soon.

    Parameters
    ----------
    arguments
        The command's.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        file = arguments.ids or arguments.not_ids
        self._ids = read_ids(file) if file else None
        self.digests = find_digests(self._ids or ())
        self.missing: list[str] = []

    def find(self, rows: pd.DataFrame) -> np.ndarray:
        """Return which rows are chosen: those to write, or with ``--not-ids`` to remove."""
        chosen: np.ndarray = rows["size"].fillna(0).gt(0).to_numpy(bool)
        if self._arguments.where:
            chosen &= match_rows(rows, self._arguments.where)
        if self._arguments.failed:
            if "error" not in rows:
                raise ValueError("--failed: the rows have no column error: give metadata's output")
            chosen &= find_failed(rows)
        if self._ids is not None:
            found, self.missing = find_ids(rows, self._ids)
            chosen &= found
            self._warn_of_unknown(rows)
            if self.missing:
                logger.warning(
                    "%d of %d ids were not found, such as %s",
                    *(len(self.missing), len(self._ids), self.missing[0]),
                )
        return chosen

    def _warn_of_unknown(self, rows: pd.DataFrame) -> None:
        """Say where images may be that were looked for and can't be seen."""
        empty = rows["size"].fillna(0).eq(0)
        damaged = rows["shard"][empty].dropna().unique()
        if len(damaged):
            logger.warning(
                "%d shards can't be read, or not all of them, such as %s: images there are not "
                "found",
                *(len(damaged), redact_url(damaged[0])),
            )
        if self.digests and (unknown := int(rows[CHECKSUM][~empty].isna().sum())):
            logger.warning("%d images have no %s: digests do not find them", unknown, CHECKSUM)


def write_selection(
    rows: pd.DataFrame,
    chosen: np.ndarray,
    arguments: argparse.Namespace,
    client: Client | AbstractContextManager[Client],
    **options: Any,
) -> dict[str, Any]:
    """Write the rows chosen as new shards, unless only numbers are wanted; return these."""
    result: dict[str, Any] = {"images": _count(rows), "chosen": _count(rows[chosen])}
    if not chosen.any():
        return result | {"samples": 0, "shards": 0, "bytes": 0}
    names = ["error"] * arguments.failed + arguments.json_column
    most = (
        {}
        if arguments.images_per_shard is None
        else {"images_per_shard": arguments.images_per_shard}
    )
    how: dict[str, Any] = {
        "sort_by": arguments.sort_by or None,
        "json_columns": list(dict.fromkeys(names)),
    } | most
    if arguments.dry_run:
        plan = plan_shards(rows[chosen], **how)
        return result | {"samples": plan.samples, "shards": plan.shards, "bytes": plan.size}
    frame = write_shards(
        rows[chosen],
        arguments.out,
        shuffle=arguments.shuffle,
        index=arguments.index,
        client=client,
        progress=True,
        **how,
        **options,
    )
    places = frame[["shard", "sample_offset", "sample_size"]].compute(scheduler="threads")
    samples = places.drop_duplicates()
    ends = (samples["sample_offset"] + samples["sample_size"]).groupby(samples["shard"]).max()
    return result | {"samples": len(samples), "shards": len(ends), "bytes": int(ends.sum())}


def _count(rows: pd.DataFrame) -> int:
    """Count rows, once those that several inputs have."""
    return int((~rows[["shard", "offset"]].reset_index().duplicated()).sum())


def write_removal(
    rows: pd.DataFrame,
    chosen: np.ndarray,
    missing: list[str],
    arguments: argparse.Namespace,
    client: Client | AbstractContextManager[Client],
    **options: Any,
) -> dict[str, Any]:
    """Write shards anew without the rows chosen, unless only numbers are wanted; return these."""
    removed = find_copies(rows, chosen)
    if not arguments.dry_run:
        where: dict[str, Any] = {"client": client, "progress": True} | options
        remove_images(rows, chosen, missing, arguments.out, **where)
    return {
        "images": _count(rows),
        "removed": len(removed),
        "shards": int(removed["shard"].nunique()),
        "not_found": len(missing),
    }


def format_selection(result: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    """Return a summary to print."""
    out = redact_url(arguments.out or "")
    if "removed" in result:
        lines = [
            f"removed        {result['removed']:,} of {result['images']:,} images, "
            f"from {result['shards']:,} shards",
            f"not found      {result['not_found']:,} of the ids",
        ]
        places = [
            f"shards         {out}",
            f"receipt        {out}/{REMOVED}, {out}/{NOT_FOUND}",
        ]
    elif not result["chosen"]:
        return f"none of {result['images']:,} images was chosen: nothing is written"
    else:
        lines = [
            f"chosen         {result['chosen']:,} of {result['images']:,} images, "
            f"in {result['samples']:,} samples",
            f"shards         {result['shards']:,}, {format_bytes(result['bytes'])} in all",
        ]
        places = [f"written to     {out}", f"rows           {out}/metadata"]
    return "\n".join(lines + (["nothing is written (--dry-run)"] if arguments.dry_run else places))
