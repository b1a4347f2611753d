"""Compare any two selections of a results table, pair by pair.

A pair has one seed or, where both sides hold per-request results, one seed and request. Nothing is
dropped silently: each row counts the results of either side, with and without a partner, and the
cells that failed or have not run.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import special
from statsmodels.stats.contingency_tables import mcnemar

from analysis.load import TableError
from analysis.metrics import Values
from analysis.statistics import (
    CONFIDENCE,
    has_spread,
    holm,
    in_units,
    paired_effects,
    scaled_differences,
)

DEFAULT_BY = ("grid", "model", "method", "target", "task", "metric")

_COLUMNS = (
    *("pairs", "n_a", "n_b", "lost_a", "lost_b", "mean_a", "mean_b", "difference", "effect"),
    *("low", "high", "bootstrap_low", "bootstrap_high", "unit", "better", "hedges_g"),
    *("p", "p_holm", "test"),
)
"""Columns of `compare_selections` after those that name a group."""

RESAMPLES = 5_000

CHUNK_MEANS = 20_000_000
"""Resampled means held at a time."""


def compare_selections(
    a: pd.DataFrame, b: pd.DataFrame, by: Sequence[str] = DEFAULT_BY
) -> pd.DataFrame:
    """Compare selection a with selection b, in one row per group.

    Results pair up by `by` and seed. Those of `load_requests` pair up by request too: each
    request's differences are then averaged over seeds first, and the intervals cover the draw of
    requests. A result without a seed, such as magnitude's, holds for every seed and pairs with
    each.

    Columns after those of `by`:

    - `pairs`; `n_a` and `n_b`, all results of either side; `lost_a` and `lost_b`, the cells of
      either side that failed or have not run;
    - `mean_a`, `mean_b` and their `difference` over the pairs;
    - `effect` in `unit` (`%` of b's perplexity, or percentage `points`) with its 95 % t interval
      `low` to `high` and its percentile bootstrap interval `bootstrap_low` to `bootstrap_high`,
      which is too narrow for few pairs; `better`, whether the effect favours a;
    - `hedges_g`, the mean difference in standard deviations of the differences, corrected for few
      pairs;
    - `p` by `test`: over seeds Student's t; over requests McNemar's exact test if all values are 0
      or 1 and there is one seed, else the bootstrap; `p_holm`, corrected for all rows.

    A group with fewer than two pairs, or whose differences are all equal, has no interval and only
    McNemar's p. A group without pairs is a row too.

    Args:
        a: rows of `load_results` or `load_requests`.
        b: the rows to compare them with.
        by: columns that name a group; `metric` must be among them.

    Raises:
        TableError: if a column is missing, or a side has two results for one pair.
    """
    names = list(by)
    if "metric" not in names:
        raise TableError(
            "compare_selections: by: lacks metric: numbers of different metrics cannot be compared"
        )
    for side, rows in (("a", a), ("b", b)):
        absent = [name for name in names if name not in rows]
        if absent:
            raise TableError(f"compare_selections: by: {side} has no column {', '.join(absent)}")
    requests = "doc_id" in a and "doc_id" in b
    within = ["doc_id"] if requests else []
    values_a, values_b = (_values(side, rows, names, within) for side, rows in (("a", a), ("b", b)))
    pairs = _pairs(values_a, values_b, names, within)
    effects = paired_effects(_over_seeds(pairs, names) if requests else pairs, names)
    spread = _spread(pairs, names, requests)
    counts = _counts(a, b, values_a, values_b, names)
    result = counts.merge(effects, on=names, how="left").merge(spread, on=names, how="left")
    result["pairs"] = result["pairs"].fillna(0).astype(int)
    if not requests:
        result["test"] = result["p"].notna().map({True: "t", False: None})
    else:
        result["p"] = result.pop("p_requests")
    result["p_holm"] = holm(result["p"].to_numpy(dtype=np.float64))
    return result[[*names, *_COLUMNS]]


def hedges_g(differences: Values) -> float:
    """Return the mean in standard deviations, corrected for bias; NaN for fewer than 3 values.

    Source: Hedges 1981, Journal of Educational Statistics 6:107-128, for paired differences.
    """
    degrees = len(differences) - 1
    if degrees < 2 or not has_spread(differences):
        return float("nan")
    sd = float(differences.std(ddof=1))
    factor = special.gammaln(degrees / 2) - special.gammaln((degrees - 1) / 2)
    return float(np.exp(factor) / np.sqrt(degrees / 2) * differences.mean() / sd)


def bootstrap_means(differences: Values) -> Values:
    """Return the means of each row's resamples, `[groups, n]` to `[groups, RESAMPLES]`.

    Equal rows give equal means.
    """
    n = differences.shape[1]
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.asarray(differences @ (counts.T / n))


def mcnemar_p(a: Values, b: Values) -> float:
    """Return McNemar's exact two-sided p for paired answers that are 0 or 1."""
    table = [[int(((a == i) & (b == j)).sum()) for j in (1, 0)] for i in (1, 0)]
    return float(mcnemar(table, exact=True).pvalue)


def _values(side: str, rows: pd.DataFrame, names: list[str], within: list[str]) -> pd.DataFrame:
    """Return the numbers of one side, after checking that each pair has only one."""
    keys = [*names, "seed", *within]
    found = rows.loc[(rows["status"] == "ok") & rows["value"].notna(), [*keys, "value"]]
    twice = found[found.duplicated(keys)]
    if not twice.empty:
        pair = ", ".join(f"{name} {twice.iloc[0][name]}" for name in keys)
        raise TableError(
            f"compare_selections: {side} has several results of {pair}: select one of them, or "
            "name the column they differ in in by"
        )
    return found


def _pairs(a: pd.DataFrame, b: pd.DataFrame, names: list[str], within: list[str]) -> pd.DataFrame:
    """Return the pairs of one seed; a result without a seed pairs with all of the other side."""
    keys, ends = [*names, *within], ("_a", "_b")
    seeded_a, seeded_b = a[a["seed"].notna()], b[b["seed"].notna()]
    free_a, free_b = (rows[rows["seed"].isna()].drop(columns="seed") for rows in (a, b))
    found = [
        seeded_a.merge(seeded_b, on=[*keys, "seed"], suffixes=ends),
        seeded_a.merge(free_b, on=keys, suffixes=ends),
        free_a.merge(seeded_b, on=keys, suffixes=ends),
        free_a.merge(free_b, on=keys, suffixes=ends),
    ]
    return pd.concat([rows for rows in found if not rows.empty] or found[:1], ignore_index=True)


def _over_seeds(pairs: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Return one pair per request: the means over its seeds."""
    keys = [*names, "doc_id"]
    groups = pairs.groupby(keys, dropna=False, observed=True)[["value_a", "value_b"]]
    return groups.mean().reset_index()


def _counts(
    a: pd.DataFrame,
    b: pd.DataFrame,
    values_a: pd.DataFrame,
    values_b: pd.DataFrame,
    names: list[str],
) -> pd.DataFrame:
    """Return one row per group of either side, with its numbers of results and of lost cells.

    A lost cell has no task: it counts in every group that agrees with it in the other columns. If
    there is no such group, it is a row without a task.
    """
    counts = [
        rows.groupby(names, dropna=False, observed=True).size().rename(f"n_{side}").reset_index()
        for side, rows in (("a", values_a), ("b", values_b))
    ]
    groups = counts[0].merge(counts[1], on=names, how="outer")
    cell_names = [name for name in names if name not in ("task", "metric")]
    for side, rows in (("a", a), ("b", b)):
        cells = rows[rows["status"] != "ok"].drop_duplicates(["grid", "cell"])
        if cell_names:
            lost = cells.groupby(cell_names, dropna=False, observed=True).size()
            counted = lost.rename(f"lost_{side}").reset_index()
            groups = groups.merge(counted, on=cell_names, how="outer")
        else:
            groups[f"lost_{side}"] = len(cells)
    columns = ["n_a", "n_b", "lost_a", "lost_b"]
    groups[columns] = groups[columns].fillna(0).astype(int)
    return groups


def _spread(pairs: pd.DataFrame, names: list[str], requests: bool) -> pd.DataFrame:
    """Return what needs all differences of a group: bootstrap, effect size, requests' tests."""
    scaled = scaled_differences(pairs)
    rows: list[dict[str, Any]] = []
    by_group: list[Values] = []
    for key, group in pairs.assign(scaled=scaled).groupby(names, dropna=False, observed=True):
        row: dict[str, Any] = dict(
            zip(names, key if isinstance(key, tuple) else (key,), strict=True)
        )
        differences = group["scaled"].to_numpy(dtype=np.float64)
        if requests:
            row |= {"test": "paired bootstrap", "p_requests": np.nan}
            by_request = group.groupby("doc_id", observed=True)["scaled"]
            differences = by_request.mean().to_numpy(dtype=np.float64)
            values = group[["value_a", "value_b"]].to_numpy(dtype=np.float64)
            if len(differences) == len(group) and np.isin(values, (0.0, 1.0)).all():
                row |= {"test": "McNemar", "p_requests": mcnemar_p(values[:, 0], values[:, 1])}
        rows.append({**row, "hedges_g": hedges_g(differences)})
        by_group.append(differences)
    _bootstrap(rows, by_group)
    columns = [*names, "hedges_g", "bootstrap_low", "bootstrap_high"]
    columns += ["test", "p_requests"] if requests else []
    spread = pd.DataFrame(rows, columns=columns)
    spread = spread.astype({name: pairs[name].dtype for name in names})
    for end in ("bootstrap_low", "bootstrap_high"):
        spread[end] = in_units(spread[end].astype(float), spread["metric"])
    return spread


def _bootstrap(rows: list[dict[str, Any]], by_group: list[Values]) -> None:
    """Add the interval, and p where the bootstrap is the test, to the rows.

    Groups of one size share their resamples.
    """
    by_size: dict[int, list[int]] = {}
    for group, differences in enumerate(by_group):
        if has_spread(differences):
            by_size.setdefault(len(differences), []).append(group)
    step = CHUNK_MEANS // RESAMPLES
    for groups in by_size.values():
        for start in range(0, len(groups), step):
            chunk = groups[start : start + step]
            differences = np.stack([by_group[group] for group in chunk])
            means = bootstrap_means(differences)
            tail = (1 - CONFIDENCE) / 2
            low, high = np.quantile(means, [tail, 1 - tail], axis=1)
            centre = differences.mean(axis=1, keepdims=True)
            beyond = (np.abs(means - centre) >= np.abs(centre)).sum(axis=1)
            for place, group in enumerate(chunk):
                rows[group] |= {"bootstrap_low": low[place], "bootstrap_high": high[place]}
                if rows[group].get("test") == "paired bootstrap":
                    rows[group]["p_requests"] = (beyond[place] + 1) / (RESAMPLES + 1)
