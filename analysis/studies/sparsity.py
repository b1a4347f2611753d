"""From which sparsity on self-generated calibration data matters."""

import pandas as pd

from analysis.charts import Curve, line_figure
from analysis.evidence import (
    SOURCE,
    EffectEstimate,
    calibrated,
    corrected,
    estimate_rows,
    listed,
    of_calibration,
    paired,
    scored,
)
from analysis.labels import in_order, targets_in_order
from analysis.study import Answer, Results, Study

CORPUS, GENERATED, TRUE = "mismatched", "self-generated", "pretraining"


def answer(results: Results) -> Answer:
    """Compare self-generated data with the corpus at each target."""
    rows = calibrated(scored(results.table))
    corpus, generated = of_calibration(rows, CORPUS), of_calibration(rows, GENERATED)
    targets = targets_in_order(rows)
    unstructured = [target for target in targets if ":" not in target]
    places = [
        place + (1 if target not in unstructured else 0) for place, target in enumerate(targets)
    ]

    def curve(chosen: pd.DataFrame) -> dict[str, EffectEstimate]:
        return {
            target: paired(chosen[chosen["target"] == target], corpus, SOURCE) for target in targets
        }

    by_target = corrected(curve(generated))
    panels, effects = {}, {f"{target}, all pruners": each for target, each in by_target.items()}
    for method in in_order(rows["method"]):
        lines = []
        for name in (GENERATED, TRUE):
            chosen = rows[(rows["calibration"] == name) & (rows["method"] == method)]
            if not chosen.empty:
                estimates = curve(chosen)
                lines.append(Curve(name, places, list(estimates.values())))
                effects |= {f"{target}, {method}, {name}": e for target, e in estimates.items()}
        panels[method] = lines
    helped = [target for target, each in by_target.items() if each.shown and each.helps]
    harmed = [target for target, each in by_target.items() if each.shown and not each.helps]
    started = [target for target in helped if target in unstructured]
    patterns = [target for target in helped if ":" in target]
    if started:
        what = f"Self-generated data beat the {CORPUS} corpus from {started[0]} on"
        after = unstructured[unstructured.index(started[0]) :]
        gaps = [target for target in after if target not in helped]
        what += f", though at {listed(gaps)} it is not shown." if gaps else "."
    else:
        what = f"It is not shown at any sparsity that self-generated data beat the {CORPUS} corpus."
    if patterns:
        what += f" They do so at {listed(patterns)} too."
    if harmed:
        what += f" At {listed(harmed)} they are worse."
    size = "By target: " + "; ".join(f"{t} {each.text}" for t, each in by_target.items()) + "."
    certainty = f"p is corrected for the {len(targets)} targets (Holm)."
    caveat = (
        "The threshold depends on the number of seeds, since a small effect needs more of them, "
        "and on how far the corpus is from the pretraining text."
    )
    figure = line_figure(
        f"Perplexity after pruning with self-generated data, against the {CORPUS} corpus",
        panels,
        "sparsity or pattern",
        f"change against the {CORPUS} corpus (%)",
        dict(zip(places, targets, strict=True)),
    )
    return Answer(what, size, certainty, caveat, figure, estimate_rows(effects))


STUDY = Study(
    "sparsity",
    "From which sparsity on does self-generated calibration data matter?",
    "self-generated data against the mismatched corpus at each target",
    answer,
)
