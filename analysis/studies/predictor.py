"""Which cheap score of a calibration set predicts how well it prunes.

A source's scores and its results after pruning are averaged over seeds. The source is the unit,
since a score predicts pruning only through the differences between sources.
"""

import json
import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats

from analysis.charts import interval_figure
from analysis.evidence import EffectEstimate, bootstrap, calibrated, listed, scored
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
    "divergence": "divergence from the pretraining text",
}
"""Fields of a set's description, and their names."""

MAIN = "min_k_plus_plus"
SETTING = ["model", "method", "target"]
LEAST_SOURCES = 5

PLAIN = MetricKind(lower_is_better=False, is_perplexity=False, is_share=False)
"""The kind of numbers without a unit."""


class Sources(NamedTuple):
    """Scores and harm of each source, averaged over seeds."""

    names: list[str]
    scores: dict[str, Values]
    """By score, `[sources]`."""

    harm: Values
    """`[sources, settings]`: the scaled metric minus each setting's mean; higher is worse."""

    kind: MetricKind


class Prediction(NamedTuple):
    """How well a score predicts the harm by pruning."""

    rank: EffectEstimate
    """Spearman's correlation with the harm, averaged over settings; interval over sources."""

    explained: EffectEstimate
    """Share of the differences in harm explained in sources left out of the fit, in percent; below
    0 the score is worse than no score."""

    effect: EffectEstimate
    """Harm per standard deviation of the score, by the mixed model."""

    regret: float
    """Loss of the source chosen by leave-one-out predictions against the best one, on average over
    settings, in the metric's unit."""


def answer(results: Results) -> Answer:
    """Return every score's rank correlation, out-of-source error and effect."""
    sources = gathered(results.table)
    predictions = {name: predict(sources, name) for name in sources.scores}
    main = predictions[MAIN]
    ranked = sorted(predictions, key=lambda name: -predictions[name].explained.effect)
    good = [name for name in ranked if predictions[name].explained.low > 0]
    direction = "lower" if main.rank.effect < 0 else "higher"
    if main.rank.low > 0 or main.rank.high < 0:
        what = (
            f"Sources of higher Min-K%++ go with {direction} harm by pruning (rank correlation "
            f"{_interval(main.rank)})."
        )
    else:
        what = (
            "It is not shown that Min-K%++ ranks sources as pruning does (rank correlation "
            f"{_interval(main.rank)})."
        )
    explained = [
        effect_text(each.effect, each.low, each.high, "%")
        for each in (predictions[name].explained for name in ranked)
    ]
    named = [f"{SCORES[name]} {text}" for name, text in zip(ranked, explained, strict=True)]
    size = (
        "Of the differences between sources that the fit has not seen, the scores explain: "
        f"{'; '.join(named)}. One standard deviation of Min-K%++ goes with "
        + effect_text(*main.effect[:3], sources.kind.unit)
        + " harm (mixed model, with sources, pruners and sparsities as random effects)."
    )
    if good:
        best = good[0]
        certainty = (
            f"Better than no score (intervals not corrected for {len(ranked)} scores): "
            f"{listed([SCORES[name] for name in good])}. Choosing the source by {SCORES[best]} "
            f"loses {predictions[best].regret:.1f} {sources.kind.unit} against the best one, on "
            f"average over settings; a random choice {_random_regret(sources):.1f}."
        )
    else:
        certainty = "No score is shown to predict unseen sources better than their mean does."
    caveat = (
        f"All estimates rest on {len(sources.names)} sources, the intervals on resampling them. "
        "Other sources can change order and size, real corpora above all, since they differ less."
    )
    if "divergence" in sources.scores:
        caveat += " The divergence needs the pretraining text, which most models keep secret."
    figure = interval_figure(
        "How well cheap scores of a calibration set predict its pruning",
        {
            "rank correlation with harm": {SCORES[n]: p.rank for n, p in predictions.items()},
            "explained in unseen sources (share)": {
                SCORES[name]: prediction.explained._replace(
                    effect=prediction.explained.effect / 100,
                    low=prediction.explained.low / 100,
                    high=prediction.explained.high / 100,
                )
                for name, prediction in predictions.items()
            },
        },
        "1 is perfect",
        "Bars: 95 % intervals over sources. Filled: zero lies outside; hollow: inside.",
        directed=False,
    )
    for axes in figure.axes:
        axes.set_xlim(-1.1, 1.1)
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
    harm = rows.pivot_table(index="source", columns=SETTING, values="score").dropna()
    if len(harm) < LEAST_SOURCES:
        raise TableError(f"{len(harm)} described sources: {LEAST_SOURCES} are needed")
    reports = pd.DataFrame([json.loads(report) for report in rows["calibration_report"]])
    reports = reports.assign(source=rows["source"].to_numpy())
    means = reports.groupby("source").mean(numeric_only=True).loc[harm.index]
    sign = 1 if kind.lower_is_better else -1
    values = sign * harm.to_numpy(dtype=np.float64)
    return Sources(
        names=[str(name) for name in harm.index],
        scores={name: means[name].to_numpy(dtype=float) for name in SCORES if name in means},
        harm=values - values.mean(axis=0),
        kind=kind,
    )


