"""Short names that distinguish everything that varies in a grid.

`source` is the calibration with its varied settings; `method` is the pruner with its own, the
allocation and the amount of data; `target` is the sparsity or the N:M pattern. A setting is named
only where it varies within one calibration, pruner or allocation of the grid, so the labels of a
plain grid are plain.

The labels and the columns they are made of are ordered categories: pruners from cheap to costly,
corpora before generated data, sparsities before patterns. Tables and figures thus sort by meaning.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

# `jobs` writes these three, and `analysis` cannot import it: a test compares them.
DENSE = "dense"
"""The pruner of the model that is not pruned."""

NO_CALIBRATION = "none"
"""The calibration of pruners that take no data, and of the dense model."""

UNSTRUCTURED = "unstructured"

PRUNERS = (
    DENSE,
    "magnitude",
    "wanda",
    "wandapp",
    "ria",
    "dsnot",
    "sparseswaps",
    "refit",
    "sparsegpt",
    "alps",
    "rtn",
    "awq",
    "gptq",
)
"""From cheap to costly; other pruners follow by name."""

SOURCE_AXES = {
    "prefix_tokens": "{} prefix tokens",
    "drop_fraction": "{} dropped",
    "drop_by": "dropped by {}",
    "within": "within {}",
    "num_samples": "{} samples",
    "temperature": "temperature {}",
}
"""Columns that make calibration data different data, and their text in a label."""

METHOD_AXES = {
    "pruner_options": "{}",
    "allocation": "{}",
    "allocation_options": "{}",
    "reconstruction": "reconstructed{}",
    "nsamples": "{} windows",
    "seqlen": "{} tokens each",
}
"""Columns that calibrations share where they are compared, and their text in a label."""

WITHIN_ALLOCATION = ("allocation_options", "nsamples", "seqlen")
"""Columns without meaning for some allocations: each allocation names its own varied settings."""

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


def with_labels(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with the columns `source`, `method` and `target`.

    These and `calibration`, `pruner` and `pattern` are ordered categories.
    """
    names = ["pruner", "sparsity", "pattern", "bits"]
    codes, settings = _distinct(table, names)
    targets = [_target(*setting) for setting in settings[names].itertuples(index=False)]
    labelled = table.assign(
        source=_with_varied(table, "calibration", SOURCE_AXES),
        method=_with_varied(_without_bits(table), "pruner", METHOD_AXES),
        target=np.asarray(targets, dtype=object)[codes],
    )
    calibrations = _calibrations(labelled)
    pruners = [
        *(pruner for pruner in PRUNERS if pruner in set(labelled["pruner"])),
        *in_order(set(labelled["pruner"]) - set(PRUNERS)),
    ]
    orders = {
        "calibration": calibrations,
        "pruner": pruners,
        "pattern": _patterns(labelled),
        "source": _by_name(labelled, "source", "calibration", calibrations),
        "method": _by_name(labelled, "method", "pruner", pruners),
        "target": [*([DENSE] if DENSE in pruners else []), *targets_in_order(labelled)],
    }
    return labelled.astype(
        {name: pd.CategoricalDtype(order, ordered=True) for name, order in orders.items()}
    )


