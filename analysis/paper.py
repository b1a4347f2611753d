"""Results in the layout of the main table of arXiv 2410.17711, beside published numbers.

A row is a model, target, method and calibration. The columns are perplexities, then the accuracies
of the tasks, then their mean. `published.csv` holds the published numbers with the place each was
read from. It lacks the paper's main table, whose repository holds only plots of it.
"""

from pathlib import Path

import pandas as pd

from analysis.labels import DENSE, NO_CALIBRATION, in_order, natural
from analysis.metrics import metric_named
from analysis.statistics import summarize, with_mean_accuracy

PUBLISHED = Path(__file__).with_name("published.csv")

OURS = "this table"

TASKS = ("boolq", "winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge", "mmlu")
"""The paper's order; other tasks follow in the order of the table."""

ROW = ["model", "target", "method", "calibration"]


def published() -> pd.DataFrame:
    """Return the published numbers, one per row.

    Columns: `source` and `place` (the paper, and where in it or its repository), `model`, `pruner`,
    `allocation`, `calibration`, `target`, `task`, `metric`, `value` (accuracies as shares), `sd`
    over seeds, `nsamples`, `seqlen` and `note`. A field that the source does not state is null, or
    `not stated` in the columns that name a row.
    """
    text = ("source", "place", "model", "pruner", "allocation", "calibration", "target", "note")
    return pd.read_csv(PUBLISHED, dtype=dict.fromkeys(text, "str"))


def paper_table(table: pd.DataFrame, models: list[str] | None = None) -> pd.DataFrame:
    """Return our results and published ones in the layout of the paper's main table.

    One row per model, target, method, calibration and `origin`: `this table`, or where a published
    number was read. Columns after these: `seeds`, the number of seeds; `lost`, the number of cells
    that failed or have not run; then for each metric its mean `TASK: METRIC` and its standard
    deviation over seeds `TASK: METRIC sd`. Published rows have the targets of our rows: first the
    rows of our models, by name, then the others.

    Args:
        table: as `load_results` returns it; perplexities, `acc` and averages of `acc` are shown.
        models: published models to show; None for all.
    """
    ours = _ours(table)
    theirs = _published(in_order(table["target"]), models)
    rows = pd.concat([ours, theirs], ignore_index=True)
    numbers = _columns(rows)
    keys = [*ROW, "origin"]
    layout = (
        rows.pivot_table(
            index=keys, columns="number", values=["mean", "sd"], aggfunc="first", dropna=False
        )
        if numbers
        else pd.DataFrame()
    )
    head = rows.groupby(keys, sort=False, dropna=False)[["seeds", "lost"]].max()
    body = {}
    for number in numbers:
        body[number] = layout[("mean", number)].reindex(head.index)
        body[f"{number} sd"] = layout[("sd", number)].reindex(head.index)
    whole = pd.concat([head, pd.DataFrame(body, index=head.index)], axis=1).reset_index()
    return whole.iloc[_order(whole, table)].reset_index(drop=True)


def _ours(table: pd.DataFrame) -> pd.DataFrame:
    names = {"source": "calibration"}
    rows = with_mean_accuracy(table)
    rows = rows[rows["metric"].map(_has_column).astype(bool)]
    levels = summarize(rows).drop(columns="calibration").rename(columns=names)
    found = levels.astype(dict.fromkeys(ROW, "str"))[[*ROW, "task", "metric", "mean", "sd", "n"]]
    found = found.rename(columns={"n": "seeds"}).assign(lost=0)
    cells = table[table["status"] != "ok"].drop_duplicates(["grid", "cell"])
    cells = cells.drop(columns="calibration").rename(columns=names)
    lost = cells.astype(dict.fromkeys(ROW, "str")).groupby(ROW).size().rename("lost")
    whole = pd.concat([found, lost.reset_index().assign(seeds=0)], ignore_index=True)
    return _numbered(whole.assign(origin=OURS))


def _has_column(metric: object) -> bool:
    """Return whether a metric has a column; a lost cell has no metric."""
    return isinstance(metric, str) and (
        metric_named(metric).is_perplexity or metric in ("acc", "acc_average")
    )


def _published(targets: list[str], models: list[str] | None) -> pd.DataFrame:
    rows = published()
    rows = rows[rows["target"].isin([*targets, "not stated"])]
    if models is not None:
        rows = rows[rows["model"].isin(models)]
    allocation = (", " + rows["allocation"]).fillna("")
    counts = rows["nsamples"].astype("Int64").astype("str")
    windows = ", " + counts + " windows"
    several = rows.groupby(["place", "model", "calibration"])["nsamples"].transform("nunique") > 1
    return _numbered(
        rows.assign(
            method=rows["pruner"] + allocation,
            calibration=rows["calibration"] + windows.where(several & rows["nsamples"].notna(), ""),
            origin=rows["source"] + ", " + rows["place"],
            mean=rows["value"],
            seeds=0,
            lost=0,
        )
    )


def _numbered(rows: pd.DataFrame) -> pd.DataFrame:
    numbers = rows["task"].str.cat(rows["metric"], sep=": ")
    return rows.assign(number=numbers)[[*ROW, "origin", "number", "mean", "sd", "seeds", "lost"]]


def _columns(rows: pd.DataFrame) -> list[str]:
    """Return perplexities, then accuracies in the paper's order, then means over tasks."""

    def place(number: str) -> tuple[bool, bool, int]:
        task, _, metric = number.rpartition(": ")
        known = [name for name in TASKS if task.startswith(name)]
        mean = task.startswith("mean of ") or task == "the paper's tasks"
        mean = mean or metric == "acc_average"
        return (
            not metric_named(metric).is_perplexity,
            mean,
            TASKS.index(known[0]) if known else len(TASKS),
        )

    return sorted(rows["number"].dropna().unique(), key=place)


def _order(rows: pd.DataFrame, table: pd.DataFrame) -> list[int]:
    """Return the row order: our models first, each with its published rows.

    Within a model rows go by target and method, the dense model and methods without data first.
    """
    models = in_order(table["model"])
    targets, methods = in_order(table["target"]), in_order(table["method"])

    def place(number: int) -> tuple[object, ...]:
        row = rows.iloc[number]
        return (
            row["model"] not in models,
            natural(row["model"]),
            row["method"] != DENSE,
            targets.index(row["target"]) if row["target"] in targets else len(targets),
            row["calibration"] != NO_CALIBRATION,
            methods.index(row["method"]) if row["method"] in methods else len(methods),
            natural(row["method"]),
            row["origin"] != OURS,
            natural(row["calibration"]),
        )

    return sorted(range(len(rows)), key=place)
