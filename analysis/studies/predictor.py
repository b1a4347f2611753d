"""Which cheap score of a calibration set predicts how well it prunes.

A source's scores and its results after pruning are averaged over seeds, its scores over models too.
The source is the unit, since a score predicts pruning only through the differences between sources;
intervals resample models as well. Many sources are
mixtures of the same domains, so a prediction is tested on domains that its fit has not seen: each
fold leaves out all sources that hold one domain. Text that a model wrote is a domain too.
"""

import json
import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import statsmodels.api as sm
from numpy.typing import NDArray
from scipy import stats

from analysis.charts import interval_figure
from analysis.evidence import EffectEstimate, calibrated, listed, scored
from analysis.load import TableError
from analysis.metrics import MetricKind, Values, effect_text, metric_named
from analysis.study import Answer, Results, Study

SCORES = {
    "min_k_plus_plus": "Min-K%++",
    "min_k": "Min-K%",
    "loss": "log perplexity",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "distinct_3": "distinct 3-grams",
    "token_entropy": "entropy of the set's tokens",
    "effective_directions": "directions of its hidden states",
    "divergence": "divergence from the pretraining text",
    "missing_mass": "pretraining tokens that it lacks",
    "reference_distance": "distance of the pretraining text from it",
}
"""Fields of a set's description, and their names: means over its windows, then what it covers as a
whole, then what it shares with the pretraining text."""

MAIN = "min_k_plus_plus"
_SETTING = ["model", "method", "target"]
_LEAST_SOURCES = 5
LEAST_FITTED = 3

_Flags = NDArray[np.bool_]
_Places = NDArray[np.intp]

_RESAMPLES = 1000

PLAIN = MetricKind(lower_is_better=False, is_perplexity=False, is_share=False)
"""The kind of numbers without a unit."""


class Sources(NamedTuple):
    """Scores and harm of each source, averaged over seeds."""

    names: list[str]
    scores: dict[str, Values]
    """By score, `[sources]`."""

    harm: Values
    """`[sources, settings]`: the scaled metric minus each setting's mean; higher is worse."""

    models: list[_Places]
    """For each model the places of its settings."""

    kind: MetricKind

    holds: _Flags
    """`[sources, domains]`: whether a source holds a domain."""


class Prediction(NamedTuple):
    """How well a score predicts the harm by pruning."""

    rank: EffectEstimate
    """Spearman's correlation with the harm, averaged over settings."""

    explained: EffectEstimate
    """Share of the differences in harm explained in domains left out of the fit, in percent; below
    0 the score is worse than no score. Each resample is fitted again."""

    effect: EffectEstimate
    """Harm per standard deviation of the score, by the mixed model."""

    regret: float
    """Loss of the source with the best prediction from other domains against the best one, on
    average over settings, in the metric's unit."""


