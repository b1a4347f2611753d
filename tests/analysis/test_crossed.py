"""The variance of a mean over crossed models and windows, against closed forms and resampling."""

import numpy as np
import pytest
from scipy import stats

from analysis.crossed import shared_part, uncertainty_of_mean
from analysis.metrics import Values


def crossed_table(
    seed: int, units: int, columns: int, unit: float, column: float, rest: float
) -> Values:
    """Return `[units, columns]` with the given standard deviations of each effect."""
    draws = np.random.default_rng(seed)
    return np.asarray(
        draws.normal(0, unit, (units, 1))
        + draws.normal(0, column, (1, columns))
        + draws.normal(0, rest, (units, columns))
    )


def pigeonhole_variance(table: Values, resamples: int) -> float:
    """Return the variance of the mean when units and columns are resampled independently.

    Source: Owen 2007, Annals of Applied Statistics 1:386-411.
    """
    draws = np.random.default_rng(0)
    units, columns = table.shape
    rows = draws.multinomial(units, np.full(units, 1 / units), resamples) / units
    cols = draws.multinomial(columns, np.full(columns, 1 / columns), resamples) / columns
    return float(np.einsum("bi,ij,bj->b", rows, table, cols).var())


def estimated_variance(table: Values) -> float:
    """Return the variance of the mean that the parts add up to, if none alone is larger."""
    parts, least = uncertainty_of_mean(table.mean(axis=1), [shared_part([table])])
    return max(sum(part.variance for part in parts), *(part.variance for part in least))


def test_without_shared_columns_the_interval_and_p_are_students() -> None:
    values = np.array([0.3, -0.1, 0.4, 0.9, 0.2])
    uncertainty = uncertainty_of_mean(values)
    expected = stats.ttest_1samp(values, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert uncertainty.half_width(0.95) == pytest.approx((high - low) / 2)
    assert uncertainty.p(float(values.mean())) == pytest.approx(expected.pvalue)


def test_p_is_below_5_percent_exactly_where_the_95_percent_interval_excludes_0() -> None:
    table = crossed_table(1, 6, 30, 0.2, 1.0, 0.5)
    uncertainty = uncertainty_of_mean(table.mean(axis=1), [shared_part([table])])
    half = uncertainty.half_width(0.95)
    assert uncertainty.p(1.001 * half) < 0.05 < uncertainty.p(0.999 * half)
    assert uncertainty.p(0.0) == pytest.approx(1.0)
    assert uncertainty.p(1e9) == 0.0


def test_the_variance_is_that_of_crossed_random_effects_on_average() -> None:
    units, columns, unit, column, rest = 6, 40, 0.5, 2.0, 1.0
    truth = unit**2 / units + column**2 / columns + rest**2 / (units * columns)
    estimates = []
    for seed in range(400):
        table = crossed_table(seed, units, columns, unit, column, rest)
        estimates.append(estimated_variance(table))
    error = float(np.std(estimates)) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - truth) < 3 * error


def test_the_pigeonhole_bootstrap_agrees_except_that_it_counts_the_rest_three_times() -> None:
    units, columns, unit, column, rest = 30, 60, 0.5, 1.5, 2.0
    moments, resampled = [], []
    for seed in range(30):
        table = crossed_table(seed, units, columns, unit, column, rest)
        moments.append(estimated_variance(table))
        resampled.append(pigeonhole_variance(table, 2000))
    extra = 2 * rest**2 / (units * columns)
    assert np.mean(resampled) == pytest.approx(np.mean(moments) + extra, rel=0.05)


def test_columns_that_units_do_not_share_add_nothing_on_average() -> None:
    excess = [
        shared_part([crossed_table(seed, 8, 50, 1.0, 0.0, 1.0)]).columns.variance
        for seed in range(300)
    ]
    assert np.mean(excess) == pytest.approx(1.0 / (8 * 50), rel=0.05)


def test_strata_add_up_as_variances_of_the_mean_of_their_means() -> None:
    tables = [crossed_table(seed, 5, 20 + seed, 0.1, 1.0, 0.3) for seed in range(3)]
    parts = shared_part(tables)
    singly = [shared_part([table]).columns.variance for table in tables]
    assert parts.columns.variance == pytest.approx(sum(singly) / 9)
    assert parts.columns.freedom > max(len(table[0]) for table in tables)
