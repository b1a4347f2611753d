"""Short names for what is compared, which tell apart all that varies in a grid.

`source` is the calibration with its varied settings, `method` the pruner with its own, the
allocation and the amount of data, `target` the sparsity or the N:M pattern. A setting is named only
where it varies within one calibration, pruner or allocation of the grid, so plain grids have plain
labels.
"""

import json
import re
from collections.abc import Iterable

import pandas as pd

DENSE = "dense"
"""The pruner of the model that is not pruned."""

NO_CALIBRATION = "none"
"""The calibration of pruners that take no data, and of the dense model."""

UNSTRUCTURED = "unstructured"

SOURCE_AXES = {
    "prefix_tokens": "{} prefix tokens",
    "drop_fraction": "{} dropped",
    "num_samples": "{} samples",
    "temperature": "temperature {}",
}
"""Columns that make calibration data another kind of data, and how a label tells them."""

METHOD_AXES = {
    "pruner_options": "{}",
    "allocation": "{}",
    "allocation_options": "{}",
    "nsamples": "{} windows",
    "seqlen": "{} tokens each",
}
"""Columns within whose values alone calibrations are compared, and how a label tells them."""

WITHIN_ALLOCATION = ("allocation_options", "nsamples", "seqlen")
"""Columns that mean nothing to some allocations: what varies is told of each allocation apart."""

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


def with_labels(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns `source`, `method` and `target`; unchanged if it has them."""
    if {"source", "method", "target"} <= set(table.columns):
        return table
    return table.assign(
        source=_with_varied(table, "calibration", SOURCE_AXES),
        method=_with_varied(table, "pruner", METHOD_AXES),
        target=[
            _target(pruner, sparsity, pattern)
            for pruner, sparsity, pattern in zip(
                table["pruner"], table["sparsity"], table["pattern"], strict=True
            )
        ],
    )


def in_order(labels: Iterable[str]) -> list[str]:
    """Distinct labels, numbers in them by size."""
    return sorted(set(labels), key=natural)


def natural(label: str) -> list[str | float]:
    """Sort key in which `4 windows` comes before `16 windows`."""
    parts = _NUMBER.split(label)
    return [float(part) if odd % 2 else part for odd, part in enumerate(parts)]


def targets_in_order(table: pd.DataFrame) -> list[str]:
    """Distinct targets of pruned cells: unstructured ones by sparsity, then patterns."""
    pruned = table.loc[table["pruner"] != DENSE, ["pattern", "sparsity", "target"]]
    distinct = pruned.drop_duplicates("target").to_dict("records")
    ordered = sorted(
        distinct,
        key=lambda row: (row["pattern"] != UNSTRUCTURED, row["sparsity"], natural(row["target"])),
    )
    return [row["target"] for row in ordered]


def _with_varied(table: pd.DataFrame, name: str, axes: dict[str, str]) -> list[str]:
    labels = [str(label) for label in table[name]]
    for axis, wording in axes.items():
        if axis not in table:
            continue
        within = ["grid", name]
        if axis in WITHIN_ALLOCATION and "allocation" in table:
            within.append("allocation")
        groups = table.groupby(within, dropna=False)
        distinct = groups[axis].transform(lambda column: column.nunique(dropna=False))
        for row, (value, count) in enumerate(zip(table[axis], distinct, strict=True)):
            if count > 1 and pd.notna(value):
                labels[row] += ", " + wording.format(_setting(axis, value))
    return labels


def _setting(axis: str, value: object) -> str:
    if axis in ("pruner_options", "allocation_options"):
        options = json.loads(str(value))
        told = (f"{name} {option}" for name, option in sorted(options.items()))
        return ", ".join(told) or "default options"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _target(pruner: str, sparsity: float, pattern: object) -> str:
    if pruner == DENSE:
        return DENSE
    if isinstance(pattern, str) and pattern != UNSTRUCTURED:
        return pattern
    return f"{100 * sparsity:.6g} %"
