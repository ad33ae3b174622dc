"""A job's plan: its shards, and the partitions into which they are divided.

Shards and partitions are numbered as they come, and keep their numbers: an update adds to both.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from dask_imgread.errors import OtherJobError
from dask_imgread.jobs.code import describe_edits
from dask_imgread.jobs.folder import CLEARED, JobFolder
from dask_imgread.jobs.parts import PartName, Place, make_token
from dask_imgread.jobs.tables import (
    AGAIN,
    PIECE,
    PLAN,
    SHARDS,
    ShardState,
    list_shards,
    make_homes,
    make_table,
    to_frame,
)
from dask_imgread.shards.find import Shard
from dask_imgread.shards.partition import Division, divide_shards
from dask_imgread.shards.samples import ShardIndex
from dask_imgread.storage.redaction import redact_url
from dask_imgread.tasks import FileGroupTask

FORMAT = 4  # of the folder; a folder of another format is refused
_ROWS = 10_000  # converted to Python objects at the same time
_SHOWN = 3  # shards named in a difference


@dataclass(frozen=True, repr=False)
class Partition:
    """What one task of a job reads, and where it writes the rows.

    Parameters
    ----------
    name
        The part that it writes.
    task
        The shards, or the piece of one.
    shards
        Their numbers.
    tokens
        The tokens of their content.
    replaces
        Whether the part may be there already.
    """

    name: PartName
    task: FileGroupTask
    shards: tuple[int, ...]
    tokens: tuple[int, ...]
    replaces: bool = False

    def __repr__(self) -> str:
        """Return which shards it reads, without credentials."""
        return f"partition {self.name.number}, {self.task!r}"


@dataclass(frozen=True)
class Changes:
    """How the shards that are there differ from those of the plan.

    Parameters
    ----------
    new
        Shards that the plan does not have.
    changed, gone, back
        Numbers of shards that have another content, are not there, or are there again.
    """

    new: list[Shard]
    changed: NDArray[np.int64]
    gone: NDArray[np.int64]
    back: NDArray[np.int64]

    def describe(self, paths: Sequence[str]) -> list[str]:
        """Return in words which shards are new, gone or changed; ``paths`` are the plan's."""
        found = {
            "new": [redact_url(shard.path) for shard in self.new],
            "gone": [paths[number] for number in self.gone],
            "changed": [paths[number] for number in self.changed],
            "there again": [paths[number] for number in self.back],
        }
        return [_name_shards(what, names) for what, names in found.items() if names]


