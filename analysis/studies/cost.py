"""When the device-seconds spent on self-generation pay off."""

import numpy as np
import pandas as pd

from analysis.charts import Point, point_figure
from analysis.evidence import (
    SOURCE,
    calibrated,
    corrected,
    estimate_rows,
    listed,
    of_calibration,
    paired,
    scored,
)
from analysis.labels import in_order
from analysis.study import Answer, Results, Study

CORPUS, GENERATED = "mismatched", "self-generated"
SECONDS = ["seconds_generate", "seconds_score", "seconds_prune"]


def answer(results: Results) -> Answer:
    """Compare gain and device-seconds of generated sets of several sizes with the corpus."""
    rows = calibrated(scored(results.table))
    seconds = rows[SECONDS]
    rows = rows.assign(extra=seconds.iloc[:, :2].sum(axis=1), total=seconds.sum(axis=1))
    corpus, generated = of_calibration(rows, CORPUS), of_calibration(rows, GENERATED)
    sizes = sorted({int(size) for size in generated["num_samples"].dropna()})
    by_size = corrected(
        {
            size: paired(generated[generated["num_samples"] == size], corpus, SOURCE)
            for size in sizes
        }
    )
    first, last = sizes[0], sizes[-1]
    smallest = generated[generated["num_samples"] == first]
    main = paired(smallest, corpus, SOURCE)
    more = paired(generated[generated["num_samples"] == last], smallest, SOURCE)
    extra = {
        size: float(generated.loc[generated["num_samples"] == size, "extra"].median())
        for size in sizes
    }
    if main.shown and main.helps:
        what = f"Self-generation pays with as few as {first} samples."
    elif any(each.shown and each.helps for each in by_size.values()):
        size = next(s for s, each in by_size.items() if each.shown and each.helps)
        what = f"Self-generation pays from {size} samples on."
    else:
        what = f"It is not shown for any size that self-generated data beat the {CORPUS} corpus."
    gains = [f"{n} samples ({extra[n]:.1f} device-seconds) {e.text}" for n, e in by_size.items()]
    prune = {
        method: float(rows.loc[rows["method"] == method, "seconds_prune"].median())
        for method in in_order(rows["method"])
    }
    size_text = (
        f"Against the {CORPUS} corpus: {'; '.join(gains)}. A pruning itself takes "
        f"{listed([f'{value:.1f} s with {name}' for name, value in prune.items()])}: a set that "
        "many prunings share costs each of them a fraction."
    )
    certainty = "p is corrected for the sizes (Holm). "
    if last != first:
        certainty += f"{last} samples against {first}: {more.text}"
        certainty += "." if more.shown else ", so it is not shown that more samples pay."
    dearer = _dearer_pruner(corpus, smallest, prune)
    caveat = (
        f"{dearer} Seconds are those of this run's machine, summed over shards. Generation with a "
        "large model takes much longer than its pruning, unless an engine batches well."
    )
    figure = point_figure(
        f"Gain against device-seconds spent, from pruning with the {CORPUS} corpus",
        _points(rows, corpus, sizes),
        "device-seconds (log scale)",
        f"change against {next(iter(prune))} with the corpus (%)",
        note="Seconds of generation, scoring and pruning. Bars: 95 % intervals over seeds of this "
        "one model.",
    )
    effects = {f"{size} samples": each for size, each in by_size.items()}
    effects |= {f"{last} samples against {first}": more}
    return Answer(what, size_text, certainty, caveat, figure, estimate_rows(effects))


def _points(rows: pd.DataFrame, corpus: pd.DataFrame, sizes: list[int]) -> dict[str, list[Point]]:
    """Compare every source of each pruner with the first pruner on the corpus."""
    methods = in_order(rows["method"])
    reference = corpus[corpus["method"] == methods[0]]
    pruner = ["method", "pruner", "pruner_options"]
    points: dict[str, list[Point]] = {method: [] for method in methods}
    for method in methods:
        own = rows[rows["method"] == method]
        parts = {"corpus": own[own["calibration"] == CORPUS]}
        for size in sizes:
            chosen = (own["calibration"] == GENERATED) & (own["num_samples"] == size)
            parts[f"{size} samples"] = own[chosen]
        for name, part in parts.items():
            each = paired(part, reference, [*SOURCE, *pruner])
            if not part.empty and np.isfinite(each.effect):
                at = float(part["total"].median())
                points[method].append(Point(name, at, each.effect, each.low, each.high, method))
    return points


def _dearer_pruner(corpus: pd.DataFrame, generated: pd.DataFrame, prune: dict[str, float]) -> str:
    """Compare the cheapest pruner on generated data with the dearest on the corpus."""
    cheap, dear = min(prune, key=prune.__getitem__), max(prune, key=prune.__getitem__)
    if cheap == dear:
        return ""
    across = [*SOURCE, "method", "pruner", "pruner_options"]
    cheap_rows = generated[generated["method"] == cheap]
    against = paired(cheap_rows, corpus[corpus["method"] == dear], across)
    return f"{cheap} with generated data against {dear} with the corpus: {against.text}."


STUDY = Study(
    "cost",
    "When do the device-seconds spent on self-generation pay off?",
    "the smallest generated set against the mismatched corpus",
    answer,
)