def in_order(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels: ordered categories in their order, others with the numbers in
    them by size."""
    if isinstance(labels, pd.Series) and isinstance(labels.dtype, pd.CategoricalDtype):
        present = set(labels.dropna())
        return [label for label in labels.dtype.categories if label in present]
    return sorted(set(labels), key=natural)


def grid_notes(table: pd.DataFrame) -> list[str]:
    """Return the notes to readers of a table's grids."""
    return in_order(table["note"].dropna().astype(str))


def natural(label: str) -> list[str | float]:
    """Return a sort key that puts `4 windows` before `16 windows`."""
    parts = _NUMBER.split(label)
    return [float(part) if odd % 2 else part for odd, part in enumerate(parts)]


def targets_in_order(table: pd.DataFrame) -> list[str]:
    """Return the distinct targets of pruned cells: sparsities by size, then patterns, then what is
    rounded, from many bits to few."""
    pruned = table.loc[table["pruner"] != DENSE, ["bits", "pattern", "sparsity", "target"]]
    distinct = pruned.drop_duplicates("target").astype({"bits": "float"}).fillna({"bits": np.inf})
    ordered = sorted(
        distinct.to_dict("records"),
        key=lambda row: (
            -row["bits"],
            row["pattern"] != UNSTRUCTURED,
            row["sparsity"],
            natural(row["target"]),
        ),
    )
    return [row["target"] for row in ordered]


def _distinct(table: pd.DataFrame, names: Sequence[str]) -> tuple[Any, pd.DataFrame]:
    """Return each row's index among the distinct combinations of values, and the first row of
    each combination."""
    groups = table.groupby(list(names), dropna=False, sort=False, observed=True)
    codes = groups.ngroup().to_numpy()
    first = np.unique(codes, return_index=True)[1]
    return codes, table.iloc[first]


def _without_bits(table: pd.DataFrame) -> pd.DataFrame:
    """Take the bits out of the pruners' options: the target names them."""
    shorter = {}
    for text in table["pruner_options"].dropna().unique():
        options = json.loads(text)
        options.pop("bits", None)
        shorter[text] = json.dumps(options, sort_keys=True)
    return table.assign(pruner_options=table["pruner_options"].map(shorter))


def _with_varied(table: pd.DataFrame, name: str, axes: dict[str, str]) -> Any:
    codes, settings = _distinct(table, ["grid", name, *axes])
    labels = [str(label) for label in settings[name]]
    for axis, text in axes.items():
        within = ["grid", name, *(["allocation"] if axis in WITHIN_ALLOCATION else [])]
        groups = settings.groupby(within, dropna=False, observed=True)
        distinct = groups[axis].transform(lambda column: column.nunique(dropna=False))
        for row, (value, count) in enumerate(zip(settings[axis], distinct, strict=True)):
            if count > 1 and pd.notna(value):
                labels[row] += ", " + text.format(_setting(axis, value))
    return np.asarray(labels, dtype=object)[codes]


def _calibrations(table: pd.DataFrame) -> list[str]:
    """Return none first, then corpora, then what a model wrote, each by name."""
    generated = set(table.loc[table["num_samples"].notna(), "calibration"])
    corpora = set(table["calibration"]) - generated - {NO_CALIBRATION}
    none = [NO_CALIBRATION] if NO_CALIBRATION in set(table["calibration"]) else []
    return [*none, *in_order(corpora), *in_order(generated - {NO_CALIBRATION})]


def _patterns(table: pd.DataFrame) -> list[str]:
    patterns = set(table["pattern"].dropna())
    return sorted(patterns, key=lambda pattern: (pattern != UNSTRUCTURED, natural(pattern)))


def _by_name(table: pd.DataFrame, label: str, name: str, order: list[str]) -> list[str]:
    """Return the labels by the order of the names they begin with, then by what varies."""
    pairs = table[[name, label]].drop_duplicates().itertuples(index=False, name=None)
    ranked = sorted(pairs, key=lambda pair: (order.index(pair[0]), natural(pair[1])))
    return list(dict.fromkeys(text for _, text in ranked))


def _setting(axis: str, value: object) -> str:
    if axis in ("pruner_options", "allocation_options", "reconstruction"):
        options = sorted(json.loads(str(value)).items())
        named = ", ".join(f"{name} {option}" for name, option in options)
        if axis == "reconstruction":
            return f" ({named})" if named else ""
        return named or "default options"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _target(pruner: str, sparsity: float, pattern: object, bits: Any) -> str:
    if pruner == DENSE:
        return DENSE
    patterned = isinstance(pattern, str) and pattern != UNSTRUCTURED
    zeros = str(pattern) if patterned else f"{100 * sparsity:.6g} %"
    if pd.isna(bits):
        return zeros
    return f"{bits} bit, {zeros}" if sparsity else f"{bits} bit"
