"""Recommendations on tables with a planted truth."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis.advice import advise
from tests.analysis.conftest import DENSE, MAGNITUDE, MakeTable

TEXTS = ("prose", "code")


def rows(levels: dict[str, Any], settings: int = 4, **further: Any) -> list[dict[str, Any]]:
    """Return bits per byte of calibrations, given as one level or one per setting."""
    made = [
        {**DENSE, "task": text, "metric": "bits_per_byte", "value": 1.0 + place}
        for place, text in enumerate(TEXTS)
    ]
    for source, level in levels.items():
        for seed, value in enumerate(np.broadcast_to(level, settings)):
            cell = {"calibration": source, "seed": seed, "metric": "bits_per_byte", **further}
            made += [
                {**cell, "task": text, "value": float(value) + place}
                for place, text in enumerate(TEXTS)
            ]
    return made


def test_the_best_is_the_one_with_the_lowest_mean_and_its_rivals_follow(
    make_table: MakeTable,
) -> None:
    near, far = np.array([1.41, 1.42, 1.40, 1.43]), np.array([1.61, 1.58, 1.60, 1.63])
    best = np.array([1.40, 1.41, 1.41, 1.40])
    (advice,) = advise(make_table(rows({"far": far, "best": best, "near": near})))
    assert (advice.source, advice.texts, advice.settings) == ("best", 2, 4)
    assert advice.level == pytest.approx(best.mean() + 0.5)
    assert advice.dense == pytest.approx(1.5)
    assert [rival.source for rival in advice.rivals] == ["near", "far"]
    for rival, values in zip(advice.rivals, (near, far), strict=True):
        assert rival.loss.mean == pytest.approx((values - best).mean())
        assert rival.loss.p == pytest.approx(stats.ttest_rel(values, best).pvalue)
        assert rival.worse_in == int((values > best + 1e-9).sum())
    assert [rival.surely_worse for rival in advice.rivals] == [False, True]
    sentence = str(advice)
    assert sentence.startswith("tiny: take best: averaged over 2 texts and 4 settings")
    sure = "with all 2 compared at once surely better than far, not surely better than near"
    assert f"; {sure}." in sentence


def test_without_a_difference_the_sentence_is_seldom_sure(make_table: MakeTable) -> None:
    """Of three equal calibrations, the best of a draw must seldom look surely better.

    Since the best is chosen after looking, Holm over its rivals leaves at most about 5 % for each
    of the three that could be the best."""
    draws = np.random.default_rng(0)
    made: list[dict[str, Any]] = []
    for model in range(100):
        noise = draws.normal(0.0, 0.01, (3, 5))
        levels = {name: 1.5 + values for name, values in zip("abc", noise, strict=True)}
        of_model = rows(levels, settings=5, model=f"model {model}")
        made += [row for row in of_model if row.get("pruner") != "dense"]
    advices = advise(make_table(made))
    assert len(advices) == 100
    claims = sum(any(rival.surely_worse for rival in advice.rivals) for advice in advices)
    assert claims <= 15


def test_a_calibration_that_failed_somewhere_is_left_out_and_named(make_table: MakeTable) -> None:
    made = rows({"good": [1.5, 1.6], "lucky": [1.1, 1.1], "other": [1.7, 1.9]}, settings=2)
    lost = {"calibration": "lucky", "seed": 2, "task": None, "metric": None, "status": "failed"}
    (advice,) = advise(make_table([*made, lost]))
    assert advice.source == "good"
    assert advice.left_out == ["lucky"]
    assert "left out because numbers are missing: lucky" in str(advice)


def test_a_calibration_without_one_of_the_numbers_is_left_out(make_table: MakeTable) -> None:
    made = rows({"good": [1.5, 1.6], "odd": [1.0, 1.0], "other": [1.7, 1.9]}, settings=2)
    first = next(row for row in made if row["calibration"] == "odd")
    (advice,) = advise(make_table([row for row in made if row is not first]))
    assert (advice.source, advice.left_out) == ("good", ["odd"])


def test_one_setting_has_no_interval_and_claims_nothing(make_table: MakeTable) -> None:
    (advice,) = advise(make_table(rows({"good": 1.5, "other": 1.7}, settings=1)))
    assert "one setting: no interval); not surely better than other." in str(advice)
    assert not advice.rivals[0].surely_worse


def test_one_calibration_alone_is_not_recommended(make_table: MakeTable) -> None:
    alone = [*rows({"good": 1.5}), {**MAGNITUDE, "task": "prose", "metric": "bits_per_byte"}]
    assert advise(make_table(alone)) == []
