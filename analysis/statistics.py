"""Means over seeds, and calibrations compared with a reference, seed by seed.

Perplexities are compared on the log scale: their noise is multiplicative, and ratios carry over
from one model to another. Effects and intervals are percent of the reference's perplexity.
Accuracies are compared as they are, in percentage points. Intervals and p-values are Student's t
over seeds, so they cover the draw of calibration data but not the draw of questions, which are the
same for all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from analysis.labels import NO_CALIBRATION, in_order
from analysis.load import TableError
from analysis.metrics import Values, metric_named

CONFIDENCE = 0.95

_SETTING = [
    *("grid", "model", "pruner", "method", "sparsity", "pattern", "bits", "target"),
    *("task", "metric"),
]
"""Columns that two calibrations share when they are compared."""

CALIBRATION = ["calibration", "source"]

ROUNDING = 1e-12
"""A spread below this share of the values is rounding error."""


class Interval(NamedTuple):
    """A mean with Student's t interval; NaN where the values do not determine it."""

    mean: float
    low: float
    high: float
    p: float
    """Two-sided p-value for a mean of 0."""


def t_interval(values: Sequence[float] | Values) -> Interval:
    """Return the mean's 95 % interval and p-value; see `t_intervals`."""
    array = pd.Series(np.asarray(values, dtype=np.float64))
    row = t_intervals(array, [np.zeros(len(array), dtype=np.int64)]).iloc[0]
    return Interval(row["mean"], row["low"], row["high"], row["p"])


def t_intervals(values: "pd.Series[float]", by: Any) -> pd.DataFrame:
    """Return Student's t interval of each group's mean.

    The columns are `mean`, `sd`, `standard_error`, 95 % `low` and `high`, `p` (two-sided, for a
    mean of 0) and `n`. One value has a mean only. Values that are all equal, such as two seeds
    whose accuracies differ by the same number of questions, have no interval either: two equal
    values do not show that there is no spread.

    Args:
        values: one number per row.
        by: each row's group, as `pandas.Series.groupby` takes it; groups are sorted.
    """
    with np.errstate(invalid="ignore", divide="ignore"):  # infinite values have no spread
        groups = values.groupby(by, dropna=False, observed=True)
        moments = groups.agg(["mean", "std", "min", "max", "size"])
        n = moments["size"].to_numpy()
        scale = moments[["min", "max"]].abs().max(axis=1).to_numpy()
        ptp = (moments["max"] - moments["min"]).to_numpy()
        known = (n > 1) & np.isfinite(scale) & (ptp > ROUNDING * np.maximum(scale, 1.0))
        mean, sd = moments["mean"].to_numpy(), moments["std"].to_numpy()
        error = np.where(known, sd / np.sqrt(n), np.nan)
        half = stats.t.ppf((1 + CONFIDENCE) / 2, np.maximum(n - 1, 1)) * error
        p = 2 * stats.t.sf(np.abs(mean) / error, np.maximum(n - 1, 1))
        return pd.DataFrame(
            {
                "mean": mean,
                "sd": sd,
                "standard_error": sd / np.sqrt(n),
                "low": mean - half,
                "high": mean + half,
                "p": p,
                "n": n,
            },
            index=moments.index,
        )


def has_spread(values: Values) -> bool:
    """Return whether there are two or more finite values that differ by more than rounding."""
    scale = float(np.abs(values).max(initial=0.0))
    return bool(
        len(values) > 1
        and np.isfinite(scale)
        and float(np.ptp(values)) > ROUNDING * max(scale, 1.0)
    )


