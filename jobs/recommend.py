"""Rank calibration data for a model by scores that cost far less than pruning.

A score alone says nothing about pruning. The record says what it is worth: an earlier grid that
pruned with many described sources. The score that predicted its sources best, each from the others,
ranks the candidates. There is no ranking where the record does not carry one: if its scores predict
no better than chance, if it is of another model, or if a candidate lies outside it.
"""

import io
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from scipy import stats

from cluster.store import Store
from jobs.cells import GENERATED_FIELDS, candidate_names
from jobs.grid import Description, Grid
from jobs.plan import Plan, make_plan, plan_for
from pipeline.errors import InputError

_Values = npt.NDArray[np.float64]

_SCORES = ("min_k_plus_plus", "min_k", "loss", "distinct_1", "distinct_2", "distinct_3")
"""Scores that any model and corpus have."""

DIVERGENCE = "divergence"
"""One more, where the grid names a reference."""

_LEAST_SOURCES = 5
_DRAWS = 4000

SIGNIFICANCE = 0.05
"""A record carries a ranking if chance predicts as well with a smaller probability."""

PILOT = "compare the candidates by pilot pruning instead: add --probe TEXT_FILE"
_SETTING = ["model", "pruner", "pruner_options", "sparsity", "pattern"]
_SOURCE = ["calibration", *GENERATED_FIELDS]


class Candidate(NamedTuple):
    """One calibration of one model."""

    model: str
    name: str
    scores: dict[str, float]
    errors: dict[str, float]
    """Standard error of each score's mean, over windows and seeds."""


class Record(NamedTuple):
    """Sources of an earlier grid, each with its scores and its harm."""

    models: tuple[str, ...]
    scores: dict[str, _Values]
    harm: _Values
    """[sources, settings]: logarithm of the perplexity (or minus an accuracy), less each setting's
    mean."""
    is_perplexity: bool
    left_out: int = 0
    """Sources without a finite number, or score, in a setting that others have."""


class Worth(NamedTuple):
    """How well a score predicted the record's sources, each from the others."""

    explained: float
    """Share of the differences between them; below 0, worse than no score."""
    rank: float
    """Spearman's correlation of predictions and harm, averaged over settings."""
    regret: float
    """What the source with the best prediction lost against the best, averaged over settings."""
    random_regret: float
    """What a source drawn at random lost."""


class Ranked(NamedTuple):
    """A candidate, with what the record predicts for it."""

    candidate: Candidate
    expected: float
    """Harm against the candidate expected to be best, on the record's scale."""
    low: float
    high: float
    """80 % interval of it."""
    best: float
    """Probability of being the best of the candidates."""


def scoring_plan(grid: Grid) -> Plan:
    """A grid's plan, in which every calibration set is described."""
    described = grid.model_copy(update={"describe": grid.describe or Description()})
    return make_plan(described)


def scores_only(plan: Plan) -> Plan:
    """The part of a plan that makes descriptions."""
    return plan_for(plan, plan.descriptions.values())


def print_ranking(plan: Plan, store: Store, record_grid: str, console: Console) -> None:
    """Rank the candidates of each model by the record, or say why it cannot be done."""
    candidates = read_candidates(plan, store)
    record = read_record(store, record_grid)
    asked = plan.grid.describe
    known = _SCORES if asked is None or asked.reference is None else (*_SCORES, DIVERGENCE)
    if record is None:
        console.print(
            f"no recommendation: the store holds no results of grid {record_grid} with "
            f"{_LEAST_SOURCES} described sources.\n{PILOT}",
            soft_wrap=True,
        )
        return
    scores = [name for name in known if name in record.scores]
    worths = {name: worth_of(record, name) for name in scores}
    score = max(worths, key=lambda name: worths[name].explained)
    chance = chance_of(record, scores)
    for model in dict.fromkeys(candidate.model for candidate in candidates):
        own = [candidate for candidate in candidates if candidate.model == model]
        reasons = objections(own, score, record, chance)
        if reasons:
            console.print(_scores_table(model, own, score))
            for reason in reasons:
                console.print(f"no recommendation for {model}: {reason}", soft_wrap=True)
            console.print(PILOT, soft_wrap=True)
        else:
            console.print(_table(model, rank(own, score, record), score, record))
    for line in _explanation(score, record, worths[score], record_grid, chance):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def objections(candidates: list[Candidate], score: str, record: Record, chance: float) -> list[str]:
    """Return why the record does not carry a ranking of one model's candidates; empty if it does.

    Args:
        chance: what `chance_of` returns.
    """
    found = []
    model = candidates[0].model
    if chance >= SIGNIFICANCE:
        found.append(
            f"by chance a score predicts the record's sources as well as {score} with probability "
            f"{chance:.2f}"
        )
    if model not in record.models:
        found.append(f"the record is of {', '.join(record.models)}")
    low, high = float(record.scores[score].min()), float(record.scores[score].max())
    found += [
        f"{candidate.name} has {score} {candidate.scores[score]:.4g}, and the record's sources "
        f"have {low:.4g} to {high:.4g}"
        for candidate in candidates
        if not low <= candidate.scores[score] <= high
    ]
    return found


