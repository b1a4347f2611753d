"""Declared contrasts: verdicts on planted effects, and what must keep a claim from being made."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis.contrasts import Judgement, judge
from analysis.design import parse_design, read_design
from analysis.load import TableError
from analysis.statistics import CONFIDENCE
from jobs.design import LEVEL
from tests.analysis.declared import Noise, Simulated, declared, simulated

FILTER = {"filter": ("filtered", "self")}
QUIET = Noise(model=0.004, draw=0.002, window=0.01, rest=0.01)


def judged(data: Simulated, requests: bool = True, **fields: Any) -> Judgement:
    document = declared(FILTER, **fields)
    return judge(data.table, parse_design(document), data.requests if requests else None)["filter"]


def with_status(data: Simulated, arm: str, status: str, cells: int = 1) -> Simulated:
    """Return the data with the first cells of an arm lost."""
    names = data.table.loc[data.table["calibration"] == arm, "cell"].iloc[:cells]
    lost = data.table["cell"].isin(names)
    table = data.table.copy()
    table.loc[lost, "status"] = status
    table.loc[lost, ["value"]] = np.nan
    table.loc[lost, ["task", "metric"]] = None
    requests = data.requests[~data.requests["cell"].isin(names)]
    return Simulated(table, requests)


def test_a_plan_counts_on_the_confidence_at_which_contrasts_are_judged() -> None:
    assert pytest.approx(1 - CONFIDENCE) == LEVEL


@pytest.mark.parametrize(
    ("effect", "verdict"), [(0.05, "worse"), (-0.05, "better"), (0.0, "equivalent")]
)
def test_a_planted_effect_gets_its_verdict(effect: float, verdict: str) -> None:
    data = simulated({"self": 0.0, "filtered": effect}, QUIET)
    found = judged(data, smallest=2.0)
    assert found.verdict == verdict
    assert found.estimate.low < 100 * math.expm1(effect) < found.estimate.high
    assert found.models == 8
    assert "8 models" in found.text
    within = max(abs(found.estimate.low), abs(found.estimate.high)) < 2.0
    assert within == (verdict == "equivalent")


def test_noise_gets_no_verdict() -> None:
    found = judged(simulated({"self": 0.0, "filtered": 0.0}, Noise(model=0.1)))
    assert found.verdict == "not shown"
    assert found.estimate.low < 0 < found.estimate.high


def test_without_windows_the_interval_is_students_over_models_and_says_what_it_leaves_out() -> None:
    data = simulated({"self": 0.0, "filtered": 0.03}, Noise())
    found = judged(data, requests=False)
    logs = data.table.assign(log=np.log(data.table["value"]))
    by_model = logs.pivot_table(index="model", columns="calibration", values="log", observed=True)
    student = stats.ttest_rel(by_model["filtered"], by_model["self"])
    low, high = student.confidence_interval(0.95)
    assert found.estimate.low == pytest.approx(100 * math.expm1(low))
    assert found.estimate.high == pytest.approx(100 * math.expm1(high))
    assert found.estimate.p == pytest.approx(student.pvalue)
    assert "without the noise of the evaluation texts" in found.text


def test_noise_of_the_windows_that_models_share_widens_the_interval() -> None:
    data = simulated({"self": 0.0, "filtered": 0.03}, Noise(window=0.3))
    wide, narrow = judged(data).estimate, judged(data, requests=False).estimate
    assert wide.effect == pytest.approx(narrow.effect)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_intervals_of_a_family_are_bonferronis() -> None:
    data = simulated({"self": 0.0, "random": 0.0, "filtered": 0.03}, Noise())
    three = {"a": ("filtered", "self"), "b": ("random", "self"), "c": ("filtered", "random")}
    together = judge(data.table, parse_design(declared(three)))["a"].estimate
    alone = judged(data, requests=False).estimate
    ratio = stats.t.isf(0.025 / 3, 7) / stats.t.isf(0.025, 7)
    half = [
        math.log1p(each.high / 100) - math.log1p(each.effect / 100) for each in (together, alone)
    ]
    assert half[0] / half[1] == pytest.approx(ratio)
    assert together.p == pytest.approx(min(1, 3 * alone.p))


def test_one_model_gives_an_interval_that_is_said_to_be_of_it() -> None:
    data = simulated({"self": 0.0, "filtered": 0.2}, Noise(), models=1, draws=4)
    found = judged(data, models=1, draws=4)
    assert (found.verdict, found.models) == ("worse", 1)
    assert "4 draws of this one model" in found.text


def test_one_model_with_one_draw_shows_nothing() -> None:
    data = simulated({"self": 0.0, "filtered": 0.2}, Noise(), models=1, draws=1)
    found = judged(data, models=1, draws=1)
    assert found.verdict == "not shown"
    assert "no interval; 1 draw of this one model" in found.text


@pytest.mark.parametrize(
    ("arm", "effect", "verdict"),
    [
        ("filtered", -0.05, "not shown"),
        ("filtered", 0.05, "worse"),
        ("self", -0.05, "better"),
        ("self", 0.05, "not shown"),
        ("self", 0.0, "not shown"),
    ],
)
def test_a_failed_cell_counts_against_its_side(arm: str, effect: float, verdict: str) -> None:
    data = with_status(simulated({"self": 0.0, "filtered": effect}, QUIET), arm, "failed")
    found = judged(data, smallest=2.0)
    assert found.verdict == verdict
    assert "failed cells: 1 of the" in found.text


def test_while_cells_have_not_run_there_is_no_verdict() -> None:
    data = with_status(simulated({"self": 0.0, "filtered": 0.1}, QUIET), "self", "missing")
    found = judged(data)
    assert found.verdict == "not shown"
    assert "cells not run yet: 1" in found.text


def test_a_model_without_a_whole_draw_is_left_out_and_counted() -> None:
    data = with_status(simulated({"self": 0.0, "filtered": -0.1}, QUIET), "self", "failed", 2)
    found = judged(data)
    assert (found.verdict, found.models) == ("better", 7)
    assert "1 of 8 models left out" in found.text


def test_levels_beyond_the_floor_support_no_claim() -> None:
    data = simulated({"self": 0.0, "filtered": 0.05}, QUIET)
    assert judged(data, floor={"times_dense": 1.2}).verdict == "not usable"
    assert judged(data, floor={"levels": {"heldout": 2.0}}).verdict == "not usable"
    between = math.sqrt(math.prod(judged(data).levels[:2]))
    found = judged(data, floor={"levels": {"heldout": between}})
    assert found.verdict == "worse"
    assert "the first side is beyond the floor of use" in found.text
    assert judged(data, floor={"times_dense": 5.0}).verdict == "worse"


def test_levels_of_both_sides_and_of_the_dense_models_stand_beside_the_effect() -> None:
    data = simulated({"self": 0.0, "filtered": 0.05}, QUIET)
    geometric = np.exp(
        np.log(data.table["value"]).groupby(data.table["calibration"], observed=True).mean()
    )
    expected = tuple(geometric[name] for name in ("filtered", "self", "none"))
    assert judged(data).levels == pytest.approx(expected)


def test_seeds_shared_by_all_models_add_the_noise_of_their_draws() -> None:
    data = simulated({"self": 0.0, "filtered": 0.0}, QUIET, draws=3)
    shared_draw = {0: -0.1, 1: 0.02, 2: 0.1}
    place = data.table["seed"].fillna(0) % 3
    filtered = data.table["calibration"] == "filtered"
    value = data.table["value"] * np.exp(filtered * place.map(shared_draw).astype(float))
    own = judge(data.table.assign(value=value), parse_design(declared(FILTER, draws=3)))["filter"]
    crossed = data.table.assign(value=value, seed=place.where(data.table["seed"].notna()))
    shared = judge(crossed, parse_design(declared(FILTER, draws=3)))["filter"]
    assert own.estimate.effect == pytest.approx(shared.estimate.effect)
    assert shared.estimate.high - shared.estimate.low > 5 * (own.estimate.high - own.estimate.low)


def test_cells_that_the_table_lacks_are_named_with_the_remedy() -> None:
    data = simulated({"self": 0.0, "filtered": 0.0}, QUIET)
    table = data.table[data.table["cell"] != "self/testbed-0/0"]
    with pytest.raises(TableError, match=r"filter: the table lacks 1 .*self/testbed-0/0: run"):
        judge(table, parse_design(declared(FILTER)))


def test_a_metric_that_no_cell_has_is_named() -> None:
    data = simulated({"self": 0.0, "filtered": 0.0}, QUIET)
    document = declared(FILTER)
    document["history"][-1]["design"]["contrasts"][0]["tasks"] = ["rivers"]
    with pytest.raises(TableError, match="filter: no cell has perplexity of rivers"):
        judge(data.table, parse_design(document))


def test_accuracies_are_judged_in_points_by_their_questions() -> None:
    data = simulated({"self": 0.0, "filtered": -0.2}, QUIET)
    table = data.table.assign(metric="acc", value=1 / data.table["value"])
    answers = data.requests.assign(metric="acc", value=np.exp(-data.requests["value"]))
    document = declared(FILTER)
    document["history"][-1]["design"]["contrasts"][0]["metric"] = "acc"
    found = judge(table, parse_design(document), answers)["filter"]
    assert found.verdict == "better"
    assert "points" in found.text


def test_the_design_is_read_beside_the_results(tmp_path: Path) -> None:
    document = declared(FILTER)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "planted.design.json").write_text(json.dumps(document))
    assert read_design(tmp_path, "planted") == parse_design(document)
    assert read_design(tmp_path / "results" / "planted.parquet", "planted") is not None
    assert read_design(tmp_path, "other") is None


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([0], "The design was declared before there was a result."),
        ([7], "The design was declared when 7 of 48 cells had results."),
        ([0, 0], "The design was declared before there was a result."),
        (
            [0, 9],
            "The design was declared before there was a result. It was changed after results "
            "existed: 1 time, last when 9 of 48 cells had results.",
        ),
    ],
)
def test_a_design_changed_after_results_existed_says_so(measured: list[int], expected: str) -> None:
    document = declared(FILTER)
    version = document["history"][0]
    document["history"] = [{**version, "measured": count} for count in measured]
    assert parse_design(document).history == expected
