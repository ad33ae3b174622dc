"""What could not be read, what was read with a warning, and in which shards: three sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from dask_imgread.report.elements import (
    TOP,
    describe_top,
    render_banner,
    render_command,
    render_grid,
    render_image,
    render_panel,
    render_placeholder,
    render_ranking,
    render_section,
    render_table,
    render_tile,
)
from dask_imgread.report.statistics import LISTED, Statistics, Trio

_SHARDS = 200  # in the table
_AGAIN = (
    "In Python, the same call of run_job with retry_failed=True reads the partitions that have "
    "failed images again."
)


def render_failures(
    decoded: bool,
    stats: Statistics,
    neighbours: Sequence[Trio],
    pictures: Mapping[str, str],
    command: str,
) -> str:
    """Return the section about images that could not be read.

    Parameters
    ----------
    decoded
        Whether pixels were decoded.
    stats
        The job's statistics.
    neighbours
        Some failed images, each between two that were read.
    pictures
        Thumbnails by image id.
    command
        The command line that reads failed images again; empty if there is none.
    """
    if not stats.failed:
        none = "None: every image could be read."
        if not decoded:
            none = (
                "None seen in the headers. Decoding finds the broken images that seem fine there."
            )
        return render_section("Failures", render_banner(none, "good" if decoded else "warn"))
    causes, listed = stats.failures.counts, stats.failures.list_rows()[:LISTED]
    table = render_table(("image_id", "error"), ((row.image_id, row.error) for row in listed))
    again = render_command(command) if command else f'<p class="soft">{_AGAIN}</p>'
    note = "every partition that has any"
    if "://" in command:
        note += "; add --storage-option where the store needs one"
    panels = [
        render_panel("By cause", describe_top(causes, "cause"), render_ranking(causes, "bad")),
        render_panel("Read them again", note, again),
    ]
    examples = render_panel("Examples", f"{len(listed):,} of {stats.failed:,}", table)
    content = render_grid("", [render_grid("halves", panels), examples])
    trios = [_render_trio(trio, pictures) for trio in neighbours]
    return render_section("Failures", content) + render_section(
        f"Failures between their neighbours, {len(trios):,} of {stats.failed:,}",
        render_grid("halves", trios),
    )


def _render_trio(trio: Trio, pictures: Mapping[str, str]) -> str:
    before, failed, after = trio
    cause, _, detail = failed.error.partition(":")
    tile = (
        f'<div class="picture bad"><strong>{escape(cause)}</strong>'
        f"<span>{escape(detail)}</span></div>"
    )
    tiles = [
        render_image(before, pictures) if before else render_placeholder("none before it"),
        render_tile(tile, failed.image_id, f"{failed.size:,} bytes"),
        render_image(after, pictures) if after else render_placeholder("none after it"),
    ]
    place = f"at byte {failed.offset:,}"
    return render_panel(escape(failed.shard), place, render_grid("trio", tiles))


def render_warnings(stats: Statistics) -> str:
    """Return the section about images that have a warning: a cause, how often, an example."""
    counts, samples = stats.warnings.counts, stats.warnings.samples
    lines = (
        (cause, f"{count:,}", samples[cause].rows[0].error, samples[cause].rows[0].image_id)
        for cause, count in counts.most_common(TOP)
    )
    if not counts:
        return ""
    table = render_table(("cause", "images", "an example", "image_id"), lines)
    causes = describe_top(counts, "cause")
    panel = render_panel(f"Images with a warning: {counts.total():,}", causes, table)
    return render_section("Warnings", panel)


def render_shards(stats: Statistics) -> str:
    """Return the section about shards: a table, which can be sorted, of the worst."""

    def rate(shard: str) -> float:
        return stats.broken[shard] / stats.shards[shard]

    worst = sorted(stats.shards, key=lambda shard: (-rate(shard), -stats.broken[shard], shard))
    lines = []
    for shard in worst[:_SHARDS]:
        images, failed = stats.shards[shard], stats.broken[shard]
        bar = f'<i style="width:{100 * rate(shard):.4g}%"></i>' if failed else ""
        lines.append(
            f"<tr><td>{escape(shard)}</td><td>{images:,}</td><td>{failed:,}</td>"
            f"<td>{rate(shard):.2%}{bar}</td></tr>"
        )
    headings = "".join(
        f"<th{' aria-sort=descending' if name == 'failure rate' else ''}>"
        f"<button>{name}</button></th>"
        for name in ("shard", "images", "failed", "failure rate")
    )
    table = (
        f'<div class="wide tall"><table class="sortable"><thead><tr>{headings}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    note = f"{len(worst):,} shards, {len(stats.broken):,} with failures"
    if len(lines) < len(worst):
        note += f"; the worst {len(lines):,}"
    return render_section("Shards", render_panel("Failures within each", note, table))
