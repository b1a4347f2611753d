"""Declared contrasts: effects with simultaneous intervals over models, and verdicts.

What models share (windows or questions, and draws of calibration data where seeds are crossed)
adds its part to the intervals. Those of one family hold together (Bonferroni, which needs no
assumption on how the contrasts depend on each other).

A cell that failed, or gave a number that is not finite, counts against its side, which then can be
called neither better nor equivalent. While cells have not run, no verdict is given.
"""

import math
from collections import Counter
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from analysis.design import RecordedContrast, RecordedDesign
from analysis.metrics import (
    MetricKind,
    effect_text,
    interval_text,
    level_text,
    metric_named,
    p_text,
)
from analysis.replicates import Arrangement, Numbers, Replicates
from analysis.statistics import CONFIDENCE

Verdict = Literal["better", "worse", "equivalent", "not shown", "not usable"]


class JudgedEffect(NamedTuple):
    """An effect in the metric's unit, with its interval and what follows from it."""

    effect: float
    low: float
    """Simultaneous 95 % interval within the family; NaN where the units do not determine it."""
    high: float
    p: float
    """Corrected for the family (Bonferroni), so that it agrees with the interval."""
    verdict: Verdict
    """If nothing is lost and the levels are of use."""


class Judgement(NamedTuple):
    """A contrast's effect, and what may be said of it."""

    estimate: JudgedEffect
    verdict: Verdict
    levels: tuple[float, float, float]
    """Of the first side, the second and the dense model, in the metric's own unit."""
    models: int
    draws: int
    """Draws of calibration data of a model, at most."""
    family: int
    """Number of contrasts whose intervals hold together."""
    kind: MetricKind
    remarks: tuple[str, ...]
    """What limits the verdict or the interval."""

    @property
    def text(self) -> str:
        """`+3.8 % (95 % interval +1.2 to +6.4; p = 0.004; 8 models; 5.41 against 5.21, dense 3.95):
        worse`."""
        effect, low, high, p, _ = self.estimate
        details = ["no interval"]
        if not math.isnan(low):
            interval = interval_text(low, high, self.kind.unit)
            equals = "p" if p_text(p).startswith("<") else "p ="
            details = [f"95 % interval {interval}", f"{equals} {p_text(p)}"]
        first, second, dense = (level_text(level, self.kind.unit) for level in self.levels)
        levels = f"{first} against {second}"
        details += [self.reach, levels if dense == "nan" else f"{levels}, dense {dense}"]
        shown = effect_text(effect, math.nan, math.nan, self.kind.unit)
        return f"{shown} ({'; '.join([*details, *self.remarks])}): {self.verdict}"

    @property
    def reach(self) -> str:
        """What the interval is over: `8 models`, or `4 draws of this one model`."""
        if self.models > 1:
            return f"{self.models} models"
        return f"{self.draws} draw{'' if self.draws == 1 else 's'} of this one model"


def judge(
    table: pd.DataFrame, design: RecordedDesign, requests: pd.DataFrame | None = None
) -> dict[str, Judgement]:
    """Return the verdict on each declared contrast.

    Args:
        table: the grid's results, as `load_results` returns them.
        design: what the grid declares.
        requests: rows of `load_requests` from the same store. Without them the intervals leave out
            the noise of the evaluation texts, and a remark says so.

    Raises:
        TableError: if the table lacks a contrast's cells or metric.
    """
    families = Counter(contrast.family for contrast in design.contrasts.values())
    return {
        name: _judged(table, contrast, design, requests, families[contrast.family])
        for name, contrast in design.contrasts.items()
    }


