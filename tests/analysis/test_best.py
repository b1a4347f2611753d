"""Comparisons with the best, against the textbook's formula and on planted candidates."""

import numpy as np
import pytest
from scipy import stats

from analysis.best import compare_with_best, rank_choices
from analysis.design import parse_design
from analysis.load import TableError
from analysis.metrics import Values, metric_named
from analysis.replicates import Replicates
from tests.analysis.declared import ARMS, Noise, Simulated, declared, simulated
from tests.analysis.test_contrasts import with_status

QUIET = Noise(model=0.004, draw=0.002, window=0.01, rest=0.01)
BITS = metric_named("bits_per_byte")


def replicates(columns: dict[str, list[float]]) -> dict[str, Replicates]:
    return {name: Replicates(np.array(own)[:, None]) for name, own in columns.items()}


def ranked(data: Simulated) -> list[str]:
    design = parse_design(declared({}))
    return rank_choices(data.table, design, data.requests)["arm"].possibly_best


def test_a_planted_best_is_told_from_the_others() -> None:
    data = simulated({"self": 0.0, "random": 0.05, "filtered": 0.1}, QUIET)
    assert ranked(data) == ["self"]


def test_candidates_that_the_data_cannot_separate_stay_in_the_set() -> None:
    data = simulated({"self": 0.0, "random": 0.0, "filtered": 0.1}, QUIET)
    assert sorted(ranked(data)) == ["random", "self"]


def test_the_ends_are_hsus_with_a_bound_for_each_pair() -> None:
    columns = {"a": [1.0, 2.0, 4.0, 3.0], "b": [1.5, 2.2, 4.9, 3.1], "c": [9.0, 8.0, 9.5, 9.1]}
    found = {each.name: each for each in compare_with_best(replicates(columns), BITS)}

    def bound(one: str, other: str, sign: int) -> float:
        differences: Values = np.array(columns[one]) - np.array(columns[other])
        half = stats.t.isf(0.05 / 2, 3) * differences.std(ddof=1) / 2
        return float(differences.mean() + sign * half)

    assert [found[name].possibly_best for name in "abc"] == [True, True, False]
    assert found["a"].low == pytest.approx(max(bound("a", "b", -1), bound("a", "c", -1)))
    assert found["a"].high == pytest.approx(max(0, bound("a", "b", 1)))
    assert found["c"].low == 0
    assert found["c"].high == pytest.approx(max(bound("c", "a", 1), bound("c", "b", 1)))
    assert found["c"].loss == pytest.approx(np.mean(columns["c"]) - np.mean(columns["a"]))


def test_of_accuracies_the_highest_is_best() -> None:
    columns = {"high": [0.8, 0.82, 0.81], "low": [0.5, 0.53, 0.51]}
    first, second = compare_with_best(replicates(columns), metric_named("acc"))
    assert (first.name, first.possibly_best, second.possibly_best) == ("high", True, False)
    assert first.loss == pytest.approx(-29.667, abs=1e-3)
    assert second.loss == pytest.approx(29.667, abs=1e-3)
    assert (first.high, second.low) == (0, 0)
    assert first.level == pytest.approx(0.81)


def test_one_model_with_one_draw_excludes_nobody() -> None:
    found = compare_with_best(replicates({"a": [1.0], "b": [9.0]}), BITS)
    assert [each.possibly_best for each in found] == [True, True]
    assert np.isnan([found[0].low, found[0].high]).all()


def test_a_candidate_with_a_failed_cell_cannot_be_the_best() -> None:
    data = simulated({"self": -0.1, "random": 0.0, "filtered": 0.05}, QUIET)
    lost = with_status(data, "self", "failed")
    ranking = rank_choices(lost.table, parse_design(declared({})), lost.requests)["arm"]
    assert ranking.left_out == ("self",)
    assert ranking.possibly_best == ["random"]
    for arm in ARMS[1:]:
        lost = with_status(lost, arm, "failed")
    with pytest.raises(TableError, match="arm: 0 candidates have all results"):
        rank_choices(lost.table, parse_design(declared({})))