def holm(p_values: Sequence[float] | Values) -> Values:
    """Return p-values with Holm's step-down adjustment; NaN stays NaN and is not counted.

    statsmodels' own collects garbage at every call, which takes up to half a second in a notebook.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN comes last
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with a number.

    Raises:
        TableError: if two cells of one grid have the same labels and seed: their mean would hide
            what they differ in.
    """
    rows = table[(table["status"] == "ok") & table["value"].notna()]
    twice = rows[rows.duplicated([*_SETTING, *CALIBRATION, "seed"], keep=False)]
    if not twice.empty:
        first = twice.iloc[0]
        raise TableError(
            f"cells {', '.join(sorted(twice['cell'].unique())[:4])}: each is {first['model']}, "
            f"{first['method']}, {first['target']}, {first['source']}, seed {first['seed']}: "
            "give their calibrations different names in the grid"
        )
    return rows


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per setting and calibration, averaged over seeds.

    Columns after the names: `mean`, `sd`, `standard_error`, `low` and `high` (95 % t interval of
    the mean) and `n`, the number of values. With one value only the mean is not NaN.
    """
    rows = measured(table)
    keys = [rows[name] for name in [*_SETTING, *CALIBRATION]]
    return t_intervals(rows["value"], keys).drop(columns="p").reset_index()


def compare_with_reference(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Compare each calibration with a reference, paired by seed within each setting.

    Columns after the names: `reference`; `pairs` (seeds that both have); `mean` and
    `reference_mean` over these; their `difference`; `effect` with its 95 % interval `low` to
    `high` in `unit`; `better`, whether the effect favours the calibration; `p`; and `p_holm`,
    corrected for all comparisons of one grid, model, task and metric. One pair has no interval and
    no p.

    Args:
        table: as `load_results` returns it.
        reference: a calibration's name, or its label in `source`.

    Raises:
        TableError: if there is no such calibration.
    """
    rows = measured(table)
    rows = rows[rows["calibration"] != NO_CALIBRATION]
    label = reference_label(rows, reference)
    by_reference = rows.loc[rows["source"] == label, [*_SETTING, "seed", "value"]]
    pairs = rows[rows["source"] != label].merge(
        by_reference, on=[*_SETTING, "seed"], suffixes=("_a", "_b")
    )
    compared = paired_effects(pairs, [*_SETTING, *CALIBRATION])
    compared = compared.rename(columns={"mean_a": "mean", "mean_b": "reference_mean"})
    families = compared.groupby(
        ["grid", "model", "task", "metric"], dropna=False, observed=True, sort=False
    )["p"]
    return compared.assign(p_holm=families.transform(lambda p: holm(p.to_numpy())), reference=label)


