"""Tables of text for the terminal and the page."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.labels import DENSE, NO_CALIBRATION, in_order, targets_in_order
from analysis.metrics import effect_text, p_text, spread_text
from analysis.paper import OURS, ROW, paper_table
from analysis.retention import SETTING as RETENTION_SETTING
from analysis.retention import retention, worst_retained
from analysis.statistics import best_calibration, measured, summarize

_NO_DATA = "no data"
"""The column of the dense model and of pruners without data."""


class Entry(NamedTuple):
    """One field of a table."""

    text: str
    is_best: bool = False
    number: float | None = None
    """Its sort key among numbers."""
    cells: tuple[str, ...] = ()
    """The cells its number comes from."""


class TextTable(NamedTuple):
    """Rows under headings."""

    title: str
    headings: list[str]
    rows: list[list[Entry]]


def headline_metrics(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the main metric (the first perplexity, else the first) and the mean accuracy."""
    every = all_metrics(table)
    perplexities = [each for each in every if each[1].endswith("perplexity")]
    accuracies = [each for each in every if each[1] == "acc"]
    means = [each for each in accuracies if each[0].startswith("mean of ")]
    return list(dict.fromkeys([*(perplexities or every)[:1], *(means or accuracies)[:1]]))


def all_metrics(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return task and metric of all numbers, in the table's order."""
    rows = table[table["value"].notna()]
    return list(dict.fromkeys(zip(rows["task"], rows["metric"], strict=True)))


def limit_of(table: pd.DataFrame, task: str) -> int | None:
    """Return the largest number of questions of a task that were asked; None if all were."""
    limits = table.loc[table["task"] == task, "limit"].dropna()
    return int(limits.min()) if len(limits) else None


def level_table(table: pd.DataFrame, task: str, metric: str, reference: str | None) -> TextTable:
    """Return mean ± standard deviation over seeds, by setting (rows) and calibration (columns).

    Failed and missing cells are counted where their number would stand.

    Args:
        table: one grid's results, lost cells included.
        task: task of the metric.
        metric: metric to show.
        reference: label of the calibration against which the best one is chosen, if any.
    """
    rows = table[(table["task"] == task) & (table["metric"] == metric)]
    lost = table[table["status"] != "ok"].drop_duplicates(["grid", "cell"])
    levels = pd.concat([summarize(rows), lost.assign(n=0)], ignore_index=True)
    sources = in_order(pd.concat([measured(rows), lost])["source"])
    sources = [source for source in sources if source != NO_CALIBRATION]
    cell_ids = _cell_ids(pd.concat([measured(rows), lost], ignore_index=True))
    best = {} if reference is None else _best_sources(table, task, metric, reference)
    table_rows = []
    for setting, group in _settings(levels):
        with_number = group[group["n"] > 0]
        by_source = {str(row["source"]): row for row in with_number.to_dict("records")}
        entries = []
        for source in [NO_CALIBRATION, *sources]:
            row = by_source.get(source)
            lost_here = group.loc[(group["source"] == source) & (group["n"] == 0), "status"]
            texts = [] if row is None else [spread_text(row["mean"], row["sd"], metric)]
            texts += [f"{n} {status}" for status, n in lost_here.value_counts().items() if n > 0]
            is_best = len(by_source) > 1 and best.get(setting) == source
            number = None if row is None else float(row["mean"])
            ids = cell_ids.get((*setting, source), ())
            entries.append(Entry(", ".join(texts), is_best, number, ids))
        table_rows.append([*_names(setting), *entries, Entry(_range(with_number["n"]))])
    title = "mean ± standard deviation over n seeds"
    return TextTable(title, ["model", "pruner", "target", _NO_DATA, *sources, "n"], table_rows)


def _cell_ids(rows: pd.DataFrame) -> dict[tuple[str, ...], tuple[str, ...]]:
    names = ["model", "method", "target", "source"]
    groups = rows.groupby(names, observed=True, sort=False)["cell"]
    return {tuple(map(str, key)): tuple(cells.unique()) for key, cells in groups}


def _names(setting: tuple[str, str, str]) -> list[Entry]:
    return [Entry(name) for name in setting]


def retention_table(table: pd.DataFrame) -> TextTable | None:
    """Return what each setting retains of each capability, and the worst; None if no dense model
    is measured on two capabilities or more."""
    retained = retention(table)
    capabilities = list(dict.fromkeys(retained["capability"]))
    if len(capabilities) < 2:
        return None
    worst = worst_retained(retained)
    shares = retained.pivot_table(
        index=RETENTION_SETTING, columns="capability", values="retained", observed=True
    )
    rows = []
    for row in worst.to_dict("records"):
        own = shares.loc[tuple(row[name] for name in RETENTION_SETTING)]
        named = [Entry(str(row[name])) for name in RETENTION_SETTING[1:]]
        summary = [
            Entry(row["worst"]),
            Entry(f"{row['retained']:.1f}", number=row["retained"]),
            Entry(f"{row['mean_retained']:.1f}", number=row["mean_retained"]),
        ]
        numbers = [float(own.get(name, np.nan)) for name in capabilities]
        each = [Entry("" if np.isnan(n) else f"{n:.1f}", number=n) for n in numbers]
        rows.append([*named, *summary, *each])
    headings = ["model", "pruner", "target", "calibration"]
    headings += ["worst capability", "retained (%)", "mean (%)", *capabilities]
    title = (
        "percent of the dense model's, means over seeds: accuracy above chance, or bits per byte"
    )
    return TextTable(title, headings, rows)


def best_table(table: pd.DataFrame, task: str, metric: str, reference: str) -> TextTable:
    """Return the best calibration of each model, pruner and target, against the reference."""
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
    headings += [f"difference from {reference} (95 % interval)", "p (Holm)", "pairs"]
    title = "best calibration over all seeds, against the reference over the seeds that both have"
    return TextTable(title, headings, rows)


def cell_table(cells: pd.DataFrame, errors: Sequence[str]) -> TextTable:
    """Return one row a cell with its error, an empty text if it has none."""
    names = ["model", "method", "target", "source", "seed"]
    rows = [
        [
            Entry(row["cell"], cells=(row["cell"],)),
            *(Entry("" if pd.isna(row[name]) else str(row[name])) for name in names),
            Entry(error),
        ]
        for row, error in zip(cells.to_dict("records"), errors, strict=True)
    ]
    headings = ["cell", "model", "pruner", "target", "calibration", "seed", "error"]
    return TextTable("click a cell for all that is known of it", headings, rows)


def paper_layout(table: pd.DataFrame) -> TextTable:
    """Return the results in the layout of the paper's main table; published rows are marked."""
    layout = paper_table(table)
    fixed = [*ROW, "origin", "seeds", "lost"]
    names = [str(name) for name in layout]
    numbers = [name for name in names if name not in fixed and not name.endswith(" sd")]
    rows = []
    for row in layout.to_dict("records"):
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
    """Return the difference from the reference, p and the number of pairs, as text."""
    if row["source"] == reference:
        return "the reference itself", "", ""
    if not row["pairs"] > 0:
        return "no seed in common", "", "0"
    effect = effect_text(row["effect"], row["low"], row["high"], row["unit"])
    if np.isnan(row["p"]):
        effect += " (one pair: no interval)" if row["pairs"] == 1 else " (no interval)"
    return effect, p_text(row["p_holm"]), f"{row['pairs']:.0f}"


def _best_sources(
    table: pd.DataFrame, task: str, metric: str, reference: str
) -> dict[tuple[str, str, str], str]:
    rows = table[(table["task"] == task) & (table["metric"] == metric)]
    if rows.empty or reference not in set(rows["source"]):
        return {}
    best = best_calibration(rows, task, metric, reference)
    keys = zip(best["model"], best["method"], best["target"], strict=True)
    return dict(zip(keys, best["source"], strict=True))


def _settings(levels: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Return the rows of each model, method and target: the dense model first, then methods
    without data, targets by sparsity."""
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
