"""Intervals of a mean over models that share windows, questions or calibration draws.

Models, windows and draws are random and crossed: every model is measured on the same windows. A
difference is `mean + model + window + rest`, so the variance of its mean has a part that more
models do not lower. The parts are estimated by the method of moments, as in a two-way analysis of
variance (Searle, Casella and McCulloch 1992, Variance Components, chapter 4). Each part enters the
interval with the t of its own degrees of freedom (Cochran 1964, Biometrics 20:191-195): with few
models this covers at least what it states, where one t with Satterthwaite's degrees covers less.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from analysis.metrics import Values


class Part(NamedTuple):
    """A part of the variance of a mean, and the degrees of freedom of its estimate."""

    variance: float
    freedom: float


class Shared(NamedTuple):
    """What units share, seen in the means of the columns of a two-way table."""

    columns: Part
    """Variance of the grand mean over columns alone."""

    excess: Part
    """What of it the units' own spread does not hold yet; 0 if they share nothing."""


class Uncertainty(NamedTuple):
    """How uncertain a mean is."""

    parts: tuple[Part, ...]
    """The units' own first."""

    least: tuple[Part, ...] = ()
    """Variances that each alone is a lower limit of the whole."""

    def half_width(self, confidence: float) -> float:
        """Return half of the two-sided interval's length."""
        tail = (1 - confidence) / 2
        whole = sum(_squared(part, tail) for part in self.parts)
        return float(np.sqrt(max([whole, *(_squared(part, tail) for part in self.least)])))

    def p(self, mean: float) -> float:
        """Return the two-sided p-value for a true mean of 0."""
        if not abs(mean) < self.half_width(1 - 1e-12):
            return 0.0

        def beyond(confidence: float) -> float:
            return self.half_width(confidence) - abs(mean)

        return 1 - float(optimize.brentq(beyond, 0.0, 1 - 1e-12, xtol=1e-13))


def shared_part(strata: Sequence[Values]) -> Shared:
    """Return what units share because they share columns.

    Args:
        strata: tables `[units, columns]` without NaN, such as one per text, of two or more units
            and columns. The mean of interest is the plain mean of the strata's means.
    """
    columns, rest = [], 0.0
    for table in strata:
        units, count = table.shape
        row, column = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
        left = np.square(table - row - column + table.mean()).sum()
        scale = count * len(strata) ** 2
        columns.append(Part(float(column.var(ddof=1)) / scale, count - 1))
        rest += float(left) / ((units - 1) * (count - 1)) / units / scale
    variance = sum(part.variance for part in columns)
    spread = sum(part.variance**2 / part.freedom for part in columns)
    freedom = variance**2 / spread if spread > 0 else sum(part.freedom for part in columns)
    return Shared(Part(variance, freedom), Part(max(variance - rest, 0.0), freedom))


def uncertainty_of_mean(units: Values, shared: Sequence[Shared] = ()) -> Uncertainty:
    """Return how uncertain the units' mean is if units, and all that they share, are random.

    Args:
        units: one value per unit, two or more.
        shared: each factor that crosses the units.
    """
    own = Part(float(units.var(ddof=1)) / len(units), len(units) - 1)
    return Uncertainty(
        (own, *(factor.excess for factor in shared)), tuple(factor.columns for factor in shared)
    )


def _squared(part: Part, tail: float) -> float:
    return float(special.stdtrit(part.freedom, tail)) ** 2 * part.variance
