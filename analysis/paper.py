"""Results laid out like the main table of arXiv 2410.17711, beside published numbers.

Rows are a model, a target, a method and its calibration data; columns are perplexities, then the
tasks' accuracies, then their mean. `published.csv` holds the published numbers with the place each
was read from. The paper's main table itself is not among them: its repository holds plots only.
"""

from pathlib import Path

import pandas as pd

from analysis.labels import DENSE, NO_CALIBRATION, in_order, natural, with_labels
from analysis.metrics import metric_named
from analysis.statistics import summarize, with_mean_accuracy

PUBLISHED = Path(__file__).with_name("published.csv")

OURS = "this table"

TASKS = ("boolq", "winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge", "mmlu")
"""The paper's order; others follow in the table's."""

ROW = ["model", "target", "method", "calibration"]


def published() -> pd.DataFrame:
    """The published numbers, one a row: what was measured, `value`, and where it stands.

    Columns: `source` and `place` (the paper, and where in it or its repository), `model`, `pruner`,
    `allocation`, `calibration`, `target`, `task`, `metric`, `value` (accuracies as shares), `sd`
    over seeds, `nsamples`, `seqlen` and a `note`. What a source does not tell is null, or
    `not stated` where it names a row.
    """
    text = ("source", "place", "model", "pruner", "allocation", "calibration", "target", "note")
    return pd.read_csv(PUBLISHED, dtype=dict.fromkeys(text, "str"))


def paper_table(table: pd.DataFrame, models: list[str] | None = None) -> pd.DataFrame:
    """Our results and published ones in the layout of the paper's main table.

    One row a model, target, method, calibration and `origin`: `this table`, or where a published
    number was read. Columns after these: `seeds` behind the means; `lost`, the cells that failed or
    have not run; then for each metric its mean `TASK: METRIC` and its standard deviation over seeds
    `TASK: METRIC sd`. Published rows are of the targets that our rows have: first those of our
    models, by name, then the others.

    Args:
        table: as `load_results` gives it; perplexities, `acc` and averages of it are laid out.
        models: the published models to show; None for all.
    """
    labelled = with_labels(table)
    ours = _ours(labelled)
    theirs = _theirs(in_order(labelled["target"]), models)
    rows = pd.concat([ours, theirs], ignore_index=True)
    numbers = _columns(rows)
    keys = [*ROW, "origin"]
    laid = (
        rows.pivot_table(
            index=keys, columns="number", values=["mean", "sd"], aggfunc="first", dropna=False
        )
        if numbers
        else pd.DataFrame()
    )
    head = rows.groupby(keys, sort=False, dropna=False)[["seeds", "lost"]].max()
    body = {}
    for number in numbers:
        body[number] = laid[("mean", number)].reindex(head.index)
        body[f"{number} sd"] = laid[("sd", number)].reindex(head.index)
    whole = pd.concat([head, pd.DataFrame(body, index=head.index)], axis=1).reset_index()
    return whole.iloc[_order(whole, labelled)].reset_index(drop=True)


def _ours(table: pd.DataFrame) -> pd.DataFrame:
    names = {"source": "calibration"}
    rows = with_mean_accuracy(table)
    rows = rows[rows["metric"].map(_is_laid_out).astype(bool)]
    levels = summarize(rows).drop(columns="calibration").rename(columns=names)
    found = levels.astype(dict.fromkeys(ROW, "str"))[[*ROW, "task", "metric", "mean", "sd", "n"]]
    found = found.rename(columns={"n": "seeds"}).assign(lost=0)
    cells = table[table["status"] != "ok"].drop_duplicates(["grid", "cell"])
    cells = cells.drop(columns="calibration").rename(columns=names)
    lost = cells.astype(dict.fromkeys(ROW, "str")).groupby(ROW).size().rename("lost")
    whole = pd.concat([found, lost.reset_index().assign(seeds=0)], ignore_index=True)
    return _numbered(whole.assign(origin=OURS))


def _is_laid_out(metric: object) -> bool:
    """Whether a metric has a column; lost cells have none."""
    return isinstance(metric, str) and (
        metric_named(metric).is_perplexity or metric in ("acc", "acc_average")
    )


def _theirs(targets: list[str], models: list[str] | None) -> pd.DataFrame:
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
    """Perplexities, accuracies in the paper's order, means over tasks."""

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
    """Our models first, each with what is published of it; within one by target and method, the
    dense model and methods without data before the others."""
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
