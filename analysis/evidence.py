"""Estimates for studies: paired effects over seeds, trends, and resampling.

The seed draws the calibration data, so it is the unit: settings that share a seed (pruners,
sparsities, models) are averaged before any spread is computed. Student's t over a handful of seeds
keeps its 95 % coverage, a bootstrap over so few does not. Resampling serves statistics without a t
interval, such as a rank correlation or the position of an optimum.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.labels import NO_CALIBRATION
from analysis.load import TableError
from analysis.metrics import MetricKind, Values, effect_text, metric_named, p_text
from analysis.statistics import holm, measured, t_interval
from analysis.tables import headline_metrics

SOURCE = [
    "calibration",
    "prefix_tokens",
    "drop_fraction",
    "drop_by",
    "within",
    "num_samples",
    "temperature",
]
"""Columns in which two sources of calibration data may differ."""

AXES = [
    "model",
    "calibration",
    "pruner",
    "pruner_options",
    "allocation",
    "allocation_options",
    "sparsity",
    "pattern",
    "nsamples",
    "seqlen",
    *SOURCE[1:],
    "task",
    "metric",
]
"""Columns that identify a setting."""

_DRAWS = 2000
"""Resamples of a bootstrap."""

LEVEL = 0.05
"""An effect is shown if its p, corrected where there are several, is below this."""


class EffectEstimate(NamedTuple):
    """An effect with its 95 % interval; NaN where the seeds do not determine it."""

    effect: float
    """In the metric's unit."""
    low: float
    high: float
    p: float
    pairs: int
    """Number of seeds."""
    kind: MetricKind

    @property
    def shown(self) -> bool:
        """Whether chance alone is an unlikely explanation."""
        return self.p < LEVEL

    @property
    def helps(self) -> bool:
        """Whether the metric improved, shown or not."""
        return (self.effect < 0) == self.kind.lower_is_better

    @property
    def text(self) -> str:
        """`−3.2 % (95 % interval −5.0 to −1.4; p = 0.012; 5 seeds)`."""
        effect = effect_text(self.effect, np.nan, np.nan, self.kind.unit)
        if np.isnan(self.p):
            return f"{effect} (no interval; {_seeds(self.pairs)})"
        interval = effect_text(self.effect, self.low, self.high, self.kind.unit).partition("(")[2][
            :-1
        ]
        p = p_text(self.p)
        sign = "" if p.startswith("<") else "= "
        return f"{effect} (95 % interval {interval}; p {sign}{p}; {_seeds(self.pairs)})"


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def scored(table: pd.DataFrame, task: str | None = None, metric: str | None = None) -> pd.DataFrame:
    """Return the rows of one metric with `score`, the value on the scale of effects.

    Args:
        table: as `load_results` returns it.
        task: default: the main metric's task.
        metric: default: the main metric.

    Raises:
        TableError: if no cell has a result yet.
    """
    rows = measured(table)
    if task is None or metric is None:
        main = headline_metrics(rows)
        if not main:
            raise TableError("no cell has a result yet")
        task, metric = main[0]
    rows = rows[(rows["task"] == task) & (rows["metric"] == metric)]
    score = metric_named(metric).scaled(rows["value"].to_numpy(dtype=np.float64))
    return rows.assign(score=score)


def calibrated(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of cells that use calibration data."""
    return rows[rows["calibration"] != NO_CALIBRATION]


def paired(first: pd.DataFrame, second: pd.DataFrame, across: Sequence[str]) -> EffectEstimate:
    """Return the mean difference of `first` from `second` in settings that agree in all columns
    but those in `across`.

    Differences are averaged within each seed. Seeds that lack a setting of the others are left out:
    their averages could not be compared.

    Args:
        first: rows with `score`.
        second: rows with `score`.
        across: columns in which the two sides differ.
    """
    kinds = set(first["metric"]) | set(second["metric"])
    kind = metric_named(min(kinds)) if kinds else metric_named("perplexity")
    together = [axis for axis in AXES if axis not in across]
    pairs = first[[*together, "seed", "score"]].merge(
        second[[*together, "seed", "score"]], on=[*together, "seed"], suffixes=("", "_second")
    )
    return over_seeds(pairs.assign(score=pairs["score"] - pairs["score_second"]), kind)


def over_seeds(differences: pd.DataFrame, kind: MetricKind) -> EffectEstimate:
    """Return the mean over seeds of `score`, which holds differences."""
    by_seed = differences.groupby("seed")["score"].agg(["mean", "size"])
    whole = by_seed.loc[by_seed["size"] == by_seed["size"].max(), "mean"]
    if whole.empty:
        return EffectEstimate(np.nan, np.nan, np.nan, np.nan, 0, kind)
    interval = t_interval(whole.to_numpy(dtype=np.float64))
    low, high = kind.effect(interval.low), kind.effect(interval.high)
    return EffectEstimate(kind.effect(interval.mean), low, high, interval.p, len(whole), kind)


def slope(rows: pd.DataFrame, x: str, across: Sequence[str], per: float = 1.0) -> EffectEstimate:
    """Return the change of the score when column `x` rises by `per`.

    A line is fitted by least squares within each seed and setting; slopes are averaged over
    settings, with Student's t over seeds.
    """
    kind = metric_named(str(rows["metric"].iloc[0]))
    together = [axis for axis in AXES if axis not in (*across, x)]
    lines = []
    for key, group in rows.groupby([*together, "seed"], dropna=False):
        places = group[x].to_numpy(dtype=np.float64)
        if np.ptp(places) > 0:
            line = np.polyfit(places, group["score"].to_numpy(dtype=np.float64), 1)
            lines.append({"seed": key[-1], "score": per * float(line[0])})
    return over_seeds(pd.DataFrame(lines, columns=["seed", "score"]), kind)


def corrected(estimates: dict[Any, EffectEstimate]) -> dict[Any, EffectEstimate]:
    """Return the estimates with Holm-corrected p; intervals stay uncorrected."""
    p = holm([estimate.p for estimate in estimates.values()])
    changed = zip(estimates.items(), p, strict=True)
    return {name: estimate._replace(p=float(own)) for (name, estimate), own in changed}


def bootstrap(
    units: int, statistic: Callable[[Any], float], draws: int = _DRAWS
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic of resampled units.

    It is NaN if more than half of the resamples give NaN.

    Args:
        units: number of units.
        statistic: function of an array of unit indices, drawn with replacement.
        draws: number of resamples.
    """
    generator = np.random.default_rng(0)
    values: Values = np.array(
        [statistic(generator.integers(units, size=units)) for _ in range(draws)]
    )
    values = values[np.isfinite(values)]
    if len(values) < draws / 2:
        return np.nan, np.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def estimate_rows(estimates: dict[Any, EffectEstimate]) -> pd.DataFrame:
    """Return the estimates as a table: what, effect, low, high, p, seeds, unit."""
    return pd.DataFrame(
        [
            {
                "what": str(name),
                "effect": each.effect,
                "low": each.low,
                "high": each.high,
                "p": each.p,
                "seeds": each.pairs,
                "unit": each.kind.unit,
            }
            for name, each in estimates.items()
        ]
    )


def listed(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
