"""Comparisons with the best: which candidates the data cannot tell from the best one.

Multiple comparisons with the best (Hsu 1984, Annals of Statistics 12:1136-1144), in the form with a
set of possible best ones (Edwards and Hsu 1983, Journal of the American Statistical Association
78:965-971). Each difference has its own variance over models, since candidates share them; the
comparisons of a candidate with all others are held together by Bonferroni.
"""

import math
from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import pandas as pd

from analysis.design import RecordedChoice, RecordedDesign
from analysis.load import TableError
from analysis.metrics import MetricKind, metric_named
from analysis.replicates import Arrangement, Numbers, Replicates
from analysis.statistics import CONFIDENCE


class ComparedCandidate(NamedTuple):
    """One of several candidates, compared with the best of the others."""

    name: str
    level: float
    """Mean in the metric's own unit."""
    loss: float
    """Against the best of the others, in the metric's unit; negative for the best one."""
    low: float
    """Simultaneous 95 % interval of the loss, which always holds 0: an upper end of 0 says that it
    is the best, a lower end of 0 that it is not. NaN with fewer than two units."""
    high: float
    possibly_best: bool
    """Whether it is in the set that holds the best with 95 % confidence."""


class Ranking(NamedTuple):
    """Candidates, the lowest loss first."""

    candidates: tuple[ComparedCandidate, ...]
    models: int
    left_out: tuple[str, ...]
    """Candidates with cells that failed or have not run: they cannot be called the best."""

    @property
    def possibly_best(self) -> list[str]:
        """Names of the set that holds the best candidate with 95 % confidence."""
        return [each.name for each in self.candidates if each.possibly_best]


def rank_choices(
    table: pd.DataFrame, design: RecordedDesign, requests: pd.DataFrame | None = None
) -> dict[str, Ranking]:
    """Return the candidates of each declared choice; arguments and errors as for `judge`."""
    return {name: _ranked(table, choice, requests) for name, choice in design.choices.items()}


def compare_with_best(
    scores: Mapping[str, Replicates], kind: MetricKind
) -> tuple[ComparedCandidate, ...]:
    """Return the candidates with their losses against the best of the others.

    With 95 % confidence all intervals hold, and the set has the best candidate.

    Args:
        scores: two or more candidates on the metric's scale, on the same models and draws.
        kind: the metric's properties.
    """
    sign = 1 if kind.lower_is_better else -1
    units = {name: sign * each.units for name, each in scores.items()}
    tail = (1 - CONFIDENCE) / (len(scores) - 1)
    half: dict[tuple[str, str], float] = {}
    for one, other in combinations(scores, 2):
        width = math.nan
        if len(units[one]) > 1:
            uncertainty = scores[one].minus(scores[other]).uncertainty()
            width = uncertainty.half_width(1 - 2 * tail)
        half[one, other] = half[other, one] = width
    loss = {pair: float((units[pair[0]] - units[pair[1]]).mean()) for pair in half}
    others = {name: [other for other in scores if other != name] for name in scores}
    known = not any(math.isnan(each) for each in half.values())
    low = {
        name: min(0.0, max(loss[name, other] - half[name, other] for other in others[name]))
        for name in scores
    }
    best = [name for name in scores if low[name] < 0]
    high = {
        name: max([0.0, *(loss[name, o] + half[name, o] for o in best if o != name)])
        for name in scores
    }
    found = [
        ComparedCandidate(
            name=name,
            level=kind.unscaled(sign * float(units[name].mean())),
            loss=sign * kind.effect(sign * max(loss[name, other] for other in others[name])),
            low=sign * kind.effect(sign * low[name]) if known else math.nan,
            high=sign * kind.effect(sign * high[name]) if known else math.nan,
            possibly_best=not known or name in best,
        )
        for name in scores
    ]
    return tuple(sorted(found, key=lambda each: each.loss))


def _ranked(table: pd.DataFrame, choice: RecordedChoice, requests: pd.DataFrame | None) -> Ranking:
    numbers = Numbers(table, choice.metric, choice.tasks, requests, choice.name)
    settings = [setting for setting, _ in choice.blocks]
    columns = dict(
        zip(choice.candidates, zip(*(b for _, b in choice.blocks), strict=True), strict=True)
    )
    cells = {name: numbers.cells(own) for name, own in columns.items()}
    lost = [name for name, own in cells.items() if (own["status"] != "ok").any()]
    whole = [name for name in choice.candidates if name not in lost]
    if len(whole) < 2:
        raise TableError(f"{choice.name}: {len(whole)} candidates have all results, 2 are needed")
    arrangement = Arrangement(cells[whole[0]], settings)
    scores = {
        name: arrangement.replicates(numbers.values(columns[name]), numbers.windows(columns[name]))
        for name in whole
    }
    return Ranking(
        compare_with_best(scores, metric_named(choice.metric)), len(arrangement.models), tuple(lost)
    )