def paired_effects(pairs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the mean difference of `value_a` from `value_b` in each group, on the metric's scale.

    Columns after those of `by`: `pairs`; `mean_a` and `mean_b`; their `difference`; `effect` with
    its 95 % t interval `low` to `high` in `unit`; `better`, whether the effect favours a; `p`.

    Args:
        pairs: `value_a` and `value_b`, one pair per row.
        by: the columns that name a group, `metric` among them.
    """
    keys = [pairs[name] for name in by]
    intervals = t_intervals(scaled_differences(pairs), keys)
    means = pairs[["value_a", "value_b"]].groupby(keys, dropna=False, observed=True).mean()
    metrics = intervals.index.get_level_values("metric").to_series(index=intervals.index)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "pairs": intervals["n"],
                "mean_a": means["value_a"],
                "mean_b": means["value_b"],
                "difference": means["value_a"] - means["value_b"],
                "effect": in_units(intervals["mean"], metrics),
                "low": in_units(intervals["low"], metrics),
                "high": in_units(intervals["high"], metrics),
                "unit": metrics.map(lambda name: metric_named(name).unit),
                "better": np.where(
                    metrics.map(_lower_is_better).astype(bool),
                    intervals["mean"] < 0,
                    intervals["mean"] > 0,
                ),
                "p": intervals["p"],
            }
        ).reset_index()


def scaled_differences(pairs: pd.DataFrame) -> "pd.Series[float]":
    """Return `value_a` minus `value_b` of each row, on the scale of its metric."""
    differences = pd.Series(np.nan, pairs.index, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, rows in pairs.groupby("metric", observed=True):
            kind = metric_named(str(name))
            a, b = rows["value_a"].to_numpy(), rows["value_b"].to_numpy()
            differences[rows.index] = kind.scaled(a) - kind.scaled(b)
    return differences


def in_units(scaled: "pd.Series[float]", metrics: "pd.Series[str]") -> "pd.Series[float]":
    """Return scaled differences in their metrics' units."""
    effects = pd.Series(np.nan, scaled.index, dtype=float)
    for name in metrics.unique():
        rows = (metrics == name).to_numpy()
        effects[rows] = metric_named(name).effect(scaled[rows].to_numpy())
    return effects


def with_mean_accuracy(table: pd.DataFrame) -> pd.DataFrame:
    """Append each cell's mean of `acc` over all tasks, if there are two or more.

    A cell that lacks one of the tasks gets no such row: its mean could not be compared. A group of
    tasks counts as one more task.
    """
    rows = measured(table)
    rows = rows[rows["metric"] == "acc"]
    tasks = rows["task"].nunique()
    if tasks < 2:
        return table
    cells = rows.groupby(["grid", "cell"], observed=True)["value"]
    limits = rows["limit"].astype("float64")
    limits = limits.groupby([rows["grid"], rows["cell"]], observed=True).transform("min")
    whole = rows.assign(value=cells.transform("mean"), limit=limits.astype("Int64"))
    whole = whole[cells.transform("size") == tasks]
    averaged = whole.drop_duplicates(["grid", "cell"]).assign(task=f"mean of {tasks} tasks")
    averaged = averaged.drop(columns=["stderr", "samples"])
    return pd.concat([table, averaged], ignore_index=True)


def best_calibration(table: pd.DataFrame, task: str, metric: str, reference: str) -> pd.DataFrame:
    """Return the best calibration of each setting, compared with a reference.

    The best one has the best mean over seeds, for perplexity the lowest mean logarithm.

    One row per setting with `mean`, `sd` and `n` over all seeds and, unless the reference itself is
    the best, the columns of `compare_with_reference`. The best of several is also the luckiest:
    trust `p_holm`, which counts all candidates, before the interval. Pruners without data have no
    row.

    Raises:
        TableError: if there is no such calibration, or no such metric.
    """
    rows = measured(table)
    chosen = rows[(rows["task"] == task) & (rows["metric"] == metric)]
    if chosen.empty:
        known = in_order(rows["task"] + ": " + rows["metric"])
        raise TableError(f"{task}: {metric} is not in the table: name one of {', '.join(known)}")
    rows = chosen[chosen["calibration"] != NO_CALIBRATION]
    label = reference_label(rows, reference)
    kind = metric_named(metric)
    scaled = kind.scaled(rows["value"].to_numpy()) * (1 if kind.lower_is_better else -1)
    ranked = (
        rows.assign(rank=scaled, other=rows["source"] != label)
        .groupby([*_SETTING, "source", "other"], dropna=False, observed=True)["rank"]
        .mean()
        .reset_index()
        .sort_values([*_SETTING, "rank", "other", "source"])
        .drop_duplicates(_SETTING)
    )
    keys = [*_SETTING, "source"]
    levels = summarize(rows)[[*keys, "calibration", "mean", "sd", "n"]]
    compared = compare_with_reference(rows, label)
    compared = compared.drop(columns=["calibration", "mean", "reference"])
    best = ranked[keys].merge(levels, on=keys).merge(compared, on=keys, how="left")
    return best.assign(reference=label)


def reference_label(table: pd.DataFrame, reference: str) -> str:
    """Return the label in `source` of a calibration given by its label or its name.

    Raises:
        TableError: if there is no such calibration, or several.
    """
    rows = table[table["calibration"] != NO_CALIBRATION]
    if reference in set(rows["source"]):
        return reference
    named = in_order(rows.loc[rows["calibration"] == reference, "source"])
    if len(named) != 1:
        known = named or in_order(rows["source"])
        raise TableError(
            f"reference {reference}: "
            + ("has several settings" if named else "is not a calibration of this table")
            + f": name one of: {'; '.join(known) or 'none, no calibrated pruner has a result'}"
        )
    return named[0]


def _lower_is_better(metric: str) -> bool:
    return metric_named(metric).lower_is_better
