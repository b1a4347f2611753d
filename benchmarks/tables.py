"""The tables of a benchmark run."""

from collections.abc import Sequence

from rich.table import Table

from benchmarks.measure import GrowthRow, MaskRow, PrunerRow
from benchmarks.targets import Target


def pruners_table(rows: Sequence[PrunerRow]) -> Table:
    """Return a table of pruners on geometries."""
    table = _table(
        "Pruning",
        ["geometry", "pruner"],
        [
            *("seconds", "plain", "ratio", "differing", "gap"),
            *("TFLOP", "layer/s", "square/s", "floor", "share", "GiB"),
        ],
    )
    for row in rows:
        agreement = row.agreement
        table.add_row(
            row.geometry,
            row.pruner,
            f"{row.seconds:.3f}",
            "" if row.plain_seconds is None else f"{row.plain_seconds:.3f}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if agreement is None else f"{agreement.differing} of {agreement.weights}",
            "" if agreement is None or not agreement.differing else f"{agreement.largest_gap:.0e}",
            f"{row.floating_point_operations / 1e12:.3g}",
            f"{row.layer_rate / 1e12:.3g}",
            f"{row.square_rate / 1e12:.3g}",
            f"{row.floor_seconds:.3f}",
            f"{row.floor_share:.0%}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}",
        )
    return table


def masks_table(rows: Sequence[MaskRow]) -> Table:
    """Return a table of the choice of N:M masks."""
    table = _table("2:4 masks", ["matrix"], ["milliseconds", "loop", "ratio", "differing"])
    for row in rows:
        table.add_row(
            f"{row.rows} x {row.columns}",
            f"{row.seconds * 1e3:.2f}",
            f"{row.plain_seconds * 1e3:.2f}",
            f"{row.ratio:.1f}",
            str(row.differing),
        )
    return table


def growth_table(rows: Sequence[GrowthRow]) -> Table:
    """Return a table of seconds against layers and windows."""
    table = _table("Growth", ["pruner", "axis"], ["sizes", "seconds", "slope", "R²"])
    for row in rows:
        table.add_row(
            row.pruner,
            row.axis,
            " ".join(map(str, row.sizes)),
            " ".join(f"{value:.3f}" for value in row.seconds),
            f"{row.slope:.2g}",
            f"{row.r_squared:.3f}",
        )
    return table


def targets_table(rows: Sequence[Target]) -> Table:
    """Return a table of targets and what was reached."""
    table = _table("Targets", ["target"], ["wanted", "reached", ""])
    for row in rows:
        bound = "at most " if row.at_most else ""
        wanted = "" if row.wanted is None else f"{bound}{row.wanted:.2f}"
        verdict = {None: "", True: "met", False: "missed"}[row.met]
        table.add_row(row.what, wanted, f"{row.reached:.2f}", verdict)
    return table


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