def answer(results: Results) -> Answer:
    """Return every score's rank correlation, out-of-source error and effect."""
    sources = gathered(results.table)
    predictions = {name: predict(sources, name) for name in sources.scores}
    main = predictions[MAIN]
    ranked = sorted(predictions, key=lambda name: -predictions[name].explained.effect)
    good = [name for name in ranked if predictions[name].explained.low > 0]
    ranking = [name for name in ranked if predictions[name].rank.shown]
    direction = "lower" if main.rank.effect < 0 else "higher"
    if main.rank.shown:
        what = (
            f"Sources of higher Min-K%++ go with {direction} harm by pruning (rank correlation "
            f"{_interval(main.rank)})."
        )
    else:
        what = (
            "It is not shown that Min-K%++ ranks sources as pruning does (rank correlation "
            f"{_interval(main.rank)})."
        )
    if further := [name for name in ranking if name != MAIN]:
        texts = [f"{SCORES[name]} {_interval(predictions[name].rank)}" for name in further]
        what += f" These do (rank correlations): {'; '.join(texts)}."
    explained = [
        effect_text(each.effect, each.low, each.high, "%")
        for each in (predictions[name].explained for name in ranked)
    ]
    named = [f"{SCORES[name]} {text}" for name, text in zip(ranked, explained, strict=True)]
    size = (
        "Of the differences between sources of domains that the fit has not seen, the scores "
        f"explain: {'; '.join(named)}. One standard deviation of Min-K%++ goes with "
        + effect_text(*main.effect[:3], sources.kind.unit)
        + " harm (mixed model, with sources, pruners and sparsities as random effects)."
    )
    losses = [f"{SCORES[name]} {predictions[name].regret:.1f}" for name in ranked]
    losses.append(f"a random choice {_random_regret(sources):.1f}")
    certainty = (
        f"Better than no score in unseen domains: {listed([SCORES[name] for name in good])}."
        if good
        else "No score is shown to predict sources of unseen domains better than their mean does."
    )
    certainty += (
        f" The source chosen by a score loses against the best one, in {sources.kind.unit} and on "
        f"average over settings: {'; '.join(losses)}."
    )
    models = f"{len(sources.models)} model{'' if len(sources.models) == 1 else 's'}"
    caveat = (
        f"All estimates rest on {len(sources.names)} sources and {models}, the intervals on "
        f"resampling both; those of all {len(ranked)} scores hold together. Other sources can "
        "change order and size, real corpora above all, since they differ less."
    )
    if "divergence" in sources.scores:
        caveat += (
            " The divergence, the missing tokens and the distance need the pretraining text, which "
            "most models keep secret. Entropy counts kinds where they share few words, as here."
        )
    figure = interval_figure(
        "How well cheap scores of a calibration set predict its pruning",
        {
            "rank correlation with harm": {SCORES[n]: p.rank for n, p in predictions.items()},
            "explained in unseen domains (share)": {
                SCORES[name]: prediction.explained._replace(
                    effect=prediction.explained.effect / 100,
                    low=prediction.explained.low / 100,
                    high=prediction.explained.high / 100,
                )
                for name, prediction in predictions.items()
            },
        },
        "Bars: 95 % intervals over sources and models, simultaneous. Filled: zero lies outside; "
        "hollow: inside.",
        directed=False,
    )
    for axes, label in zip(figure.axes, ("−1 or 1 is perfect", "1 is perfect"), strict=True):
        axes.set_xlim(-1.1, 1.1)
        axes.set_xlabel(label)
    return Answer(what, size, certainty, caveat, figure, _numbers(predictions))


def gathered(table: pd.DataFrame) -> Sources:
    """Return the described sources that have results in every setting, with scores and harm.

    Raises:
        TableError: if fewer than five sources are described.
    """
    rows = calibrated(scored(table))
    rows = rows[rows["calibration_report"].notna()]
    if rows.empty:
        raise TableError("no calibration is described: write describe: {} in the grid")
    kind = metric_named(str(rows["metric"].iloc[0]))
    harm = rows.pivot_table(index="source", columns=_SETTING, values="score").dropna()
    if len(harm) < _LEAST_SOURCES:
        raise TableError(f"{len(harm)} described sources: {_LEAST_SOURCES} are needed")
    reports = pd.DataFrame([json.loads(report) for report in rows["calibration_report"]])
    reports = reports.assign(source=rows["source"].to_numpy())
    means = reports.groupby("source").mean(numeric_only=True).loc[harm.index]
    lineages = rows.drop_duplicates("source").set_index("source")["lineage"].loc[harm.index]
    domains = [domains_of(json.loads(lineage)) for lineage in lineages]
    sign = 1 if kind.lower_is_better else -1
    values = sign * harm.to_numpy(dtype=np.float64)
    return Sources(
        names=[str(name) for name in harm.index],
        scores={name: means[name].to_numpy(dtype=float) for name in SCORES if name in means},
        harm=values - values.mean(axis=0),
        models=[
            np.flatnonzero(harm.columns.get_level_values("model") == model)
            for model in harm.columns.unique("model")
        ],
        kind=kind,
        holds=np.array([[name in own for name in sorted(set.union(*domains))] for own in domains]),
    )


def domains_of(lineage: dict[str, Any]) -> set[str]:
    """Return the domains of a cell's calibration text, from its evaluation's spec.

    They are the domains of a testbed's corpus, else the corpora themselves; for generated text
    those of its prefixes, and the fact that a model wrote it.
    """
    source = lineage["model"]["calibration"]["source"]
    if source["kind"] == "filter":
        return {"model-written"} | _domains(source["scores"]["samples"]["prefixes"])
    return _domains(source)


def _domains(corpus: dict[str, Any]) -> set[str]:
    if "parts" in corpus:
        return set.union(*(_domains(part["corpus"]) for part in corpus["parts"].values()))
    return set(corpus.get("mixture", [json.dumps(corpus, sort_keys=True)]))


