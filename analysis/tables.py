"""Tables of text, which the terminal and the page both show."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.labels import DENSE, NO_CALIBRATION, in_order, targets_in_order, with_labels
from analysis.metrics import effect_text, p_text, spread_text
from analysis.paper import OURS, ROW, paper_table
from analysis.statistics import best_calibration, measured, summarize

NO_DATA = "no data"
"""The column of the dense model and of pruners without data."""


class Entry(NamedTuple):
    """One field of a table."""

    text: str
    is_best: bool = False
    number: float | None = None
    """What it sorts by among numbers."""
    cells: tuple[str, ...] = ()
    """The cells behind it."""


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
    """Mean ± standard deviation over seeds: rows model, pruner and target, columns calibrations.

    Cells that failed or have not run are told where their number would stand.

    Args:
        table: one grid's results, lost cells included.
    """
    rows = table[(table["task"] == task) & (table["metric"] == metric)]
    lost = with_labels(table)
    lost = lost[lost["status"] != "ok"].drop_duplicates(["grid", "cell"])
    levels = pd.concat([summarize(rows), lost.assign(n=0)], ignore_index=True)
    sources = in_order(pd.concat([measured(rows), lost])["source"])
    sources = [source for source in sources if source != NO_CALIBRATION]
    behind = _cells_behind(pd.concat([measured(rows), lost], ignore_index=True))
    best = {} if reference is None else _best_sources(table, task, metric, reference)
    drawn = []
    for setting, group in _settings(levels):
        with_number = group[group["n"] > 0]
        by_source = {str(row["source"]): row for row in with_number.to_dict("records")}
        cells = []
        for source in [NO_CALIBRATION, *sources]:
            row = by_source.get(source)
            there = group[(group["source"] == source) & (group["n"] == 0)]["status"].value_counts()
            told = [] if row is None else [spread_text(row["mean"], row["sd"], metric)]
            told += [f"{count} {status}" for status, count in there.items() if count > 0]
            is_best = len(by_source) > 1 and best.get(setting) == source
            number = None if row is None else float(row["mean"])
            cells.append(
                Entry(", ".join(told), is_best, number, behind.get((*setting, source), ()))
            )
        drawn.append([*_names(setting), *cells, Entry(_range(with_number["n"]))])
    title = "mean ± standard deviation over n seeds"
    return TextTable(title, ["model", "pruner", "target", NO_DATA, *sources, "n"], drawn)


def _cells_behind(rows: pd.DataFrame) -> dict[tuple[str, ...], tuple[str, ...]]:
    names = ["model", "method", "target", "source"]
    groups = rows.groupby(names, observed=True, sort=False)["cell"]
    return {tuple(map(str, key)): tuple(cells.unique()) for key, cells in groups}


def _names(setting: tuple[str, str, str]) -> list[Entry]:
    return [Entry(name) for name in setting]


def best_table(table: pd.DataFrame, task: str, metric: str, reference: str) -> TextTable:
    """The best calibration of each model, pruner and target, against the reference."""
    best = best_calibration(table, task, metric, reference)
    rows = []
    for setting, group in _settings(best):
        row = group.iloc[0]
        against, p, pairs = _against(row, reference)
        named = [*_names(setting), Entry(row["source"], is_best=True)]
        rows.append(
            [
                *named,
                Entry(spread_text(row["mean"], row["sd"], metric), number=float(row["mean"])),
                Entry(against, number=float(row["effect"]) if row["pairs"] > 0 else None),
                Entry(p, number=float(row["p_holm"]) if row["pairs"] > 0 else None),
                Entry(pairs),
            ]
        )
    headings = ["model", "pruner", "target", "best calibration", "mean ± sd"]
    versus = [f"difference from {reference} (95 % interval)", "p (Holm)", "pairs"]
    return TextTable(
        "best calibration over all seeds, against the reference over the seeds that both have",
        [*headings, *versus],
        rows,
    )


def paper_layout(table: pd.DataFrame) -> TextTable:
    """The layout of the paper's main table; published numbers are marked `published`."""
    laid = paper_table(table)
    fixed = [*ROW, "origin", "seeds", "lost"]
    names = [str(name) for name in laid]
    numbers = [name for name in names if name not in fixed and not name.endswith(" sd")]
    rows = []
    for row in laid.to_dict("records"):
        ours = row["origin"] == OURS
        values = [
            Entry("")
            if pd.isna(row[name])
            else Entry(
                spread_text(row[name], row[f"{name} sd"], name.rpartition(": ")[2]),
                number=float(row[name]),
            )
            for name in numbers
        ]
        count = Entry(str(row["seeds"]) if ours else "", number=float(row["seeds"]))
        lost = Entry(str(row["lost"]) if ours else "", number=float(row["lost"]))
        origin = Entry("ours" if ours else "published")
        place = Entry("" if ours else str(row["origin"]))
        named = [*(Entry(str(row[name])) for name in ROW), origin]
        rows.append([*named, *values, count, lost, place])
    return TextTable(
        "mean ± standard deviation over seeds; accuracies in percent",
        [*ROW, "whose", *numbers, "seeds", "lost cells", "published in"],
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
    rows = table[(table["task"] == task) & (table["metric"] == metric)]
    if rows.empty or reference not in set(with_labels(rows)["source"]):
        return {}
    best = best_calibration(rows, task, metric, reference)
    keys = zip(best["model"], best["method"], best["target"], strict=True)
    return dict(zip(keys, best["source"], strict=True))


def _settings(levels: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """The rows of each model, method and target: the dense model first, methods without data
    next, targets by sparsity."""
    targets = [DENSE, *targets_in_order(levels)]
    methods = in_order(levels["method"])
    groups = [
        ((str(model), str(method), str(target)), group)
        for (model, method, target), group in levels.groupby(
            ["model", "method", "target"], observed=True
        )
    ]

    def place(item: tuple[tuple[str, str, str], pd.DataFrame]) -> tuple[str, bool, bool, int, int]:
        (model, method, target), group = item
        has_data = bool((group["calibration"] != NO_CALIBRATION).any())
        return model, target != DENSE, has_data, methods.index(method), targets.index(target)

    return sorted(groups, key=place)


def _range(counts: "pd.Series[int]") -> str:
    if counts.empty:
        return "0"
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"