def predict(sources: Sources, name: str) -> Prediction:
    """Return how well one score predicts the harm."""
    x, harm = sources.scores[name], sources.harm
    count = len(x)
    errors, baseline, predicted = left_out(x, harm)

    def rank(chosen: Any) -> float:
        return rank_correlation(x[chosen], harm[chosen])

    def explained(chosen: Any) -> float:
        return 100 * (1 - float(errors[chosen].sum() / baseline[chosen].sum()))

    everyone = np.arange(count)
    regret = harm[predicted.argmin(axis=0), range(harm.shape[1])] - harm.min(axis=0)
    return Prediction(
        rank=_resampled(rank, everyone),
        explained=_resampled(explained, everyone),
        effect=mixed_effect(sources, name),
        regret=sources.kind.effect(float(regret.mean())),
    )


def rank_correlation(x: Values, harm: Values) -> float:
    """Return Spearman's correlation of a score with harm, averaged over settings.

    Args:
        x: the score, `[sources]`.
        harm: `[sources, settings]`.
    """
    ranks, harm_ranks = stats.rankdata(x), stats.rankdata(harm, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may be constant: NaN
        each = [np.corrcoef(ranks, column)[0, 1] for column in harm_ranks.T]
    return float(np.mean(each))


def left_out(x: Values, harm: Values) -> tuple[Values, Values, Values]:
    """Predict each source by a line through the others, and by their mean alone.

    Each setting is divided by its spread, so that settings have equal weight.

    Args:
        x: the score, `[sources]`.
        harm: `[sources, settings]`.

    Returns:
        Squared errors of the line and of the mean, each `[sources]`, summed over settings; and the
        line's predictions, `[sources, settings]`.
    """
    spread = harm.std(axis=0)
    scaled = harm / np.where(spread > 0, spread, 1.0)
    predicted = np.empty_like(scaled)
    means = np.empty_like(scaled)
    for place in range(len(x)):
        others = np.delete(np.arange(len(x)), place)
        centred = x[others] - x[others].mean()
        means[place] = scaled[others].mean(axis=0)
        slopes = centred @ (scaled[others] - means[place]) / max(centred @ centred, 1e-300)
        predicted[place] = means[place] + slopes * (x[place] - x[others].mean())
    errors = ((scaled - predicted) ** 2).sum(axis=1)
    return errors, ((scaled - means) ** 2).sum(axis=1), predicted


def mixed_effect(sources: Sources, name: str) -> EffectEstimate:
    """Return the harm per standard deviation of the score, by a mixed model.

    The slope is fixed; the level of each source and the slope of each setting are random. NaN if
    the fit does not converge.
    """
    x = sources.scores[name]
    nothing = EffectEstimate(np.nan, np.nan, np.nan, np.nan, len(x), sources.kind)
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
    p = 2 * float(stats.t.sf(abs(middle) / error, count - 2))
    effect = sources.kind.effect
    signed = 1 if sources.kind.lower_is_better else -1
    low, high = sorted((effect(signed * (middle - half)), effect(signed * (middle + half))))
    return EffectEstimate(effect(signed * middle), low, high, p, count, sources.kind)


def _resampled(statistic: Any, everyone: Any) -> EffectEstimate:
    low, high = bootstrap(len(everyone), statistic, draws=1000)
    p = 0.0 if low > 0 or high < 0 else 1.0  # says only whether the interval holds 0
    return EffectEstimate(statistic(everyone), low, high, p, len(everyone), PLAIN)


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
