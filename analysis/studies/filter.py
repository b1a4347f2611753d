"""How much of the generated text to drop, for which pruner."""

import json

import pandas as pd

from analysis.charts import Curve, line_figure
from analysis.evidence import (
    EffectEstimate,
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
from analysis.study import Answer, Results, Study

_PAPER = 0.2
"""The share that the paper drops."""


def answer(results: Results) -> Answer:
    """Compare each rate with no filter, by pruner, and measure what it does to the set."""
    rows = calibrated(scored(results.table))
    rates = sorted({float(rate) for rate in rows["drop_fraction"].dropna()})
    if 0.0 not in rates or _PAPER not in rates:
        raise TableError(f"drop fractions {rates}: 0 and {_PAPER} are needed")
    unfiltered = rows[rows["drop_fraction"] == 0]
    across = ["drop_fraction"]
    main = paired(rows[rows["drop_fraction"] == _PAPER], unfiltered, across)
    methods = in_order(rows["method"])
    singly: dict[tuple[str, float], EffectEstimate] = {}
    lines = []
    for method in methods:
        own = rows[rows["method"] == method]
        curve = {
            rate: paired(own[own["drop_fraction"] == rate], unfiltered, across) for rate in rates
        }
        lines.append(Curve(method, [100 * rate for rate in rates], list(curve.values())))
        singly |= {(method, rate): each for rate, each in curve.items() if rate > 0}
    singly = corrected(singly)
    effects = {f"{_PAPER:.0%}, all pruners": main}
    effects |= {f"{rate:.0%}, {method}": each for (method, rate), each in singly.items()}
    if main.shown:
        better = "helps" if main.helps else "harms"
        what = f"Dropping the {_PAPER:.0%} of highest perplexity {better}."
    else:
        dropping = f"dropping the {_PAPER:.0%} of highest perplexity"
        what = f"It is not shown that {dropping} changes anything."
    by_method = listed([f"{method} {singly[method, _PAPER].text}" for method in methods])
    size = f"Against no filter, over all pruners: {main.text}; by pruner {by_method}."
    shown = [
        f"{rate:.0%} with {method} {each.text}"
        for (method, rate), each in singly.items()
        if each.shown
    ]
    certainty = (
        f"Of all pruners and rates (Holm) these differ from no filter: {'; '.join(shown)}."
        if shown
        else "No pruner is shown to differ from no filter at any rate (Holm)."
    )
    certainty += _quality(rows, max(rates))
    caveat = (
        "Sampling at a low temperature produces few bad samples; hotter sampling or a weaker "
        "model gives the filter more to drop."
    )
    figure = line_figure(
        "Perplexity after pruning, by the share of generated samples that is dropped",
        {"each pruner": lines},
        "dropped (%)",
        "change against no filter (%)",
    )
    return Answer(what, size, certainty, caveat, figure, estimate_rows(effects))


def _quality(rows: pd.DataFrame, most: float) -> str:
    """Say how the highest rate changes the set's Min-K%++, if the grid describes its sets."""
    described = rows[rows["calibration_report"].notna()]
    if described.empty:
        return ""
    scores = described.assign(
        score=[json.loads(report)["min_k_plus_plus"] for report in described["calibration_report"]]
    ).drop_duplicates(["model", "seed", "drop_fraction"])
    sets = scores.pivot_table(index=["model", "seed"], columns="drop_fraction", values="score")
    if most not in sets or 0.0 not in sets:
        return ""
    change = (sets[most] - sets[0.0]).dropna().rename("score").reset_index()
    raised = over_seeds(change, metric_named("min_k_plus_plus"))
    if not raised.shown:
        return (
            f" It is not shown that dropping {most:.0%} changes the set's Min-K%++: {raised.text}."
        )
    word = "raises" if raised.effect > 0 else "lowers"
    return f" Dropping {most:.0%} {word} the set's own Min-K%++: {raised.text}."


STUDY = Study(
    "filter",
    "How much of the generated text should be dropped, and for which pruner?",
    "dropping 20 % against dropping nothing",
    answer,
)
