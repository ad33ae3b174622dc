"""What fingerprints say of a job's images: a section of the report, with the most striking ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
from fsspec import AbstractFileSystem

from dask_imgread.duplicates import find_duplicates
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.report.elements import (
    render_banner,
    render_card,
    render_grid,
    render_panel,
    render_section,
    render_tile,
)
from dask_imgread.report.parts import Parts
from dask_imgread.report.plots import describe_range, draw_histogram, format_number
from dask_imgread.report.statistics import (
    Floats,
    Histogram,
    Lowest,
    Row,
    count_threads,
    join_tables,
    open_part,
    read_parts,
)
from dask_imgread.tasks import CHECKSUM

# Rows among which duplicates are looked for: that takes most of a minute on two cores, and a
# gigabyte of memory. Who has more of them wants the list, and not a few pictures on a page.
MOST_ROWS = 2_000_000

_PICTURED = 12  # of each kind
_GROUPS, _MEMBERS = 6, 6  # of duplicates that are shown; images of each
_DISTANCE = 4  # bits
_LEAST_SHARPNESS = 0.01  # on a logarithmic axis, which has no 0
_MEASURES = {  # title, unit, and where a linear axis ends; 0 for a logarithmic one
    "brightness": ("Brightness (0 to 255)", "", 256),
    "contrast": ("Contrast (0 to 1)", "", 1),
    "entropy": ("Entropy", "bits", 8),
    "colourfulness": ("Colourfulness", "", 512),
    "sharpness": ("Sharpness (without blank images)", "", 0),
}
_FLAGS = {
    "blank": ("Blank", "of one colour"),
    "grey": ("Grey", "without colours"),
    "flat_tail": ("Flat tail", "the lower part is of one colour"),
    "border": ("Border", "margins of one colour"),
}
_KINDS = {  # title of the pictures, and what the number under each is
    "sharpness": ("The most blurred", "sharpness"),
    "brightness": ("The darkest", "brightness"),
    "flat_tail": ("Flat tails", ""),
}
_SOUGHT = {
    CHECKSUM: ("Equal files", "have the same SHA-256", ""),
    "phash": (
        "Similar images",
        f"have hashes that differ in {_DISTANCE} bits or fewer",
        "; blank images are not compared",
    ),
}
_PLACE = pa.schema(
    {
        **dict.fromkeys(("image_id", "shard"), pa.large_string()),
        **dict.fromkeys(("offset", "size", "width", "height"), pa.int64()),
        "format": pa.large_string(),
    }
)
_SCHEMA = pa.schema(
    [
        *_PLACE,
        *(pa.field(name, pa.float64()) for name in _MEASURES),
        *(pa.field(name, pa.bool_()) for name in _FLAGS),
    ]
)


class Group(NamedTuple):
    """A few images of a group of duplicates, how many bits each differs, and how many there are."""

    rows: list[Row]
    bits: list[int]
    size: int


@dataclass(frozen=True)
class Duplicates:
    """The biggest groups of duplicates, and how many groups and images in groups there are.

    ``problem`` says why they are not known.
    """

    groups: int = 0
    images: int = 0
    biggest: Sequence[Group] = ()
    problem: str = ""


@dataclass
class Fingerprints:
    """What the fingerprints of any number of images say, in memory that does not grow with them."""

    images: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram(limit) for name, (*_, limit) in _MEASURES.items()}
    )
    pictured: dict[str, Lowest] = field(
        default_factory=lambda: {kind: Lowest(_PICTURED) for kind in _KINDS}
    )
    duplicates: dict[str, Duplicates] = field(default_factory=dict)

    def add(self, rows: pa.Table, rng: np.random.Generator) -> None:
        """Add rows; those that lack a measure, as no fingerprint does, are left out."""
        rows = rows.drop_null()
        self.images += len(rows)
        measures: dict[str, Floats] = {name: rows[name].to_numpy() for name in _MEASURES}
        flags = {name: rows[name].to_numpy() for name in _FLAGS}
        self.flags += {name: int(flag.sum()) for name, flag in flags.items()}
        seen = ~flags["blank"]
        drawn = measures | {"sharpness": measures["sharpness"][seen].clip(_LEAST_SHARPNESS)}
        for name, values in drawn.items():
            self.histograms[name].add(values[np.isfinite(values)] + 0.0)  # -0.0 becomes 0
        places = rows.select(_PLACE.names)
        cut = flags["flat_tail"]
        self.pictured["sharpness"].add(places.filter(seen), measures["sharpness"][seen])
        self.pictured["brightness"].add(places, measures["brightness"])
        self.pictured["flat_tail"].add(places.filter(cut), rng.random(int(cut.sum())))

    def merge(self, other: Fingerprints) -> None:
        """Add what the fingerprints of other images say."""
        self.images += other.images
        self.flags += other.flags
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])
        for kind, lowest in self.pictured.items():
            lowest.merge(other.pictured[kind])


def survey_fingerprints(folder: JobFolder, parts: Parts) -> Fingerprints | None:
    """Return what the fingerprints of a job's images say, None if its rows have none.

    The rows are read once, and for duplicates their hashes twice more. That is slow where there are
    many: most of a minute for ``MOST_ROWS``. If there are more, duplicates are not looked for.
    """
    fs, _ = folder.connect()
    if not parts.rows or not _has_columns(fs, parts.rows[0]):
        return None
    threads = count_threads(fs)

    def survey(first: int) -> Fingerprints:
        found = Fingerprints()
        rng = np.random.default_rng(first)  # so that the same rows give the same page
        for rows in join_tables(read_parts(fs, parts.rows[first::threads], _SCHEMA)):
            found.add(rows, rng)
        return found

    total = Fingerprints()
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(survey, range(threads)):
            total.merge(found)
    if total.images > MOST_ROWS:
        problem = (
            f"Not looked for among more than {MOST_ROWS:,} images: `dask-imgread duplicates` does."
        )
        total.duplicates = dict.fromkeys(_SOUGHT, Duplicates(problem=problem))
    elif parts.merged and total.images:
        total.duplicates = {by: _find_biggest(folder, by) for by in _SOUGHT}
    return total


def _has_columns(fs: AbstractFileSystem, path: str) -> bool:
    """Return whether rows have fingerprints: all parts of a job have the same columns."""
    with open_part(fs, path) as parquet:
        schema = parquet.schema_arrow
    given = {name: schema.field(name).type for name in {*schema.names}}
    kinds = (
        (_MEASURES, pa.types.is_floating),
        (_FLAGS, pa.types.is_boolean),
        (["phash", "offset", "size", "width", "height"], pa.types.is_integer),
    )
    return {*_SCHEMA.names, *_SOUGHT} <= given.keys() and all(
        is_kind(given[name]) for names, is_kind in kinds for name in names
    )


# Duplicates


def _find_biggest(folder: JobFolder, by: str) -> Duplicates:
    """Find the biggest groups of duplicates, in the threads of this process and on its disk."""
    with dask.config.set({"scheduler": "threads", "dataframe.shuffle.method": "disk"}):
        try:
            found = find_duplicates(
                folder.url, by, distance=_DISTANCE, storage_options=folder.storage_options
            )
            taken = dask.compute(*map(dask.delayed(_take_biggest), found.to_delayed()))
        except ValueError as error:  # images of a group have the same id
            return Duplicates(problem=str(error))
    rows = pd.concat([some for *_, some in taken])
    groups = [_make_group(some) for _, some in rows.groupby("group")]
    return Duplicates(
        sum(groups for groups, *_ in taken),
        sum(images for _, images, _ in taken),
        sorted(groups, key=lambda group: -group.size)[:_GROUPS],
    )


def _take_biggest(rows: pd.DataFrame) -> tuple[int, int, pd.DataFrame]:
    """Return how many groups and images there are, and a few rows of the biggest groups."""
    counts = rows["group"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    some = rows[rows["group"].isin(counts.index[:_GROUPS]).to_numpy(bool)].reset_index()
    some = some.sort_values(["keep", "distance", "image_id"], ascending=[False, True, True])
    some = some.groupby("group").head(_MEMBERS)
    return len(counts), len(rows), some.assign(count=some["group"].map(counts))


def _make_group(rows: pd.DataFrame) -> Group:
    found = [Row(*place) for place in rows[_PLACE.names].itertuples(index=False, name=None)]
    return Group(found, rows["distance"].tolist(), int(rows["count"].iloc[0]))


# The page


def list_pictured(found: Fingerprints | None) -> list[Row]:
    """Return the images that the section shows."""
    if found is None:
        return []
    rows = [row for lowest in found.pictured.values() for row in lowest.rows]
    groups = (group for some in found.duplicates.values() for group in some.biggest)
    return rows + [row for group in groups for row in group.rows]


def render_fingerprints(found: Fingerprints | None, pictures: Mapping[str, str]) -> str:
    """Return the section about measures and flags; ``pictures`` are by image id."""
    if not found or not found.images:
        return ""
    cards = [
        render_card(title, f"{count:,}", f"{count / found.images:.2%} · {note}")
        for name, (title, note) in _FLAGS.items()
        for count in [found.flags[name]]
    ]
    plots = []
    for name, (title, unit, _) in _MEASURES.items():
        histogram = found.histograms[name]
        if histogram.counts.any():
            plot = draw_histogram(histogram, title.lower(), unit)
            plots.append(render_panel(title, describe_range(histogram, unit), plot))
    content = [render_grid("cards", cards), render_grid("thirds", plots)]
    content += [_render_pictured(kind, found, pictures) for kind in _KINDS]
    return render_section("Fingerprints", render_grid("", filter(None, content)))


def render_duplicates(found: Fingerprints | None, pictures: Mapping[str, str]) -> str:
    """Return the sections about equal and similar images; ``pictures`` are by image id."""
    if not found or not found.images:
        return ""
    return "".join(_render_groups(by, some, pictures) for by, some in found.duplicates.items())


def _render_pictured(kind: str, found: Fingerprints, pictures: Mapping[str, str]) -> str:
    title, measure = _KINDS[kind]
    lowest = found.pictured[kind]
    if not lowest.rows:
        return ""
    note, of = f"the lowest {measure} first", found.images
    if kind == "sharpness":
        of -= found.flags["blank"]
        note += ", without blank images"
    elif kind == "flat_tail":
        note, of = "drawn at random", found.flags[kind]
    tiles = (
        render_tile(
            pictures[row.image_id],
            row.image_id,
            f"{measure} {format_number(number)}" if measure else _describe_size(row),
        )
        for row, number in zip(lowest.rows, lowest.numbers, strict=True)
    )
    shown = f"{len(lowest.rows):,} of {of:,}, {note}"
    return render_panel(title, shown, render_grid("sheet", tiles))


def _render_groups(by: str, found: Duplicates, pictures: Mapping[str, str]) -> str:
    title, alike, but = _SOUGHT[by]
    if found.problem:
        return render_section(title, render_banner(escape(found.problem), "warn"))
    if not found.groups:
        return render_section(title, render_banner(f"None: no two {alike}{but}.", "good"))
    panels = [_render_group(group, by, pictures) for group in found.biggest]
    counted = f"{found.images:,} in {found.groups:,} group{'s' if found.groups > 1 else ''}"
    shown = f", the biggest {len(panels)}" if len(panels) < found.groups else ""
    note = f'<p class="soft">They {alike}{but}.</p>'
    content = render_grid("", [note, render_grid("halves", panels)])
    return render_section(f"{title}: {counted}{shown}", content)


def _render_group(group: Group, by: str, pictures: Mapping[str, str]) -> str:
    tiles = (
        render_tile(
            pictures[row.image_id],
            row.image_id,
            _describe_size(row) + (f" · {bits} bits differ" if by == "phash" and bits else ""),
        )
        for row, bits in zip(group.rows, group.bits, strict=True)
    )
    shown = f"{len(group.rows)} of {group.size:,}"
    return render_panel(f"{group.size:,} images", shown, render_grid("trio", tiles))


def _describe_size(row: Row) -> str:
    return f"{row.width:,} \u00d7 {row.height:,} · {row.format}"