def predict(sources: Sources, name: str) -> Prediction:
    """Return how well one score predicts the harm."""
    x, harm, holds = sources.scores[name], sources.harm, sources.holds

    def explained(left: Values, without: Values) -> Values:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(without > 0, 100 * (1 - left / without), np.nan)

    chosen, settings = _resamples(sources)
    ranks = rank_correlations(x[chosen], harm[chosen])
    left, without, _ = leave_domains_out(x[chosen], harm[chosen], holds[chosen])
    left, without = _mean_over(settings, left), _mean_over(settings, without)
    all_left, all_without, predicted = leave_domains_out(x, harm, holds)
    best = np.where(np.isnan(predicted), np.inf, predicted).argmin(axis=0)
    regret = harm[best, range(harm.shape[1])] - harm.min(axis=0)
    return Prediction(
        rank=_simultaneous(
            float(rank_correlations(x, harm).mean()), _mean_over(settings, ranks), sources
        ),
        explained=_simultaneous(
            float(explained(all_left.mean(), all_without.mean())), explained(left, without), sources
        ),
        effect=mixed_effect(sources, name),
        regret=sources.kind.effect(float(regret.mean())),
    )


def rank_correlations(x: Values, harm: Values) -> Values:
    """Return Spearman's correlation of a score with harm in each setting, `[..., settings]`; NaN
    where the score or the harm is constant.

    Args:
        x: the score, `[..., sources]`.
        harm: `[..., sources, settings]`.
    """
    ranks, harm_ranks = stats.rankdata(x, axis=-1)[..., None], stats.rankdata(harm, axis=-2)
    ranks = ranks - ranks.mean(axis=-2, keepdims=True)
    harm_ranks = harm_ranks - harm_ranks.mean(axis=-2, keepdims=True)
    spread = np.sqrt((ranks**2).sum(axis=-2) * (harm_ranks**2).sum(axis=-2))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Values = (ranks * harm_ranks).sum(axis=-2) / spread
    return found


def leave_domains_out(x: Values, harm: Values, holds: _Flags) -> tuple[Values, Values, Values]:
    """Predict the sources of each domain by a line through those without it, and by their mean.

    Each setting is divided by its spread, so that settings have equal weight, and so have domains.
    A domain that leaves fewer than three different scores to fit is no fold.

    Args:
        x: the score, `[..., sources]`.
        harm: `[..., sources, settings]`.
        holds: `[..., sources, domains]`.

    Returns:
        Mean squared errors of the line and of the mean, `[..., settings]`, NaN without a fold; and
        the line's predictions, `[..., sources, settings]`, averaged over folds, NaN for a source in
        none.
    """
    spread = harm.std(axis=-2, keepdims=True)
    scaled = harm / np.where(spread > 0, spread, 1.0)
    line_errors, mean_errors = np.zeros((2, *scaled[..., 0, :].shape))
    total, folds = np.zeros_like(scaled), np.zeros_like(x)
    used = np.zeros(x.shape[:-1])
    with np.errstate(invalid="ignore", divide="ignore"):  # where there is no fold
        for inside in np.moveaxis(holds, -1, 0):
            fold = inside.any(axis=-1) & (_distinct(x, ~inside) >= LEAST_FITTED)
            fitted, mean_x = ~inside[..., None], _mean_where(~inside, x)
            centred = (x - mean_x[..., None])[..., None]
            mean = _mean_where(fitted, scaled, axis=-2)[..., None, :]
            slope = (fitted * centred * (scaled - mean)).sum(axis=-2, keepdims=True)
            slope /= (fitted * centred**2).sum(axis=-2, keepdims=True)
            line = mean + slope * centred
            for errors, predicted in ((line_errors, line), (mean_errors, mean)):
                missed = _mean_where(inside[..., None], (scaled - predicted) ** 2, axis=-2)
                errors += np.where(fold[..., None], missed, 0.0)
            taken = fold[..., None] & inside
            total += np.where(taken[..., None], line, 0.0)
            folds += taken
            used += fold
        return (
            line_errors / used[..., None],
            mean_errors / used[..., None],
            total / folds[..., None],
        )


def _distinct(x: Values, among: _Flags) -> NDArray[np.intp]:
    """Return how many different numbers are among those of the last axis."""
    ordered = np.sort(np.where(among, x, np.inf), axis=-1)
    steps: NDArray[np.intp] = (np.diff(ordered, axis=-1) > 0).sum(axis=-1)
    return np.where(among.all(axis=-1), steps + 1, steps)


def _mean_where(among: _Flags, values: Values, axis: int = -1) -> Values:
    """Return the mean of chosen values; NaN if none is chosen."""
    found: Values = (among * values).sum(axis=axis) / among.sum(axis=axis)
    return found


