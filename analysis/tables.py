"""Tables of text, which the terminal and the page both show."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.labels import DENSE, NO_CALIBRATION, in_order, targets_in_order
from analysis.metrics import effect_text, p_text, spread_text
from analysis.statistics import best_calibration, summarize

NO_DATA = "no data"
"""The column of the dense model and of pruners without data."""


class Entry(NamedTuple):
    """One field of a table."""

    text: str
    is_best: bool = False


class TextTable(NamedTuple):
    """Rows under headings."""

    title: str
    headings: list[str]
    rows: list[list[Entry]]


def headline_metrics(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The main metric (the first perplexity, else the first there is) and the mean accuracy."""
    there = all_metrics(table)
    perplexities = [each for each in there if each[1].endswith("perplexity")]
    accuracies = [each for each in there if each[1] == "acc"]
    means = [each for each in accuracies if each[0].startswith("mean of ")]
    return list(dict.fromkeys([*(perplexities or there)[:1], *(means or accuracies)[:1]]))


def all_metrics(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Task and metric of all numbers, in the table's order."""
    rows = table[table["value"].notna()]
    return list(dict.fromkeys(zip(rows["task"], rows["metric"], strict=True)))


def limit_of(table: pd.DataFrame, task: str) -> int | None:
    """How many questions of a task were asked at the most; None if all were."""
    limits = table.loc[table["task"] == task, "limit"].dropna()
    return int(limits.min()) if len(limits) else None


def level_table(table: pd.DataFrame, task: str, metric: str, reference: str | None) -> TextTable:
    """Mean ± standard deviation over seeds: rows model, pruner and target, columns calibrations."""
    levels = summarize(table[(table["task"] == task) & (table["metric"] == metric)])
    sources = in_order(levels.loc[levels["calibration"] != NO_CALIBRATION, "source"])
    best = {} if reference is None else _best_sources(table, task, metric, reference)
    rows = []
    for setting, group in _settings(levels):
        by_source = {str(row["source"]): row for row in group.to_dict("records")}
        cells = [
            Entry("")
            if source not in by_source
            else Entry(
                spread_text(by_source[source]["mean"], by_source[source]["sd"], metric),
                is_best=len(by_source) > 1 and best.get(setting) == source,
            )
            for source in [NO_CALIBRATION, *sources]
        ]
        rows.append([*map(Entry, setting), *cells, Entry(_range(group["n"]))])
    title = "mean ± standard deviation over n seeds"
    return TextTable(title, ["model", "pruner", "target", NO_DATA, *sources, "n"], rows)


def best_table(table: pd.DataFrame, task: str, metric: str, reference: str) -> TextTable:
    """The best calibration of each model, pruner and target, against the reference."""
    best = best_calibration(table, task, metric, reference)
    rows = []
    for setting, group in _settings(best):
        row = group.iloc[0]
        values = [spread_text(row["mean"], row["sd"], metric), *_against(row, reference)]
        named = [*map(Entry, setting), Entry(row["source"], is_best=True)]
        rows.append([*named, *map(Entry, values)])
    headings = ["model", "pruner", "target", "best calibration", "mean ± sd"]
    against = [f"difference from {reference} (95 % interval)", "p (Holm)", "pairs"]
    return TextTable(
        "best calibration over all seeds, against the reference over the seeds that both have",
        [*headings, *against],
        rows,
    )


def _against(row: "pd.Series[Any]", reference: str) -> tuple[str, str, str]:
    """Difference from the reference, p and the number of pairs."""
    if row["source"] == reference:
        return "the reference itself", "", ""
    if not row["pairs"] > 0:
        return "no seed in common", "", "0"
    told = effect_text(row["effect"], row["low"], row["high"], row["unit"])
    if np.isnan(row["p"]):
        told += " (one pair: no interval)" if row["pairs"] == 1 else " (no interval)"
    return told, p_text(row["p_holm"]), f"{row['pairs']:.0f}"


def _best_sources(
    table: pd.DataFrame, task: str, metric: str, reference: str
) -> dict[tuple[str, str, str], str]:
    best = best_calibration(table, task, metric, reference)
    keys = zip(best["model"], best["method"], best["target"], strict=True)
    return dict(zip(keys, best["source"], strict=True))


def _settings(levels: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """The rows of each model, method and target: the dense model first, methods without data
    next, targets by sparsity."""
    targets = [DENSE, *targets_in_order(levels)]
    groups = [
        ((str(model), str(method), str(target)), group)
        for (model, method, target), group in levels.groupby(["model", "method", "target"])
    ]

    def place(item: tuple[tuple[str, str, str], pd.DataFrame]) -> tuple[str, bool, bool, str, int]:
        (model, method, target), group = item
        has_data = bool((group["calibration"] != NO_CALIBRATION).any())
        return model, target != DENSE, has_data, method, targets.index(target)

    return sorted(groups, key=place)


def _range(counts: "pd.Series[int]") -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"
