"""How long self-generation's prefixes should be, and whether that depends on the model's shape."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.charts import Curve, line_figure
from analysis.evidence import (
    LEVEL,
    EffectEstimate,
    bootstrap,
    calibrated,
    corrected,
    estimate_rows,
    listed,
    paired,
    scored,
)
from analysis.labels import in_order
from analysis.load import TableError
from analysis.metrics import Values, metric_named, p_text
from analysis.study import Answer, Results, Study

_PAPER = 2
"""Tokens of the paper's prefixes, the reference of all effects."""

SHORT, LONG = (1, 4), 16
"""The range that the paper found best, and the shortest long prefix."""


def answer(results: Results) -> Answer:
    """Compare lengths with the paper's, and short with long, and test the model's influence."""
    rows = calibrated(scored(results.table))
    lengths = sorted({int(length) for length in rows["prefix_tokens"].dropna()})
    if _PAPER not in lengths or len(lengths) < 3:
        raise TableError(f"prefix lengths {lengths}: {_PAPER} and two others are needed")
    models = in_order(rows["model"])
    at_paper = rows[rows["prefix_tokens"] == _PAPER]
    lines: list[Curve] = []
    effects: dict[str, EffectEstimate] = {}
    for model in models:
        own = rows[rows["model"] == model]
        curve = {
            length: paired(own[own["prefix_tokens"] == length], at_paper, ["prefix_tokens"])
            for length in lengths
        }
        lines.append(Curve(model, range(len(lengths)), list(curve.values())))
        effects |= {f"{model}, {length} tokens": each for length, each in curve.items()}
    short = rows[rows["prefix_tokens"].between(*SHORT)]
    long = rows[rows["prefix_tokens"] >= LONG]
    main = paired(short, long, ["prefix_tokens"])
    by_model = corrected(
        {model: paired(short[short["model"] == model], long, ["prefix_tokens"]) for model in models}
    )
    effects |= {"short against long": main}
    effects |= {f"{model}, short against long": each for model, each in by_model.items()}
    if main.shown:
        better = "better" if main.helps else "worse"
        what = f"Prefixes of 1 to 4 tokens prune {better} than those of {LONG} and more."
    else:
        what = f"No difference between prefixes of 1 to 4 and of {LONG} and more tokens is shown."
    size = (
        f"Short against long: {main.text}; by model "
        + listed([f"{model} {each.text}" for model, each in by_model.items()])
        + ". "
        + " ".join(_best(rows[rows["model"] == model], model) for model in models)
    )
    figure = line_figure(
        "Perplexity after pruning, by the length of self-generation's prefixes",
        {"each model": lines},
        "tokens of a prefix",
        f"change against {_PAPER} tokens (%)",
        {place: str(length) for place, length in enumerate(lengths)},
    )
    certainty = _interaction(rows) if len(models) > 1 else "One model says nothing about shapes."
    caveat = (
        "Each shape was trained once. A second training of one shape could differ as much as two "
        "shapes do."
    )
    return Answer(what, size, certainty, caveat, figure, estimate_rows(effects))


def _best(rows: pd.DataFrame, model: str) -> str:
    """Name the best length, and say how often resampled seeds choose it."""
    means = rows.pivot_table(index="seed", columns="prefix_tokens", values="score").dropna()
    sign = 1 if metric_named(str(rows["metric"].iloc[0])).lower_is_better else -1
    scores = sign * means.to_numpy(dtype=np.float64)
    best = int(scores.mean(axis=0).argmin())
    if len(scores) < 2:
        return f"Best for {model}: {means.columns[best]} tokens, from one seed."
    chosen: list[int] = []

    def choose(seeds: Any) -> float:
        chosen.append(int(scores[seeds].mean(axis=0).argmin()))
        return float(chosen[-1])

    bootstrap(len(scores), choose)
    share = chosen.count(best) / len(chosen)
    likely = sorted({place for place in chosen if chosen.count(place) >= 0.05 * len(chosen)})
    frequent = listed([str(means.columns[place]) for place in likely])
    return (
        f"Best for {model}: {means.columns[best]} tokens, chosen by {share:.0%} of resamples "
        f"(chosen by 5% or more: {frequent})."
        if len(likely) > 1
        else f"Best for {model}: {means.columns[best]} tokens, chosen by {share:.0%} of resamples."
    )


def _interaction(rows: pd.DataFrame) -> str:
    """Test by F whether the lengths' effects differ between models, with seeds as blocks."""
    blocks = pd.get_dummies(rows["model"].astype(str) + "/" + rows["seed"].astype(str), dtype=float)
    lengths = rows["prefix_tokens"].astype(str)
    additive = np.hstack([blocks, pd.get_dummies(lengths, dtype=float)])
    full = np.hstack([blocks, pd.get_dummies(rows["model"] + "/" + lengths, dtype=float)])
    score = rows["score"].to_numpy(dtype=np.float64)
    (left, rank), (least, full_rank) = (_residual(design, score) for design in (additive, full))
    freedom = len(rows) - full_rank
    if freedom < 1 or least <= 0:
        return "A test of whether the effect differs between the models needs more seeds."
    f = ((left - least) / (full_rank - rank)) / (least / freedom)
    p = float(stats.f.sf(f, full_rank - rank, freedom))
    test = f"(interaction of length and model: F = {f:.1f}, p {_equals(p_text(p))})"
    if p < LEVEL:
        return f"The effect of the length differs between the models {test}."
    return f"It is not shown that the effect differs between the models {test}."


def _residual(design: Values, score: Values) -> tuple[float, int]:
    """Return a linear model's residual sum of squares, and its rank."""
    fitted, _, rank, _ = np.linalg.lstsq(design, score, rcond=None)
    return float(np.square(score - design @ fitted).sum()), int(rank)


def _equals(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"


STUDY = Study(
    "prefix-length",
    "How long should the prefixes of self-generation be, and does that depend on the model?",
    "prefixes of 1 to 4 tokens against those of 16 and more",
    answer,
)
