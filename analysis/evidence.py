"""What studies share: the main metric's rows, and an effect to draw."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.labels import NO_CALIBRATION
from analysis.load import TableError
from analysis.metrics import MetricKind, metric_named
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


def listed(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
