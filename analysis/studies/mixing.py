"""Which capabilities one source of calibration data keeps, and which a mixture keeps."""

import pandas as pd

from analysis.charts import interval_figure
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
from analysis.labels import in_order
from analysis.load import TableError
from analysis.study import Answer, Results, Study

MIXED, HELD_OUT = "mixed", "-heldout"


def answer(results: Results) -> Answer:
    """Compare mixed data with single sources, over all capabilities and for each."""
    table = results.table
    measures = in_order(table.loc[table["metric"] == "perplexity", "task"])
    if len(measures) < 2:
        raise TableError(
            f"perplexities {measures}: one for each of two or more capabilities is needed"
        )
    rows = calibrated(pd.concat([scored(table, measure, "perplexity") for measure in measures]))
    mixed = of_calibration(rows, MIXED)
    single = rows[rows["calibration"] != MIXED]
    own = single[single["calibration"] == single["task"].str.removesuffix(HELD_OUT)]
    foreign = single[single["calibration"] != single["task"].str.removesuffix(HELD_OUT)]
    main = paired(mixed, single, SOURCE)
    against_own = paired(mixed, own, SOURCE)
    against_foreign = paired(mixed, foreign, SOURCE)
    by_source = corrected(
        {
            source: paired(mixed, single[single["calibration"] == source], SOURCE)
            for source in in_order(single["calibration"])
        }
    )
    by_measure = {
        measure.removesuffix(HELD_OUT): {
            "its own": paired(mixed[mixed["task"] == measure], own, SOURCE),
            "others": paired(mixed[mixed["task"] == measure], foreign, SOURCE),
        }
        for measure in measures
    }
    if main.shown:
        better = "better" if main.helps else "worse"
        what = f"Mixed calibration data keeps a model's capabilities {better} than one source does."
    else:
        what = "No difference between mixed data and single sources over all capabilities is shown."
    beaten = [name for name, each in by_source.items() if each.shown and each.helps]
    winning = [name for name, each in by_source.items() if each.shown and not each.helps]
    size = (
        f"Mixed against single, over all capabilities: {main.text}; for a capability against its "
        f"own source {against_own.text}, against the other sources {against_foreign.text}."
    )
    certainty = (
        f"Over all capabilities (Holm), mixed data beats {len(beaten)} of {len(by_source)} single "
        f"sources ({listed(beaten) or 'none'})"
        + (f" and loses to {listed(winning)}." if winning else " and loses to none.")
    )
    accuracies = _accuracies(table)
    if accuracies:
        by_task = [f"{name} {each.text}" for name, each in accuracies.items()]
        certainty += f" In accuracy (Holm), mixed against single: {listed(by_task)}."
    caveat = (
        "The mixture has equal parts of all measured capabilities. A capability that it lacks "
        "would be on the other side of this comparison."
    )
    panels = {
        "against its own source": corrected(
            {name: each["its own"] for name, each in by_measure.items()}
        ),
        "against the other sources": corrected(
            {name: each["others"] for name, each in by_measure.items()}
        ),
    }
    figure = interval_figure(
        "Perplexity of each capability after pruning with mixed data, against single sources",
        panels,
        "change by mixing (%)",
    )
    effects = {"all": main, "own source": against_own, "other sources": against_foreign}
    effects |= {f"over all, against {name}": each for name, each in by_source.items()}
    for panel, estimates in panels.items():
        effects |= {f"{name}, {panel}": each for name, each in estimates.items()}
    effects |= accuracies
    return Answer(what, size, certainty, caveat, figure, estimate_rows(effects))


def _accuracies(table: pd.DataFrame) -> dict[str, EffectEstimate]:
    """Compare mixed data with single sources in each task's accuracy."""
    tasks = in_order(table.loc[table["metric"] == "acc", "task"])
    estimates = {}
    for task in tasks:
        rows = calibrated(scored(table, task, "acc"))
        single = rows[rows["calibration"] != MIXED]
        estimates[task] = paired(of_calibration(rows, MIXED), single, SOURCE)
    return corrected(estimates)


STUDY = Study(
    "mixing",
    "Does calibration data of several sources keep a model's capabilities better than one source?",
    "mixed data against all single sources, over all capabilities",
    answer,
)
