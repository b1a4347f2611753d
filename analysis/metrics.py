"""What a metric's numbers mean: which way is better, how to compare and how to print them."""

import math
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

Number = TypeVar("Number", float, Values)


class MetricKind(NamedTuple):
    """Properties of a metric."""

    lower_is_better: bool
    is_perplexity: bool
    """Compared by ratio, on the log scale."""
    is_share: bool
    """A share of questions or tokens between 0 and 1, printed in percent."""

    @property
    def unit(self) -> str:
        """Return a difference's unit: `%` of the reference, percentage `points`, or none."""
        return "%" if self.is_perplexity else "points" if self.is_share else ""

    def scaled(self, values: Values) -> Values:
        """Return values on the scale on which they are compared."""
        return np.log(values) if self.is_perplexity else values

    def unscaled(self, score: Number) -> Number:
        """Return the value that `scaled` made a score of."""
        value: Number = np.exp(score) if self.is_perplexity else score
        return value

    def effect(self, difference: Number) -> Number:
        """Return a difference of scaled values in `unit`."""
        if self.is_perplexity:
            with np.errstate(over="ignore"):
                ratio: Number = 100 * np.expm1(difference)
            return ratio
        return 100 * difference if self.is_share else difference

    def difference(self, effect: float) -> float:
        """Return the difference of scaled values that `effect` shows in `unit`."""
        if self.is_perplexity:
            return math.log1p(effect / 100)
        return effect / 100 if self.is_share else effect


def metric_named(name: str) -> MetricKind:
    """Return the properties of a metric; lm-eval's filter after a comma is ignored."""
    base = name.partition(",")[0]
    is_perplexity = base.endswith("perplexity")
    return MetricKind(
        lower_is_better=is_perplexity
        or base in {"bits_per_byte", "brier_score", "kl", "flips", "top_token_changes"},
        is_perplexity=is_perplexity,
        is_share=base.startswith("acc")
        or base in {"exact_match", "f1", "flips", "top_token_changes", "worst_retained"},
    )


def heading(task: str, metric: str, limit: int | None = None) -> str:
    """Return a task's metric with its unit, its better direction and its limit of questions."""
    limited = "" if limit is None else f", first {limit} questions only"
    better = "lower" if metric_named(metric).lower_is_better else "higher"
    return f"{short_heading(task, metric)}, {better} is better{limited}"


def short_heading(task: str, metric: str) -> str:
    """Return a task's metric with its unit."""
    return f"{task}: {metric}" + (" (%)" if metric_named(metric).is_share else "")


def value_text(value: float, metric: str) -> str:
    """Return a finite value as text, a share in percent without the sign."""
    return level_text(value, metric_named(metric).unit)


def level_text(value: float, unit: str) -> str:
    """Return a finite value as text, by the unit of its metric's differences."""
    if unit == "points":
        return f"{100 * value:.1f}"
    return _digits(value, "", small=2 if unit else 3)


def spread_text(mean: float, sd: float, metric: str) -> str:
    """Return `mean ± sd`, or the mean alone if the standard deviation is unknown."""
    text = value_text(mean, metric)
    return f"{text} ± {value_text(sd, metric)}" if math.isfinite(sd) else text


def effect_text(effect: float, low: float, high: float, unit: str) -> str:
    """Return `−3.2 % (−5.0 to −1.4)`, without brackets if there is no interval.

    An effect without a unit, such as bits per byte, has three decimals.
    """
    if not math.isfinite(effect):
        return "n/a"
    text = f"{_signed(effect, unit)} {unit}".strip()
    interval = interval_text(low, high, unit)
    return f"{text} ({interval})" if interval else text


def interval_text(low: float, high: float, unit: str) -> str:
    """Return `−5.0 to −1.4`, nothing if there is no interval."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"{_signed(low, unit)} to {_signed(high, unit)}"


def duration_text(seconds: float) -> str:
    """Return seconds in words: `45 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def p_text(p: float) -> str:
    """Return a p-value with three decimals."""
    return "n/a" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _signed(value: float, unit: str) -> str:
    small = 1 if unit else 3
    return "+∞" if value == math.inf else _digits(value, "+", small).replace("-", "−")


def _digits(value: float, sign: str, small: int) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value:{sign}.1e}"
    decimals = small if size < 100 else 1 if size < 1000 and small > 1 else 0
    return f"{value:{sign},.{decimals}f}"
