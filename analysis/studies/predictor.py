"""Which cheap score of a calibration set foretells how well it prunes.

A source's scores and its numbers after pruning are averaged over seeds; the source is the unit,
since all that a score says of pruning it says by telling sources apart.
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
from analysis.study import Answer, Study

SCORES = {
    "min_k_plus_plus": "Min-K%++",
    "min_k": "Min-K%",
    "loss": "log perplexity",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "distinct_3": "distinct 3-grams",
    "divergence": "divergence from the pretraining text",
}
"""Fields of a set's description, and what they are called."""

MAIN = "min_k_plus_plus"
SETTING = ["model", "method", "target"]
LEAST_SOURCES = 5

PLAIN = MetricKind(lower_is_better=False, is_perplexity=False, is_share=False)
"""Of numbers without a unit."""


class Sources(NamedTuple):
    """What is known of each source, averaged over seeds."""

    names: list[str]
    scores: dict[str, Values]
    """Of each score one value a source."""

    harm: Values
    """[sources, settings]: the scaled metric, higher is worse, less each setting's mean."""

    kind: MetricKind


class Prediction(NamedTuple):
    """What a score foretells."""

    rank: EffectEstimate
    """Spearman's correlation with the harm, averaged over settings; interval over sources."""

    explained: EffectEstimate
    """Share of the differences in harm explained in sources that were left out of the fit, in
    points; below 0 the score is worse than no score."""

    effect: EffectEstimate
    """Harm by one standard deviation of the score, by the mixed model."""

    regret: float
    """What the source chosen by leave-one-out predictions loses against the best, on average over
    settings, in the metric's unit."""


def answer(table: pd.DataFrame) -> Answer:
    """Every score's rank correlation, out-of-source error and effect."""
    sources = gathered(table)
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
            "That Min-K%++ ranks sources as pruning does is not shown (rank correlation "
            f"{_interval(main.rank)})."
        )
    foretold = [
        effect_text(each.effect, each.low, each.high, "%")
        for each in (predictions[name].explained for name in ranked)
    ]
    named = [f"{SCORES[name]} {told}" for name, told in zip(ranked, foretold, strict=True)]
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
        certainty = "No score is shown to foretell unseen sources better than their mean does."
    caveat = (
        f"All rests on {len(sources.names)} sources, and the intervals on resampling them: other "
        "sources, above all real corpora that differ less, can change order and size."
    )
    if "divergence" in sources.scores:
        caveat += " The divergence needs the pretraining text, which most models keep secret."
    figure = interval_figure(
        "How well cheap scores of a calibration set foretell its pruning",
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
    """The sources that every setting has, with scores and harm.

    Raises:
        TableError: if they are not described, or fewer than five.
    """
    if "calibration_report" not in table:
        raise TableError("no calibration is described (describe: {} in the grid)")
    rows = calibrated(scored(table))
    rows = rows[rows["calibration_report"].notna()]
    kind = metric_named(str(rows["metric"].iloc[0])) if len(rows) else metric_named("perplexity")
    harm = rows.pivot_table(index="source", columns=SETTING, values="score").dropna()
    if len(harm) < LEAST_SOURCES:
        raise TableError(f"{len(harm)} described sources: it takes {LEAST_SOURCES}")
    reports = pd.DataFrame([json.loads(told) for told in rows["calibration_report"]])
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
    """What one score foretells."""
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
    """Spearman's correlation of a score with each setting's harm, averaged over settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # of a resample: NaN
        each = [stats.spearmanr(x, column).statistic for column in harm.T]
    return float(np.mean(each))


def left_out(x: Values, harm: Values) -> tuple[Values, Values, Values]:
    """Squared errors of each source by a line through the others, and by their mean alone.

    Settings weigh alike: each is divided by its spread.

    Returns:
        both [sources], summed over settings, and the predictions [sources, settings].
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
    """Harm by one standard deviation of the score: a fixed slope, and random effects of the source
    and, in level and slope, of the setting; NaN if the fit does not converge."""
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
        warnings.simplefilter("ignore")  # a variance of zero is at the boundary, and warns
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
    p = 0.0 if low > 0 or high < 0 else 1.0  # only whether the interval has zero
    return EffectEstimate(statistic(everyone), low, high, p, len(everyone), PLAIN)


def _interval(estimate: EffectEstimate) -> str:
    told = f"{estimate.effect:+.2f}, 95 % interval {estimate.low:+.2f} to {estimate.high:+.2f}"
    return told.replace("-", "−")


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
    "Which cheap score of a calibration set foretells how well it prunes?",
    "the rank correlation of Min-K%++ with the harm by pruning",
    answer,
)
