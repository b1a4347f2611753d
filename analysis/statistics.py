"""Means over seeds, and calibrations compared with a reference, seed by seed.

Perplexities are compared on the log scale: noise in them is multiplicative, and what carries over
from one model to another is a ratio. Their effects and intervals are percent of the reference's
perplexity. Accuracies are compared as they are, in percentage points. Intervals and p-values come
from Student's t over seeds, so they speak of the draw of calibration data, not of that of the
questions, which are the same for all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from analysis.labels import NO_CALIBRATION, in_order, with_labels
from analysis.load import TableError
from analysis.metrics import Values, metric_named

CONFIDENCE = 0.95

SETTING = ["grid", "model", "pruner", "method", "sparsity", "pattern", "target", "task", "metric"]
"""What two calibrations have in common when they are compared."""

CALIBRATION = ["calibration", "source"]

ROUNDING = 1e-12
"""Spread below this share of the values is rounding, not spread."""


class Interval(NamedTuple):
    """A mean with Student's t interval; all NaN where the values tell nothing of it."""

    mean: float
    low: float
    high: float
    p: float
    """Two-sided, of the mean being 0."""


def t_interval(values: Sequence[float] | Values) -> Interval:
    """The mean's 95 % interval and p-value.

    One value has neither. Nor have values without spread, such as two seeds whose accuracies
    differ by the same number of questions: no spread seen is not no spread.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    scale = float(np.abs(array).max())
    if len(array) < 2 or not np.isfinite(scale) or np.ptp(array) <= ROUNDING * max(scale, 1.0):
        return Interval(mean, np.nan, np.nan, np.nan)
    error = float(array.std(ddof=1)) / np.sqrt(len(array))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, len(array) - 1))
    return Interval(mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float] | Values) -> Values:
    """Holm's step-down adjustment for testing them together; NaN stays NaN and is not counted.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    stepped = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with a number, labelled.

    Raises:
        TableError: if two cells of one grid differ in nothing that the labels tell, since their
            mean would hide what they do differ in.
    """
    rows = with_labels(table)
    rows = rows[(rows["status"] == "ok") & rows["value"].notna()]
    twice = rows[rows.duplicated([*SETTING, *CALIBRATION, "seed"], keep=False)]
    if not twice.empty:
        first = twice.iloc[0]
        raise TableError(
            f"cells {', '.join(sorted(twice['cell'].unique())[:4])}: all are {first['model']}, "
            f"{first['method']}, {first['target']}, {first['source']}, seed {first['seed']}: "
            "give their calibrations different names in the grid"
        )
    return rows


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """One row a setting and calibration, over its seeds.

    Columns besides what names them: `mean`, `sd`, `standard_error`, `low` and `high` (95 % t
    interval of the mean) and `n`, the values behind it. With one value all but the mean are NaN.
    """
    return _grouped(measured(table), _mean_row)


def compare(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Each calibration against a reference one, paired by seed within each setting.

    Columns besides what names them: `reference`; `pairs` (seeds that both have); `mean` and
    `reference_mean` over these; `difference` of the two; `effect` with its 95 % interval `low` to
    `high` in `unit`; `better` (the effect's direction); `p`, and `p_holm`, which is corrected for
    all comparisons of one grid, model, task and metric. One pair has no interval and no p.

    Args:
        table: as `load` gives it.
        reference: a calibration's name, or its label in `source`.

    Raises:
        TableError: if there is no such calibration.
    """
    rows = measured(table)
    rows = rows[rows["calibration"] != NO_CALIBRATION]
    label = reference_label(rows, reference)
    by_reference = rows.loc[rows["source"] == label, [*SETTING, "seed", "value"]]
    pairs = rows[rows["source"] != label].merge(
        by_reference, on=[*SETTING, "seed"], suffixes=("", "_reference")
    )
    compared = _grouped(pairs, _comparison_row)
    if compared.empty:
        columns = [*SETTING, *CALIBRATION, *_comparison_row(pairs, "perplexity"), "p_holm"]
        return pd.DataFrame(columns=[*columns, "reference"])
    families = compared.groupby(["grid", "model", "task", "metric"], dropna=False)["p"]
    return compared.assign(p_holm=families.transform(lambda p: holm(p.to_numpy())), reference=label)


