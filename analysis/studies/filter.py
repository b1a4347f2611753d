"""How much of the generated text should be dropped, for which pruner."""

import json

import pandas as pd

from analysis.charts import Line, line_figure
from analysis.evidence import (
    calibrated,
    corrected,
    estimate_rows,
    listed,
    over_seeds,
    paired,
    scored,
)
from analysis.labels import in_order
from analysis.load import TableError
from analysis.metrics import metric_named
from analysis.study import Answer, Study

PAPER = 0.2
"""The share that the paper drops."""


def answer(table: pd.DataFrame) -> Answer:
    """Each rate against no filter, by pruner, and what the rate does to the set."""
    rows = calibrated(scored(table))
    rates = sorted({float(rate) for rate in rows["drop_fraction"].dropna()})
    if 0.0 not in rates or PAPER not in rates:
        raise TableError(f"drop fractions {rates}: it takes 0 and {PAPER}")
    unfiltered = rows[rows["drop_fraction"] == 0]
    across = ["drop_fraction"]
    main = paired(rows[rows["drop_fraction"] == PAPER], unfiltered, across)
    by_rate = corrected(
        {
            rate: paired(rows[rows["drop_fraction"] == rate], unfiltered, across)
            for rate in rates
            if rate > 0
        }
    )
    methods = in_order(rows["method"])
    effects = {f"{rate:.0%}, all pruners": each for rate, each in by_rate.items()}
    lines = []
    for method in methods:
        own = rows[rows["method"] == method]
        curve = {
            rate: paired(own[own["drop_fraction"] == rate], unfiltered, across) for rate in rates
        }
        lines.append(Line(method, [100 * rate for rate in rates], list(curve.values())))
        effects |= {f"{rate:.0%}, {method}": each for rate, each in curve.items()}
    if main.shown:
        better = "helps" if main.helps else "harms"
        what = f"Dropping the {PAPER:.0%} of highest perplexity {better}."
    else:
        what = f"That dropping the {PAPER:.0%} of highest perplexity changes anything is not shown."
    at_paper = corrected(
        {
            method: paired(
                rows[(rows["drop_fraction"] == PAPER) & (rows["method"] == method)],
                unfiltered,
                across,
            )
            for method in methods
        }
    )
    by_method = listed([f"{method} {each.text}" for method, each in at_paper.items()])
    size = f"Against no filter, over all pruners: {main.text}; by pruner {by_method}."
    shown = [f"{rate:.0%} {each.text}" for rate, each in by_rate.items() if each.shown]
    certainty = (
        f"Of all rates (Holm) these differ from no filter: {listed(shown)}."
        if shown
        else f"None of the rates {listed([f'{rate:.0%}' for rate in rates if rate])} differs from "
        "no filter by more than chance (Holm)."
    )
    certainty += _quality(rows, max(rates))
    caveat = (
        "Sampling at a low temperature leaves few bad samples to drop: hotter sampling, or a "
        "weaker model, gives the filter more to do."
    )
    figure = line_figure(
        "Perplexity after pruning, by the share of generated samples that is dropped",
        {"each pruner": lines},
        "dropped (%)",
        "change against no filter (%)",
    )
    return Answer(what, size, certainty, caveat, figure, estimate_rows(effects))


def _quality(rows: pd.DataFrame, most: float) -> str:
    """What the highest rate does to the set's own Min-K%++, where the grid describes its sets."""
    if "calibration_report" not in rows or rows["calibration_report"].isna().all():
        return ""
    told = rows[rows["calibration_report"].notna()]
    scores = told.assign(
        score=[json.loads(report)["min_k_plus_plus"] for report in told["calibration_report"]]
    ).drop_duplicates(["model", "seed", "drop_fraction"])
    sets = scores.pivot_table(index=["model", "seed"], columns="drop_fraction", values="score")
    if most not in sets or 0.0 not in sets:
        return ""
    change = (sets[most] - sets[0.0]).dropna().rename("score").reset_index()
    raised = over_seeds(change, metric_named("min_k_plus_plus"))
    if not raised.shown:
        return f" That dropping {most:.0%} changes the set's Min-K%++ is not shown: {raised.text}."
    word = "raises" if raised.effect > 0 else "lowers"
    return f" Dropping {most:.0%} {word} the set's own Min-K%++: {raised.text}."


STUDY = Study(
    "filter",
    "How much of the generated text should be dropped, and for which pruner?",
    "dropping 20 % against dropping nothing",
    answer,
)
