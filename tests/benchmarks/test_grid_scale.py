import pytest

from benchmarks.grid_scale import STAGES_A_SEED, dollars, measure_scale


def test_a_simulated_run_makes_all_stages_of_a_grid_that_grows_with_its_seeds() -> None:
    small, large = measure_scale(1), measure_scale(3)
    assert large.stages - small.stages == 2 * STAGES_A_SEED
    assert large.pools - small.pools == 2 * 2  # to generate and to score with a pruned model
    assert 0 < small.schedule_seconds < large.schedule_seconds


def test_dollars_are_those_of_the_price_list() -> None:
    assert dollars({"PUT": 1000, "LIST": 2000, "GET": 10_000, "DELETE": 5}) == pytest.approx(0.019)
