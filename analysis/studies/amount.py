"""How many windows of calibration data are enough, and how long they should be."""

import math

import pandas as pd

from analysis.charts import Curve, line_figure
from analysis.evidence import (
    EffectEstimate,
    calibrated,
    corrected,
    estimate_rows,
    listed,
    paired,
    scored,
)
from analysis.labels import in_order
from analysis.load import TableError
from analysis.study import Answer, Results, Study

USUAL = 64
"""Windows in the testbed's other studies."""

NEGLIGIBLE = 1.0
"""Effects within this many percent of perplexity, or points, are negligible."""


def answer(results: Results) -> Answer:
    """Compare each number of windows with the most, and each length with the longest."""
    rows = calibrated(scored(results.table))
    longest = int(rows["seqlen"].max())
    whole = rows[rows["seqlen"] == longest]
    counts = sorted({int(count) for count in whole["nsamples"]})
    if len(counts) < 2:
        raise TableError(f"nsamples {counts}: two or more are needed")
    most = counts[-1]
    usual = max([count for count in counts[:-1] if count <= USUAL], default=counts[0])
    at_most = whole[whole["nsamples"] == most]

    def against_most(part: pd.DataFrame) -> dict[int, EffectEstimate]:
        return {
            count: paired(part[part["nsamples"] == count], at_most, ["nsamples"])
            for count in counts
        }

    panels: dict[str, list[Curve]] = {}
    effects: dict[str, EffectEstimate] = {}
    for source in in_order(whole["calibration"]):
        lines = []
        for method in in_order(whole["pruner"]):
            part = whole[(whole["calibration"] == source) & (whole["pruner"] == method)]
            curve = against_most(part)
            lines.append(Curve(method, [math.log2(count) for count in counts], [*curve.values()]))
            effects |= {f"{count} windows, {method}, {source}": e for count, e in curve.items()}
        panels[f"{source} text"] = lines
    overall = against_most(whole)
    main = overall[usual]
    fewer = corrected({count: each for count, each in overall.items() if count != most})
    enough = [count for count, each in overall.items() if count != most and _is_negligible(each)]
    if main.shown and not main.helps:
        what = f"More than {usual} windows still help."
    elif main.shown:
        what = f"{most} windows are worse than {usual}."
    else:
        what = f"It is not shown that more than {usual} windows help."
    what += (
        f" {enough[0]} windows are enough: within {NEGLIGIBLE:g} {main.kind.unit} of {most}."
        if enough
        else f" No smaller number is shown to be within {NEGLIGIBLE:g} {main.kind.unit} of {most}."
    )
    size = f"{usual} windows against {most}: {main.text}. Others: " + "; ".join(
        f"{count} {each.text}" for count, each in fewer.items() if count != usual
    )
    lengths = _lengths(rows, longest)
    effects |= {f"{length} tokens each": each for length, each in lengths.items()}
    certainty = "p of the others is corrected (Holm)."
    if lengths:
        by_length = listed([f"{length} tokens {each.text}" for length, each in lengths.items()])
        certainty += (
            f" Equally many shorter windows against windows of {longest} tokens: {by_length}."
        )
    caveat = (
        "The effects are averaged over sources and pruners, which the figure shows separately. A "
        "wider model has more input directions to cover, and may need more windows."
    )
    figure = line_figure(
        "Perplexity after pruning, by the number of calibration windows",
        panels,
        "windows",
        f"change against {most} windows (%)",
        linear_within=NEGLIGIBLE,
    )
    for axes in figure.axes:
        axes.set_xticks([math.log2(count) for count in counts], [str(count) for count in counts])
    return Answer(what, size + ".", certainty, caveat, figure, estimate_rows(effects))


def _is_negligible(estimate: EffectEstimate) -> bool:
    return max(abs(estimate.low), abs(estimate.high)) < NEGLIGIBLE


def _lengths(rows: pd.DataFrame, longest: int) -> dict[int, EffectEstimate]:
    """Compare each shorter length with the longest, at the same number of windows."""
    shorter = sorted({int(length) for length in rows["seqlen"]} - {longest})
    whole = rows[rows["seqlen"] == longest]
    return corrected(
        {length: paired(rows[rows["seqlen"] == length], whole, ["seqlen"]) for length in shorter}
    )


STUDY = Study(
    "amount",
    "How many windows of calibration data are enough, and how long should they be?",
    f"{USUAL} windows against the most",
    answer,
)
