"""Simulated studies: intervals, verdicts, power and sets of best hold what is stated of them."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.coverage import CASES
from jobs.design import detectable

RUNS = 500
ERRORS = 2.6
"""A statement that is just true fails in one of a hundred tries with another random seed."""


@pytest.mark.parametrize("name", CASES)
def test_simulated_studies_hold_what_is_stated(name: str) -> None:
    case = CASES[name]
    share = case.measure(RUNS)
    slack = [ERRORS * math.sqrt(bound * (1 - bound) / RUNS) for bound in (case.low, case.high)]
    assert case.low - slack[0] <= share <= case.high + slack[1]


@pytest.mark.parametrize(("models", "family"), [(4, 1), (8, 1), (8, 6), (20, 3)])
def test_the_detectable_effect_has_80_percent_power_by_the_noncentral_t(
    models: int, family: int
) -> None:
    effect = detectable("bits_per_byte", 0.3, models, family)
    critical = stats.t.isf(0.025 / family, models - 1)
    shift = effect / 0.3 * math.sqrt(models)
    power = stats.nct.sf(critical, models - 1, shift) + stats.nct.cdf(-critical, models - 1, shift)
    assert power == pytest.approx(0.8, abs=1e-3)


def test_detectable_perplexities_are_ratios_and_one_model_sees_nothing() -> None:
    in_logs = detectable("bits_per_byte", math.log1p(0.02), 8, 1)
    assert detectable("perplexity", 2.0, 8, 1) == pytest.approx(100 * math.expm1(in_logs))
    assert np.isnan(detectable("perplexity", 2.0, 1, 1))
