"""Two grids as one table, whose calibrations are the two grids: what changed between two runs.

Cells are paired by all settings that vary within a grid. A setting with one value in each grid,
another in the second, is what the grids differ in. So the statistics of one grid's calibrations
answer which of two grids did better, and by how much.
"""

from typing import Literal, NamedTuple

import pandas as pd

from analysis.labels import DENSE, METHOD_AXES, NO_CALIBRATION, SOURCE_AXES, with_labels
from analysis.load import TableError

_SETTINGS = ("model", "calibration", "pruner", "pattern", "sparsity", *SOURCE_AXES, *METHOD_AXES)
"""Columns that a grid can vary, but the seed."""

_CELL = ["model", "method", "source", "target", "seed"]
"""Columns that say which cell of one grid is which of the other."""

_NUMBER = ["task", "metric"]

_NEITHER = {"calibration": NO_CALIBRATION, "pruner": DENSE}
"""Values that stand for no setting."""


class Comparison(NamedTuple):
    """Two grids' results in one table."""

    table: pd.DataFrame
    """As `load_results` returns it; `source` is the grid, and `method` holds the calibration."""
    first: str
    second: str
    differ: dict[str, tuple[str, str]]
    """Settings with one value in the first grid, another in the second."""
    pairs: int
    """Cells that both grids have."""
    equal: int
    """Of these, cells whose numbers are all equal."""
    unpaired: tuple[int, int]
    """Cells that only the first grid has, and only the second."""
    dense_equal: bool | None
    """Whether the dense models have equal numbers; None if none is measured in both."""

    @property
    def summary(self) -> list[str]:
        """What was paired, in sentences."""
        said = [
            f"{name}: {one} in {self.first}, {other} in {self.second}."
            for name, (one, other) in self.differ.items()
        ]
        said.append(f"{self.pairs} cells are in both, {self.equal} of them with equal numbers.")
        for name, count in zip((self.first, self.second), self.unpaired, strict=True):
            if count:
                said.append(f"{count} are only in {name}.")
        if self.dense_equal is False:
            said.append(
                "The dense models have other numbers: the two grids measure another model, other "
                "texts, or by another version of a library. Do not read differences as gains."
            )
        return said


def compare_grids(first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str]) -> Comparison:
    """Put two grids side by side.

    Args:
        first: one grid's results as `load_results` returns them; the reference.
        second: the other grid's.
        names: what to call them.

    Raises:
        TableError: if the names are equal, or no cell is in both grids.
    """
    if names[0] == names[1]:
        raise TableError(f"{names[0]}: both grids have this name: choose another store or grid")
    differ = _differing(first, second)
    sides = [_side(table, name) for table, name in zip((first, second), names, strict=True)]
    for column in differ:  # one value for both, so that it divides no pair
        value = first.loc[_has(first, column), column].iloc[0]
        for side in sides:
            side[column] = side[column].where(~_has(side, column), value)
    both = with_labels(pd.concat(sides, ignore_index=True))
    pruned = both[both["pruner"] != DENSE]
    cells = _merged(pruned.drop_duplicates("cell"), _CELL, names, "outer")
    places = cells["_merge"].value_counts()
    if not places["both"]:
        varied = [
            name for name in (*_SETTINGS, "seed") if _values(first, name) != _values(second, name)
        ]
        raise TableError(
            f"{names[0]} and {names[1]}: no cell is in both: they differ in {', '.join(varied)}"
        )
    numbers = both[both["value"].notna()]
    dense = _merged(numbers[numbers["pruner"] == DENSE], ["model", *_NUMBER], names, "inner")
    return Comparison(
        table=_as_calibrations(both, names),
        first=names[0],
        second=names[1],
        differ=differ,
        pairs=int(places["both"]),
        equal=_equal_cells(numbers[numbers["pruner"] != DENSE], names),
        unpaired=(int(places["left_only"]), int(places["right_only"])),
        dense_equal=None if dense.empty else bool((dense["value_x"] == dense["value_y"]).all()),
    )


def _side(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return a grid's table without its labels, with cells of its own."""
    named = dict.fromkeys(("calibration", "pruner", "pattern"), "object")
    plain = table.drop(columns=["source", "method", "target"]).astype(named)
    return plain.assign(side=name, grid="both", cell=f"{name}:" + table["cell"])


def _has(table: pd.DataFrame, column: str) -> "pd.Series[bool]":
    return table[column].notna() & (table[column] != _NEITHER.get(column))


def _values(table: pd.DataFrame, column: str) -> list[str]:
    return sorted(set(table.loc[_has(table, column), column].astype(str)))


def _differing(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, tuple[str, str]]:
    values = {name: (_values(first, name), _values(second, name)) for name in _SETTINGS}
    return {
        name: (one[0], other[0])
        for name, (one, other) in values.items()
        if len(one) == len(other) == 1 and one != other
    }


def _merged(
    rows: pd.DataFrame, on: list[str], names: tuple[str, str], how: Literal["inner", "outer"]
) -> pd.DataFrame:
    """Return rows of both grids that have equal values in some columns, side by side."""
    one, other = (rows.loc[rows["side"] == name, [*on, "cell", "value"]] for name in names)
    return one.merge(other, on=on, how=how, indicator=True)


def _equal_cells(numbers: pd.DataFrame, names: tuple[str, str]) -> int:
    """Count the cells whose numbers are the same in both grids, one by one."""
    pairs = _merged(numbers, [*_CELL, *_NUMBER], names, "outer")
    equal = (pairs["_merge"] == "both") & (pairs["value_x"] == pairs["value_y"])
    return int(
        equal.groupby([pairs[name] for name in _CELL], dropna=False, observed=True).all().sum()
    )


def _as_calibrations(both: pd.DataFrame, names: tuple[str, str]) -> pd.DataFrame:
    """Return the table with the grid as calibration, and the calibration as part of the method."""
    is_dense = both["pruner"] == DENSE
    known = set(both.loc[is_dense & (both["side"] == names[0]), "model"])
    rows = both[~is_dense | (both["side"] == names[0]) | ~both["model"].isin(known)]
    is_dense = rows["pruner"] == DENSE
    side = rows["side"].where(~is_dense, NO_CALIBRATION)
    method = rows["method"].astype(str)
    with_data = rows["calibration"] != NO_CALIBRATION
    method = method.where(~with_data, method + ", " + rows["source"].astype(str))
    order = rows.assign(text=method).sort_values(["method", "source"])["text"].unique().tolist()
    sources = pd.CategoricalDtype([NO_CALIBRATION, *names], ordered=True)
    return rows.assign(
        calibration=side.astype(sources),
        source=side.astype(sources),
        method=method.astype(pd.CategoricalDtype(order, ordered=True)),
    ).drop(columns="side")