def with_mean_accuracy(table: pd.DataFrame) -> pd.DataFrame:
    """The table and below it, for two tasks or more, each cell's mean of `acc` over them.

    A cell that lacks one of the tasks has no such row, since its mean would not compare. A group
    of tasks counts as one more task.
    """
    rows = measured(table)
    rows = rows[rows["metric"] == "acc"]
    tasks = rows["task"].nunique()
    if tasks < 2:
        return table
    cells = rows.groupby(["grid", "cell"])["value"]
    limits = rows["limit"].astype("float64").groupby([rows["grid"], rows["cell"]]).transform("min")
    whole = rows.assign(value=cells.transform("mean"), limit=limits.astype("Int64"))
    whole = whole[cells.transform("size") == tasks]
    averaged = whole.drop_duplicates(["grid", "cell"]).assign(task=f"mean of {tasks} tasks")
    averaged = averaged.drop(columns=["stderr", "samples"], errors="ignore")
    return pd.concat([with_labels(table), averaged], ignore_index=True)


def best_calibration(table: pd.DataFrame, task: str, metric: str, reference: str) -> pd.DataFrame:
    """The best calibration by a task's metric in each setting, and how it does against a reference.

    The best has the best mean over seeds, of perplexity the mean logarithm.

    One row a setting with `mean`, `sd` and `n` over all seeds and, unless the reference is the best
    itself, the columns of `compare`. The best of several is chosen for its luck too: trust
    `p_holm`, which counts all that it was chosen from, before the interval. Pruners without data
    have no row.

    Raises:
        TableError: if there is no such calibration, or no such metric.
    """
    rows = measured(table)
    chosen = rows[(rows["task"] == task) & (rows["metric"] == metric)]
    if chosen.empty:
        there = in_order(rows["task"] + ": " + rows["metric"])
        raise TableError(f"{task}: {metric} is not in the table: name one of {', '.join(there)}")
    rows = chosen[chosen["calibration"] != NO_CALIBRATION]
    label = reference_label(rows, reference)
    kind = metric_named(metric)
    scaled = kind.scaled(rows["value"].to_numpy()) * (1 if kind.lower_is_better else -1)
    ranked = (
        rows.assign(rank=scaled, other=rows["source"] != label)
        .groupby([*SETTING, "source", "other"], dropna=False)["rank"]
        .mean()
        .reset_index()
        .sort_values([*SETTING, "rank", "other", "source"])
        .drop_duplicates(SETTING)
    )
    keys = [*SETTING, "source"]
    levels = summarize(rows)[[*keys, "calibration", "mean", "sd", "n"]]
    versus = compare(rows, label).drop(columns=["calibration", "mean", "reference"])
    best = ranked[keys].merge(levels, on=keys).merge(versus, on=keys, how="left")
    return best.assign(reference=label)


def reference_label(table: pd.DataFrame, reference: str) -> str:
    """The label in `source` of a calibration that is named by it or by `calibration`.

    Raises:
        TableError: if there is none, or several.
    """
    rows = with_labels(table)
    rows = rows[rows["calibration"] != NO_CALIBRATION]
    if reference in set(rows["source"]):
        return reference
    named = in_order(rows.loc[rows["calibration"] == reference, "source"])
    if len(named) != 1:
        there = named or in_order(rows["source"])
        raise TableError(
            f"reference {reference}: "
            + ("has several settings" if named else "is no calibration of this table")
            + f": name one of: {'; '.join(there) or 'none, no calibrated pruner has a result'}"
        )
    return named[0]


def _grouped(rows: pd.DataFrame, row: Any) -> pd.DataFrame:
    names = [*SETTING, *CALIBRATION]
    at_metric = names.index("metric")
    with np.errstate(invalid="ignore"):  # infinite perplexities have no spread
        return pd.DataFrame(
            [
                {**dict(zip(names, key, strict=True)), **row(group, key[at_metric])}
                for key, group in rows.groupby(names, dropna=False, sort=True)
            ]
        )


def _mean_row(group: pd.DataFrame, metric: str) -> dict[str, Any]:
    values = group["value"].to_numpy()
    interval = t_interval(values)
    sd = float(values.std(ddof=1)) if len(values) > 1 else np.nan
    return {
        "mean": interval.mean,
        "sd": sd,
        "standard_error": sd / np.sqrt(len(values)),
        "low": interval.low,
        "high": interval.high,
        "n": len(values),
    }


def _comparison_row(group: pd.DataFrame, metric: str) -> dict[str, Any]:
    kind = metric_named(metric)
    values = group["value"].to_numpy()
    against = group["value_reference"].to_numpy()
    interval = t_interval(kind.scaled(values) - kind.scaled(against))
    return {
        "pairs": len(group),
        "mean": float(values.mean()),
        "reference_mean": float(against.mean()),
        "difference": float(values.mean() - against.mean()),
        "effect": kind.effect(interval.mean),
        "low": kind.effect(interval.low),
        "high": kind.effect(interval.high),
        "unit": kind.unit,
        "better": (interval.mean < 0) if kind.lower_is_better else (interval.mean > 0),
        "p": interval.p,
    }