def _name_shards(what: str, paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    number = "1 shard is" if len(paths) == 1 else f"{len(paths)} shards are"
    return f"{number} {what}: {', '.join(paths[:_SHOWN])}{more}"


@dataclass
class Plan:
    """The shards and the partitions of a job.

    Parameters
    ----------
    folder
        Where the plan is kept.
    description
        What ``_job.json`` holds.
    division
        How shards are divided.
    storage_options
        Options for the shards' file system. Left out of ``repr``: they may hold credentials.
    shards
        All shards, by number. The URLs of those that are gone lack their secrets.
    table
        One row for each shard, as in ``_shards-<n>.arrow``.
    partitions
        One row for each partition, as in ``_plan-<n>.arrow``.
    again
        One row for each piece of a shard that is read again, as in ``_again-<n>.arrow``.
    modified
        What is to be written by ``save``.
    """

    folder: JobFolder
    description: dict[str, Any]
    division: Division
    storage_options: dict[str, Any] = field(repr=False)
    shards: list[Shard] = field(repr=False, default_factory=list)
    table: pd.DataFrame = field(repr=False, default_factory=lambda: to_frame(SHARDS))
    partitions: pa.Table = field(repr=False, default_factory=PLAN.empty_table)
    again: pa.Table = field(repr=False, default_factory=AGAIN.empty_table)
    modified: set[str] = field(default_factory=set, init=False)

    @property
    def job_id(self) -> str:
        """The job's id."""
        return str(self.description["id"])

    @property
    def rows_per_file(self) -> int | None:
        """The most rows that partitions are merged up to; None if each is a part of the dataset."""
        rows: int | None = self.description["options"]["rows_per_file"]
        return rows

    @property
    def gone(self) -> int:
        """How many shards are gone."""
        return int((self.states == ShardState.GONE).sum())

    @property
    def states(self) -> NDArray[np.int8]:
        """The ``ShardState`` of each shard."""
        states: NDArray[np.int8] = self.table["state"].to_numpy()
        return states

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """The token of each shard's content: another one if the function was edited."""
        of_code = make_token(json.dumps(self.description["code"], sort_keys=True))
        tokens = (make_token(f"{of_code}-{version}") for version in self.table["version"])
        return np.fromiter(tokens, np.int64, len(self.table))

    def iterate_partitions(
        self, wanted: NDArray[np.bool_], place: Place, replaced: NDArray[np.bool_]
    ) -> Iterator[Partition]:
        """Yield the partitions that are wanted, each made when it is taken.

        Parameters
        ----------
        wanted
            For each row of the table of ``place`` whether it is wanted.
        place
            Where their parts go.
        replaced
            For each row whether its part is there already.
        """
        tokens, present = self.tokens, self.states == ShardState.PRESENT
        table = self.again if place == Place.AGAIN else self.partitions
        start = 0
        for batch in table.to_batches(_ROWS):
            chosen = np.flatnonzero(wanted[start : start + len(batch)])
            for number, row in zip(chosen + start, batch.take(chosen).to_pylist(), strict=True):
                first = row["shard"] if place == Place.AGAIN else row["first"]
                numbers = [n for n in range(first, first + row.get("count", 1)) if present[n]]
                yield Partition(
                    PartName(place, int(number)),
                    self._make_task(f"file_group_{number}", row, [self.shards[n] for n in numbers]),
                    tuple(numbers),
                    tuple(int(tokens[n]) for n in numbers),
                    bool(replaced[number]),
                )
            start += len(batch)

    def _make_task(self, name: str, row: dict[str, Any], shards: list[Shard]) -> FileGroupTask:
        return FileGroupTask(
            data=[shard.path for shard in shards],
            task_id=name,
            reader_config={"storage_options": self.storage_options} if self.storage_options else {},
            byte_range=None if row["start"] is None else (row["start"], row["stop"]),
            index=row["index"] and ShardIndex.from_json(row["index"]),
            versions=tuple(shard.version for shard in shards),
            sizes=tuple(shard.size for shard in shards),
        )

    def compare(self, shards: Sequence[Shard]) -> Changes:
        """Return how the shards that are there now differ from the plan's; keep their URLs."""
        now = list_shards(shards)
        is_first = ~now["identity"].duplicated()  # one may be given twice, differently signed
        now, shards = now[is_first], [s for s, first in zip(shards, is_first, strict=True) if first]
        known = np.flatnonzero(self.states != ShardState.PRUNED)
        places = pd.Index(self.table["identity"].to_numpy()[known]).get_indexer(now["identity"])
        new, old = np.flatnonzero(places < 0), np.flatnonzero(places >= 0)
        numbers = known[places[old]]
        for number, place in zip(numbers.tolist(), old.tolist(), strict=True):
            self.shards[number] = shards[place]
        same = self.table["version"].to_numpy()[numbers] == now["version"].to_numpy()[old]
        is_present = self.states == ShardState.PRESENT
        gone = np.setdiff1d(np.flatnonzero(is_present), numbers)
        back = numbers[same & ~is_present[numbers]]
        return Changes([shards[place] for place in new.tolist()], numbers[~same], gone, back)

    def note(self, changes: Changes, prune: bool = False) -> None:
        """Note which shards have changed, are gone or are back."""
        changed = [self.shards[number] for number in changes.changed]
        self.table.loc[changes.changed, "size"] = [shard.size for shard in changed]
        self.table.loc[changes.changed, "version"] = [shard.version for shard in changed]
        states = self.states.copy()
        states[changes.gone] = ShardState.GONE
        states[changes.back] = states[changes.changed] = ShardState.PRESENT
        if prune:
            states[states == ShardState.GONE] = ShardState.PRUNED
        if changed:
            self.partitions = make_homes(self.partitions, changes.changed)
            self._modify("shards", "plan")
        if not np.array_equal(states, self.states):
            self.table["state"] = states
            self._modify("shards")

    def note_edit(self, code: dict[str, str]) -> None:
        """Note that the function was edited: then no shard's rows are as they should be."""
        self.description["code"] = code
        self._modify("description")

    def add(self, shards: list[Shard]) -> None:
        """Add shards, and the partitions into which they are divided."""
        if shards:
            more = self._divide(shards, len(self.shards))
            self.partitions = pa.concat_tables([self.partitions, more])
            self.table = pd.concat([self.table, list_shards(shards)], ignore_index=True)
            self.shards += shards
            self._modify("shards", "plan")

    def _modify(self, *what: str) -> None:
        self.modified.update(what)
        vars(self).pop("tokens", None)  # they are made anew

    def read_again(self, numbers: NDArray[np.int64]) -> None:
        """Divide some shards anew, each on its own, unless that was done before."""
        known = self.again.select(["shard", "token"]).to_pandas()
        is_valid = self.tokens[known["shard"].to_numpy()] == known["token"].to_numpy()
        tables = [self.again]
        for number in np.setdiff1d(numbers, known["shard"].to_numpy()[is_valid]).tolist():
            pieces = self._divide([self.shards[number]], number).select(list(PIECE))
            where = {"shard": number, "token": self.tokens[number]}
            columns = [pa.array([value] * len(pieces)) for value in where.values()]
            names = [*where, *PIECE]
            tables.append(pa.Table.from_arrays([*columns, *pieces.columns], names).cast(AGAIN))
        if len(tables) > 1:
            self.again = pa.concat_tables(tables)
            self.modified.add("again")

    def save(self) -> None:
        """Write what is modified: tables under new names, then the description, which tells them.

        So they are valid together, or not at all.
        """
        if not self.modified:
            return
        made = {
            "shards": lambda: pa.Table.from_pandas(self.table, SHARDS, preserve_index=False),
            "plan": lambda: self.partitions,
            "again": lambda: self.again,
        }
        before = self.description.get("tables", {})
        number = self.description.get("generation", 0) + 1
        new = {name: f"_{name}-{number}.arrow" for name in made if name in self.modified}
        for name, file in new.items():
            self.folder.write_table(file, made[name]())
        self.description |= {
            "tables": before | new,
            "generation": number,
            "finished": False,
            "partitions": len(self.partitions),
            "shards": len(self.shards),
        }
        self.folder.write_job(self.description)
        self.folder.remove(before[name] for name in new if name in before)
        self.modified.clear()

    def finish(self) -> None:
        """Forget what was read again: it is in the dataset."""
        self.again = AGAIN.empty_table()
        tables = self.description["tables"]
        self.description["tables"] = {name: tables[name] for name in tables if name != "again"}
        self.description["finished"] = True
        self.folder.write_job(self.description)

    def _divide(self, shards: list[Shard], first: int) -> pa.Table:
        return make_table(divide_shards(shards, self.division, self.storage_options), shards, first)


@dataclass(frozen=True)
class Inputs:
    """What a job is made of.

    Parameters
    ----------
    folder
        The job's folder.
    shards
        The shards to read.
    description
        What decides the rows, as ``describe_job`` returns it.
    division
        How the shards are divided. To cut them by their images, the headers of all shards are
        read; only once, as the plan is kept.
    storage_options
        Options for the shards' file system. Left out of ``repr``: they may hold credentials.
    """

    folder: JobFolder
    shards: list[Shard]
    description: dict[str, Any]
    division: Division
    storage_options: dict[str, Any] = field(repr=False)


def prepare_plan(
    inputs: Inputs, *, overwrite: bool = False, update: bool = False, prune: bool = False
) -> tuple[Plan, Changes]:
    """Return the plan that a job has in its folder, or make and write one; and what is new in it.

    Parameters
    ----------
    inputs
        What is to be planned.
    overwrite
        Remove the output of any earlier job, this one's too.
    update
        Accept that shards, or the function, have changed.
    prune
        Remove the rows of shards that are gone.

    Raises
    ------
    OtherJobError
        If the folder holds the output of other inputs or options.
    FileExistsError
        If it holds something that no job has written.
    """
    plan, changes = look_up_plan(inputs, overwrite=overwrite, update=update, prune=prune)
    plan.add(changes.new)
    if "id" not in plan.description:
        plan.folder.clear()  # only now: planning can take long, and fail
        plan.description["id"] = uuid.uuid4().hex
    plan.save()
    return plan, changes


def look_up_plan(
    inputs: Inputs, *, overwrite: bool = False, update: bool = False, prune: bool = False
) -> tuple[Plan, Changes]:
    """Return what ``prepare_plan`` does, without partitions of new shards; nothing is written."""
    folder, description = inputs.folder, _complete(inputs.description, inputs.division)
    earlier = folder.read_job()
    if earlier is None or overwrite or earlier["format"] == CLEARED:
        folder.check_ours()
        plan = Plan(folder, description, inputs.division, inputs.storage_options)
        return plan, plan.compare(inputs.shards)
    differences = _compare_options(earlier, description)
    if differences:
        raise _refuse(folder, differences)
    plan = _load_plan(inputs, earlier)
    changes = plan.compare(inputs.shards)
    edits = describe_edits(earlier["code"], description["code"])
    differences = [*edits, *changes.describe(plan.table["shard"].tolist())]
    if differences and not update:
        raise _refuse(folder, differences, can_update=True)
    if update:
        plan.note(changes, prune)
    if edits:
        plan.note_edit(description["code"])
    return plan, changes


def _complete(description: dict[str, Any], division: Division) -> dict[str, Any]:
    # As they come back from JSON: with lists in place of tuples.
    options = json.loads(json.dumps(description["options"] | asdict(division)))
    begun: dict[str, Any] = {"retries": [], "runs": []}
    return {"format": FORMAT, **description, "options": options, **begun}


def _refuse(folder: JobFolder, differences: list[str], can_update: bool = False) -> OtherJobError:
    way = "Update it (update=True, --update), give" if can_update else "Give"
    return OtherJobError(
        f"{redact_url(folder.url)} holds the output of another job: {'; '.join(differences)}. "
        f"{way} another folder, or overwrite it (--overwrite)"
    )


def _load_plan(inputs: Inputs, description: dict[str, Any]) -> Plan:
    names = description["tables"]
    tables = {name: inputs.folder.read_table(file) for name, file in names.items()}
    table = to_frame(tables["shards"])
    columns = (table[name].tolist() for name in ("shard", "size", "version"))
    shards = [
        Shard(path, None if pd.isna(size) else size, version)
        for path, size, version in zip(*columns, strict=True)
    ]
    return Plan(
        inputs.folder,
        description,
        inputs.division,
        inputs.storage_options,
        shards,
        table,
        tables["plan"],
        tables.get("again", AGAIN.empty_table()),
    )


def _compare_options(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return in words how the options of an earlier job differ from this one's."""
    if earlier["format"] != FORMAT:
        return [f"it has the format {earlier['format']}, not {FORMAT}"]
    pairs = [(name, earlier[name], now[name]) for name in ("command", "function")]
    was, is_ = earlier["options"], now["options"]
    pairs += [(name, was.get(name), is_.get(name)) for name in sorted({*was, *is_})]
    return [f"{name} was {old!r}, and is {new!r}" for name, old, new in pairs if old != new]