def chance_of(record: Record, scores: Sequence[str], draws: int = _DRAWS) -> float:
    """Return the probability that the best of several scores predicts as well by chance.

    A permutation test: each score is dealt to the sources at random, all scores in the same order,
    and the best explained share is compared with the true one. So the choice of the best score is
    part of the test.
    """
    x = np.stack([record.scores[name] for name in scores])
    found = _explained(x, record.harm).max()
    generator = np.random.default_rng(0)
    dealt = [
        _explained(x[:, generator.permutation(x.shape[1])], record.harm).max() for _ in range(draws)
    ]
    return (1 + int(np.sum(np.array(dealt) >= found - 1e-12))) / (1 + draws)


def _explained(x: _Values, harm: _Values) -> _Values:
    """Return how much of the differences between sources each score explains in unseen ones.

    Args:
        x: scores, [scores, sources].
        harm: [sources, settings]; each setting counts the same.

    Returns:
        [scores]; at most 1, and below 0 where the mean of the other sources predicts better.
    """
    residuals, of_mean = left_out(x, harm)
    shares: _Values = 1 - (residuals**2).sum(axis=(1, 2)) / (of_mean**2).sum()
    return shares


def left_out(x: _Values, harm: _Values) -> tuple[_Values, _Values]:
    """Return what predictions of each source from the others miss.

    Args:
        x: scores, [scores, sources].
        harm: [sources, settings].

    Returns:
        Residuals in standard deviations of a setting: of a line through the other sources
        [scores, sources, settings], in closed form by the leverage, and of their mean
        [sources, settings].
    """
    spread = harm.std(axis=0)
    level = (harm - harm.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    count = len(level)
    centred = x - x.mean(axis=1, keepdims=True)
    squares = np.maximum((centred**2).sum(axis=1, keepdims=True), 1e-300)
    lines = centred[:, :, None] * (centred @ level / squares)[:, None, :]
    leverage = 1 / count + centred**2 / squares
    return (level - lines) / (1 - leverage)[:, :, None], level * count / (count - 1)


def read_candidates(plan: Plan, store: Store) -> list[Candidate]:
    """The calibrations that are described, their scores averaged over seeds."""
    reports: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    names = candidate_names(plan.cells.values())
    for key, cell in plan.cells.items():
        described = plan.descriptions.get(key)
        manifest = None if described is None else store.manifest(described)
        if described is not None and manifest is not None:
            name = names[cell]
            for field, value in manifest.report.items():
                if isinstance(value, float) and not math.isfinite(value):
                    remedy = f"its {field} is {value}: describe it again with a sound model"
                    raise InputError("describe", f"{cell.model}: {name}", remedy)
            reports.setdefault((cell.model, name), {})[described] = manifest.report
    candidates = []
    for (model, name), by_key in reports.items():
        each = list(by_key.values())
        scores = {
            field: float(np.mean([report[field] for report in each]))
            for field in (*_SCORES, DIVERGENCE)
            if field in each[0]
        }
        errors = {field: _error(each, field) for field in scores}
        candidates.append(Candidate(model, name, scores, errors))
    return candidates


def _error(reports: list[dict[str, Any]], field: str) -> float:
    """Over seeds if there are several, else over windows."""
    if len(reports) > 1:
        return float(np.std([report[field] for report in reports], ddof=1) / len(reports) ** 0.5)
    return float(reports[0].get(f"{field}_error") or 0.0)


def read_record(store: Store, grid: str) -> Record | None:
    """What an earlier grid tells of scores and pruning; None if it is not there, or has fewer than
    five described sources."""
    content = store.read(f"results/{grid}.parquet")
    if content is None:
        return None
    table = pq.read_table(io.BytesIO(content)).to_pandas()
    if "calibration_report" not in table:
        return None
    rows = table[(table["status"] == "ok") & table["calibration_report"].notna()]
    rows = rows[rows["metric"].notna()]
    perplexities = rows[rows["metric"] == "perplexity"]
    rows = perplexities if len(perplexities) else rows[rows["metric"] == "acc"]
    if rows.empty:
        return None
    rows = rows[rows["task"] == rows["task"].iloc[0]]
    is_perplexity = bool(len(perplexities))
    values = rows["value"].to_numpy(dtype=np.float64)
    source = rows.groupby(_SOURCE, dropna=False).ngroup()
    with np.errstate(invalid="ignore", divide="ignore"):
        levels = np.log(values) if is_perplexity else -values
    rows = rows.assign(harm=np.where(np.isfinite(levels), levels, np.nan), source=source)
    reports = pd.DataFrame([json.loads(report) for report in rows["calibration_report"]])
    fields = [field for field in (*_SCORES, DIVERGENCE) if field in reports]
    means = reports[fields].groupby(source.to_numpy()).agg(_mean)
    every = rows.groupby(["source", *_SETTING])["harm"].agg(_mean).unstack(_SETTING)
    harm = every[np.isfinite(means.loc[every.index].to_numpy()).all(axis=1)].dropna()
    if len(harm) < _LEAST_SOURCES:
        return None
    means = means.loc[harm.index]
    levels = harm.to_numpy(dtype=np.float64)
    return Record(
        models=tuple(sorted(set(rows["model"]))),
        scores={field: means[field].to_numpy(dtype=np.float64) for field in fields},
        harm=levels - levels.mean(axis=0),
        is_perplexity=is_perplexity,
        left_out=len(every) - len(harm),
    )


def _mean(seeds: "pd.Series[float]") -> float:
    """NaN where one is."""
    return float(seeds.mean(skipna=False))


def worth_of(record: Record, score: str) -> Worth:
    """Return how well a score predicts each source of the record from the others."""
    x, harm = record.scores[score][None], record.harm
    (residuals,), _ = left_out(x, harm)
    spread = harm.std(axis=0)
    predicted = harm - residuals * np.where(spread > 0, spread, 1.0)
    settings = range(harm.shape[1])
    ranks = [stats.spearmanr(predicted[:, at], harm[:, at]).statistic for at in settings]
    chosen = harm[predicted.argmin(axis=0), settings] - harm.min(axis=0)
    return Worth(
        explained=float(_explained(x, harm)[0]),
        rank=float(np.mean(ranks)),
        regret=float(chosen.mean()),
        random_regret=float((harm.mean(axis=0) - harm.min(axis=0)).mean()),
    )


def rank(candidates: list[Candidate], score: str, record: Record) -> list[Ranked]:
    """Return the candidates from best to worst.

    Harm is a line through the record's sources, averaged over settings. Lines are drawn from their
    posterior under a flat prior, and every candidate has its own residual and error of score: the
    share of draws in which it is best is its probability.
    """
    x, y = record.scores[score], record.harm.mean(axis=1)
    centred = x - x.mean()
    spread = max(float(centred @ centred), 1e-300)
    slope = float(centred @ y) / spread
    left = y - y.mean() - slope * centred
    freedom = len(x) - 2
    generator = np.random.default_rng(0)
    sigma = np.sqrt(left @ left / generator.chisquare(freedom, _DRAWS))
    slopes = slope + sigma * generator.standard_normal(_DRAWS) / np.sqrt(spread)
    at = np.array([candidate.scores[score] for candidate in candidates]) - x.mean()
    errors = np.array([candidate.errors[score] for candidate in candidates])
    size = (_DRAWS, len(candidates))
    places = at + errors * generator.standard_normal(size)
    drawn = slopes[:, None] * places + sigma[:, None] * generator.standard_normal(size)
    first = int((slope * at).argmin())
    against = drawn - drawn[:, [first]]
    low, high = np.quantile(against, [0.1, 0.9], axis=0)
    best = np.bincount(drawn.argmin(axis=1), minlength=len(candidates)) / _DRAWS
    ranked = [
        Ranked(
            candidate,
            slope * float(at[place] - at[first]),
            float(low[place]),
            float(high[place]),
            float(best[place]),
        )
        for place, candidate in enumerate(candidates)
    ]
    return sorted(ranked, key=lambda each: each.expected)


def _score_text(candidate: Candidate, score: str) -> str:
    return f"{candidate.scores[score]:.4g} ± {candidate.errors[score]:.2g}"


def _scores_table(model: str, candidates: list[Candidate], score: str) -> Table:
    table = Table("calibration", score, title=f"{model}, not ranked", title_justify="left")
    for candidate in candidates:
        table.add_row(candidate.name, _score_text(candidate, score))
    return table


def _table(model: str, ranked: list[Ranked], score: str, record: Record) -> Table:
    table = Table(title=f"calibration data for {model}, ranked by {score}", title_justify="left")
    harm = f"expected harm against the first, {_unit(record)} (80 % interval)"
    for heading in ("", "calibration", score, harm, "probability of being best"):
        table.add_column(heading)
    for place, each in enumerate(ranked, start=1):
        effects = [_effect(value, record) for value in (each.expected, each.low, each.high)]
        table.add_row(
            str(place),
            each.candidate.name,
            _score_text(each.candidate, score),
            "" if place == 1 else f"{effects[0]} ({effects[1]} to {effects[2]})",
            f"{each.best:.0%}",
        )
    return table


def _explanation(score: str, record: Record, worth: Worth, grid: str, chance: float) -> list[str]:
    sources = len(record.harm)
    lines = [
        f"record: {sources} sources of grid {grid}, each predicted from the others: {score} "
        f"explains {worth.explained:.0%} of the differences in harm, rank correlation "
        f"{worth.rank:.2f}; the source that it would have chosen lost "
        f"{_effect(worth.regret, record)} {_unit(record)} against the best, a random one "
        f"{_effect(worth.random_regret, record)}. It is the best of several scores by that record; "
        f"by chance the best would explain as much with probability {chance:.3f}."
    ]
    if record.left_out:
        lines.append(f"Left out: {record.left_out} sources that lack a finite number in a setting.")
    return lines


def _effect(value: float, record: Record) -> str:
    return f"{100 * (np.expm1(value) if record.is_perplexity else value):+.1f}"


def _unit(record: Record) -> str:
    return "%" if record.is_perplexity else "points"