def mixed_effect(sources: Sources, name: str) -> EffectEstimate:
    """Return the harm per standard deviation of the score, by a mixed model.

    The slope is fixed; the level of each source and the slope of each setting are random. NaN if
    the fit does not converge.
    """
    x = sources.scores[name]
    nothing = EffectEstimate(np.nan, np.nan, np.nan, False, sources.kind)
    if x.std() == 0:
        return nothing
    standard = (x - x.mean()) / x.std(ddof=1)
    count, settings = sources.harm.shape
    source = np.repeat(np.arange(count), settings)
    setting = np.tile(np.arange(settings), count)
    slopes = standard[source]
    by_source = np.eye(count)[source]
    by_setting = np.eye(settings)[setting] * slopes[:, None]
    design = np.column_stack([np.ones(len(source)), slopes])
    groups = np.zeros(len(source))
    parts: Any = sm.regression.mixed_linear_model.VCSpec(
        ["source", "slope by setting"],
        [[[f"s{i}" for i in range(count)]], [[f"t{i}" for i in range(settings)]]],
        [[by_source], [by_setting]],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance of 0 lies on the boundary and warns
        fit = sm.MixedLM(sources.harm.flatten(), design, groups, exog_vc=parts).fit(
            reml=True, method=["lbfgs", "powell"]
        )
    if not fit.converged:
        return nothing
    middle, error = float(fit.fe_params[1]), float(fit.bse_fe[1])
    half = float(stats.t.ppf(0.975, count - 2)) * error
    effect = sources.kind.effect
    signed = 1 if sources.kind.lower_is_better else -1
    low, high = sorted((effect(signed * (middle - half)), effect(signed * (middle + half))))
    return _estimate(effect(signed * middle), low, high, sources.kind)


def _resamples(sources: Sources) -> tuple[_Places, Values]:
    """Return the sources of each resample, `[resamples, sources]`, and how often it holds each
    setting, `[resamples, settings]`: sources and models are drawn with replacement."""
    generator = np.random.default_rng(0)
    count, models = len(sources.names), len(sources.models)
    chosen = np.empty((_RESAMPLES, count), dtype=np.intp)
    settings = np.zeros((_RESAMPLES, sources.harm.shape[1]))
    for number in range(_RESAMPLES):
        chosen[number] = generator.integers(count, size=count)
        for model in generator.integers(models, size=models):
            settings[number, sources.models[model]] += 1
    return chosen, settings


def _mean_over(settings: Values, values: Values) -> Values:
    """Return the mean of each resample's settings, `[resamples]`; NaN if one of them is."""
    held = np.where(settings > 0, settings * values, 0.0)
    found: Values = held.sum(axis=-1) / settings.sum(axis=-1)
    return found


def _simultaneous(effect: float, resampled: Values, sources: Sources) -> EffectEstimate:
    """Return an effect with the percentile interval of its resamples; NaN if more than half of the
    resamples give NaN.

    The intervals of all scores hold together with 95 % (Bonferroni).
    """
    known = resampled[np.isfinite(resampled)]
    low, high = np.nan, np.nan
    if len(known) >= _RESAMPLES / 2:
        tail = 0.025 / len(sources.scores)
        low, high = (float(each) for each in np.quantile(known, [tail, 1 - tail]))
    return _estimate(effect, low, high, PLAIN)


def _estimate(effect: float, low: float, high: float, kind: MetricKind) -> EffectEstimate:
    return EffectEstimate(effect, low, high, low > 0 or high < 0, kind)


def _interval(estimate: EffectEstimate) -> str:
    text = f"{estimate.effect:+.2f}, 95 % interval {estimate.low:+.2f} to {estimate.high:+.2f}"
    return text.replace("-", "−")


def _random_regret(sources: Sources) -> float:
    return sources.kind.effect(float((sources.harm.mean(axis=0) - sources.harm.min(axis=0)).mean()))


def _numbers(predictions: dict[str, Prediction]) -> pd.DataFrame:
    rows = []
    for name, prediction in predictions.items():
        row: dict[str, Any] = {"score": name, "regret": prediction.regret}
        for field in ("rank", "explained", "effect"):
            estimate: EffectEstimate = getattr(prediction, field)
            row |= {field: estimate.effect, f"{field}_low": estimate.low}
            row |= {f"{field}_high": estimate.high}
        rows.append(row)
    return pd.DataFrame(rows)


STUDY = Study(
    "predictor",
    "Which cheap score of a calibration set predicts how well it prunes?",
    "the rank correlation of Min-K%++ with the harm by pruning",
    answer,
)
