"""What a study's numbers say, and how surely: paired effects over seeds, trends, resampling.

The seed draws the calibration data, so it is the unit: settings that share a seed (pruners,
sparsities, models) are averaged within it before anything is said of spread. Student's t over a
handful of seeds holds its 95 %, which a bootstrap over so few does not; resampling serves what has
no such interval, such as a rank correlation or the place of an optimum.
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
    "prefix_tokens",
    "drop_fraction",
    "num_samples",
    "temperature",
    "task",
    "metric",
]
"""Columns that make a setting."""

SOURCE = ["calibration", "prefix_tokens", "drop_fraction", "num_samples", "temperature"]
"""Those of them in which two sources of calibration data may differ."""

DRAWS = 2000
"""Resamples of a bootstrap."""

LEVEL = 0.05
"""An effect is shown where its p, corrected if there are several, is below."""


class EffectEstimate(NamedTuple):
    """An effect with its 95 % interval; NaN where the seeds tell none."""

    effect: float
    """In `unit`."""
    low: float
    high: float
    p: float
    pairs: int
    """Seeds behind it."""
    kind: MetricKind

    @property
    def shown(self) -> bool:
        """Whether its direction is more than chance explains."""
        return self.p < LEVEL

    @property
    def helps(self) -> bool:
        """Whether the numbers got better, shown or not."""
        return (self.effect < 0) == self.kind.lower_is_better

    @property
    def text(self) -> str:
        """`-3.2 % (95 % interval -5.0 to -1.4; p = 0.012; 5 seeds)`."""
        told = effect_text(self.effect, np.nan, np.nan, self.kind.unit)
        if np.isnan(self.p):
            return f"{told} (no interval; {_seeds(self.pairs)})"
        interval = effect_text(self.effect, self.low, self.high, "").partition("(")[2][:-1]
        p = p_text(self.p)
        sign = "" if p.startswith("<") else "= "
        return f"{told} (95 % interval {interval}; p {sign}{p}; {_seeds(self.pairs)})"


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def scored(table: pd.DataFrame, task: str | None = None, metric: str | None = None) -> pd.DataFrame:
    """The rows of one number, with `score`: it on the scale on which effects are taken.

    Args:
        table: as `load_results` gives it.
        task: the main metric's if not given.
        metric: likewise.

    Raises:
        TableError: if no pruned model has such a number yet.
    """
    rows = measured(table)
    if task is None or metric is None:
        there = headline_metrics(rows)
        if not there:
            raise TableError("no cell has a result yet")
        task, metric = there[0]
    rows = rows[(rows["task"] == task) & (rows["metric"] == metric)]
    score = metric_named(metric).scaled(rows["value"].to_numpy(dtype=np.float64))
    rows = rows.assign(score=score)
    finite: pd.DataFrame = rows[np.isfinite(rows["score"])]
    return finite


def calibrated(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of cells that take data."""
    return rows[rows["calibration"] != NO_CALIBRATION]


def paired(first: pd.DataFrame, second: pd.DataFrame, across: Sequence[str]) -> EffectEstimate:
    """How `first` differs from `second`, rows with scores, in settings that are alike but for the
    columns in `across`.

    Differences are averaged within each seed; seeds that lack a setting which others have are left
    out, since their averages would not compare.
    """
    kinds = set(first["metric"]) | set(second["metric"])
    kind = metric_named(min(kinds)) if kinds else metric_named("perplexity")
    together = [axis for axis in AXES if axis not in across and axis in first]
    pairs = first[[*together, "seed", "score"]].merge(
        second[[*together, "seed", "score"]], on=[*together, "seed"], suffixes=("", "_second")
    )
    return over_seeds(pairs.assign(score=pairs["score"] - pairs["score_second"]), kind)


def over_seeds(differences: pd.DataFrame, kind: MetricKind) -> EffectEstimate:
    """The mean of `score`, which holds differences, over seeds."""
    by_seed = differences.groupby("seed")["score"].agg(["mean", "size"])
    whole = by_seed.loc[by_seed["size"] == by_seed["size"].max(), "mean"]
    if whole.empty:
        return EffectEstimate(np.nan, np.nan, np.nan, np.nan, 0, kind)
    interval = t_interval(whole.to_numpy(dtype=np.float64))
    low, high = kind.effect(interval.low), kind.effect(interval.high)
    return EffectEstimate(kind.effect(interval.mean), low, high, interval.p, len(whole), kind)


def slope(rows: pd.DataFrame, x: str, across: Sequence[str], per: float = 1.0) -> EffectEstimate:
    """How the score changes when column `x` rises by `per`: least squares within each seed and
    setting, averaged over settings, with t over seeds."""
    kind = metric_named(str(rows["metric"].iloc[0]))
    together = [axis for axis in AXES if axis not in (*across, x) and axis in rows]
    lines = []
    for key, group in rows.groupby([*together, "seed"], dropna=False):
        places = group[x].to_numpy(dtype=np.float64)
        if np.ptp(places) > 0:
            line = np.polyfit(places, group["score"].to_numpy(dtype=np.float64), 1)
            lines.append({"seed": key[-1], "score": per * float(line[0])})
    return over_seeds(pd.DataFrame(lines, columns=["seed", "score"]), kind)


def corrected(estimates: dict[Any, EffectEstimate]) -> dict[Any, EffectEstimate]:
    """The estimates with p by Holm over all of them; intervals stay those of one."""
    p = holm([estimate.p for estimate in estimates.values()])
    changed = zip(estimates.items(), p, strict=True)
    return {name: estimate._replace(p=float(own)) for (name, estimate), own in changed}


def bootstrap(
    units: int, statistic: Callable[[Any], float], draws: int = DRAWS
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of resampled units; NaN where it is mostly NaN.

    Args:
        units: how many there are.
        statistic: of an array of their numbers, drawn with replacement.
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
    """The estimates as a table: what, effect, low, high, p, pairs, unit."""
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


def of_calibration(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of a calibration that a study speaks of.

    Raises:
        TableError: if there is none.
    """
    chosen = rows[rows["calibration"] == name]
    if chosen.empty:
        there = ", ".join(sorted(set(calibrated(rows)["calibration"]))) or "none"
        raise TableError(f"no result of a calibration named {name} (there: {there})")
    return chosen


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def trailing_number(name: str) -> float:
    """25 of `unseen-25`.

    Raises:
        TableError: if the name ends with no number.
    """
    digits = name.rpartition("-")[2]
    if not digits.replace(".", "", 1).isdigit():
        raise TableError(f"calibration {name}: its name must end with a number, like share-25")
    return float(digits)
