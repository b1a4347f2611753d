"""What studies share: the main metric's rows, an effect to draw, and resampling."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.labels import NO_CALIBRATION
from analysis.load import TableError
from analysis.metrics import MetricKind, Values, metric_named
from analysis.statistics import measured
from analysis.tables import headline_metrics


class EffectEstimate(NamedTuple):
    """An effect with its 95 % interval; NaN where the units do not determine it."""

    effect: float
    """In the metric's unit."""
    low: float
    high: float
    shown: bool
    """Whether something may be claimed of it: a figure fills it."""
    kind: MetricKind

    @property
    def helps(self) -> bool:
        """Whether the metric improved, shown or not."""
        return (self.effect < 0) == self.kind.lower_is_better


def scored(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the main metric with `score`, the value on the scale of effects.

    Args:
        table: as `load_results` returns it.

    Raises:
        TableError: if no cell has a result yet.
    """
    rows = measured(table)
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


def bootstrap(units: int, statistic: Callable[[Any], float], draws: int) -> tuple[float, float]:
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


def listed(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