def judge_effect(
    differences: Replicates, kind: MetricKind, smallest: float, family: int = 1
) -> JudgedEffect:
    """Return the effect of differences on the metric's scale.

    It is equivalent if the interval lies within the smallest effect of interest: two one-sided
    tests at 2.5 %, so that the verdict agrees with the interval on the page. A difference may still
    be shown, of a size of no interest.

    Source: Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15:657-680.

    Args:
        differences: of the first side from the second.
        kind: the metric's properties.
        smallest: smallest effect of interest, in the metric's unit.
        family: number of contrasts whose intervals hold together.
    """
    units = differences.units
    mean = float(units.mean()) if len(units) else math.nan
    level = (1 - CONFIDENCE) / family
    half = math.nan
    if len(units) > 1:
        uncertainty = differences.uncertainty()
        half = uncertainty.half_width(1 - level) or math.nan
    if math.isnan(half):  # equal differences do not show that there is no spread
        return JudgedEffect(kind.effect(mean), math.nan, math.nan, math.nan, "not shown")
    verdict: Verdict = "not shown"
    if abs(mean) + half < kind.difference(smallest):
        verdict = "equivalent"
    elif abs(mean) > half:
        verdict = "better" if (mean < 0) == kind.lower_is_better else "worse"
    p = min(1.0, family * uncertainty.p(mean))
    return JudgedEffect(
        kind.effect(mean), kind.effect(mean - half), kind.effect(mean + half), p, verdict
    )


def _judged(
    table: pd.DataFrame,
    contrast: RecordedContrast,
    design: RecordedDesign,
    requests: pd.DataFrame | None,
    family: int,
) -> Judgement:
    kind = metric_named(contrast.metric)
    numbers = Numbers(table, contrast.metric, contrast.tasks, requests, contrast.name)
    first, second = ([str(pair[side]) for pair in contrast.pairs] for side in (0, 1))
    cells = [numbers.cells(side) for side in (first, second)]
    seeds = cells[0]["seed"].reset_index(drop=True)
    where = cells[0].assign(seed=seeds.fillna(cells[1]["seed"].reset_index(drop=True)).to_numpy())
    arrangement = Arrangement(where, [setting for _, _, setting in contrast.pairs])
    sides = [numbers.values(side) for side in (first, second)]
    by_window = [numbers.windows(side) for side in (first, second)]
    windows = [own - other for own, other in zip(*by_window, strict=False)]
    differences = arrangement.replicates(sides[0] - sides[1], windows)
    known = np.where(np.isnan(sides[0] - sides[1]), np.nan, 0.0)
    levels = [float(arrangement.replicates(side + known, []).units.mean()) for side in sides]
    beyond = [numbers.unusable(level, arrangement.models, design.floor) for level in levels]
    found = judge_effect(differences, kind, contrast.smallest, family)
    failed = [int((side["status"] == "failed").sum()) for side in cells]
    missing = sum(int((side["status"] == "missing").sum()) for side in cells)
    verdict = found.verdict
    against = {"better": failed[0], "worse": failed[1], "equivalent": sum(failed)}
    if missing or against.get(verdict):
        verdict = "not shown"
    elif all(beyond):
        verdict = "not usable"
    every = [*levels, numbers.dense(arrangement.models)]
    return Judgement(
        estimate=found,
        verdict=verdict,
        levels=(kind.unscaled(every[0]), kind.unscaled(every[1]), kind.unscaled(every[2])),
        models=len(differences.values),
        draws=differences.draws,
        family=family,
        kind=kind,
        remarks=tuple(_remarks(differences, arrangement, failed, missing, beyond)),
    )


def _remarks(
    differences: Replicates,
    arrangement: Arrangement,
    failed: list[int],
    missing: int,
    beyond: list[bool],
) -> list[str]:
    remarks = []
    left_out = len(arrangement.models) - len(differences.values)
    if left_out:
        remarks.append(f"{left_out} of {len(arrangement.models)} models left out")
    if missing:
        remarks.append(f"cells not run yet: {missing}")
    for side, count, level in zip(("first", "second"), failed, beyond, strict=True):
        if count:
            remarks.append(f"failed cells: {count} of the {side} side")
        if level:
            remarks.append(f"the {side} side is beyond the floor of use")
    if not differences.windows:
        remarks.append("without the noise of the evaluation texts")
    if arrangement.crossed and differences.draws == 1:
        remarks.append("with one draw of data for all models")
    return remarks
