import math
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from analysis.load import TableError
from analysis.statistics import (
    best_calibration,
    compare_with_reference,
    holm,
    summarize,
    t_interval,
    with_mean_accuracy,
)
from tests.analysis.conftest import DENSE, MAGNITUDE, MakeTable

T_975 = {1: 12.7062, 2: 4.3027, 3: 3.1824}
"""Quantiles of Student's t by degrees of freedom, from printed tables."""


def seeds(calibration: str, values: list[float], **further: Any) -> list[dict[str, Any]]:
    return [
        {"calibration": calibration, "seed": seed, "value": value, **further}
        for seed, value in enumerate(values)
    ]


def test_the_interval_of_one_to_four_is_the_textbooks() -> None:
    interval = t_interval([1.0, 2.0, 3.0, 4.0])
    half = T_975[3] * math.sqrt(5 / 3) / 2
    assert interval.mean == 2.5
    assert interval.low == pytest.approx(2.5 - half, abs=1e-4)
    assert interval.high == pytest.approx(2.5 + half, abs=1e-4)


def test_p_of_two_values_is_that_of_the_cauchy_distribution() -> None:
    t = 2.0 / 1.0  # mean 2, standard error 1
    assert t_interval([1.0, 3.0]).p == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-9)


@pytest.mark.parametrize("values", [[0.25], [0.25, 0.25], [1.0, math.inf]])
def test_without_spread_there_is_neither_interval_nor_p(values: list[float]) -> None:
    assert np.isnan(t_interval(values)[1:]).all()


def test_holm_steps_down_as_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_counts_only_what_was_tested_and_stops_at_one() -> None:
    assert holm([0.01, np.nan, 0.6]) == pytest.approx([0.02, np.nan, 0.6], nan_ok=True)
    assert holm([0.7, 0.8]) == pytest.approx([1.0, 1.0])


def test_holm_is_that_of_statsmodels_to_the_bit() -> None:
    draws = np.random.default_rng(0)
    for count in (1, 2, 7, 40):
        p = draws.uniform(0, 0.2, count).round(2)  # with ties
        assert (holm(p) == multipletests(p, method="holm")[1]).all()


def test_a_summary_has_mean_sd_n_and_interval(make_table: MakeTable) -> None:
    row = summarize(make_table(seeds("corpus", [0.4, 0.5, 0.6]))).iloc[0]
    assert (row["calibration"], row["target"], row["n"]) == ("corpus", "50 %", 3)
    assert row["mean"] == pytest.approx(0.5)
    assert row["sd"] == pytest.approx(0.1)
    half = T_975[2] * 0.1 / math.sqrt(3)
    assert row["low"] == pytest.approx(0.5 - half, abs=1e-5)
    assert row["high"] == pytest.approx(0.5 + half, abs=1e-5)


def test_a_summary_of_one_seed_has_a_mean_only(make_table: MakeTable) -> None:
    row = summarize(make_table([{"value": 0.4}, {**DENSE, "value": 0.8}])).set_index("pruner")
    assert row["mean"].to_dict() == {"dense": 0.8, "wanda": 0.4}
    assert row["n"].to_list() == [1, 1]
    assert row[["sd", "low", "high"]].isna().all(axis=None)


def test_a_pattern_and_the_sparsity_it_amounts_to_are_not_mixed(make_table: MakeTable) -> None:
    rows = [*seeds("corpus", [0.4, 0.5]), *seeds("corpus", [0.2, 0.3], pattern="2:4")]
    levels = summarize(make_table(rows)).set_index("target")["mean"]
    assert levels.to_dict() == pytest.approx({"50 %": 0.45, "2:4": 0.25})


def test_accuracies_are_compared_seed_by_seed_in_points(make_table: MakeTable) -> None:
    rows = [*seeds("corpus", [0.5, 0.6, 0.7]), *seeds("other", [0.52, 0.63, 0.71])]
    row = compare_with_reference(make_table(rows), "corpus").iloc[0]
    half = 100 * T_975[2] * 0.01 / math.sqrt(3)
    t = 0.02 / (0.01 / math.sqrt(3))
    assert (row["calibration"], row["pairs"], row["unit"]) == ("other", 3, "points")
    assert row["difference"] == pytest.approx(0.02)
    assert row["effect"] == pytest.approx(2.0)
    assert row["low"] == pytest.approx(2 - half, abs=1e-3)
    assert row["high"] == pytest.approx(2 + half, abs=1e-3)
    assert row["p"] == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-6)  # 2 degrees
    assert row["better"]


def test_perplexities_are_compared_as_difference_and_percent(make_table: MakeTable) -> None:
    number = {"task": "heldout", "metric": "perplexity"}
    rows = [*seeds("corpus", [10.0, 20.0], **number), *seeds("other", [11.0, 18.0], **number)]
    row = compare_with_reference(make_table(rows), "corpus").iloc[0]
    middle, half = math.log(0.99) / 2, T_975[1] * math.log(1.1 / 0.9) / 2
    assert row["difference"] == pytest.approx(-0.5)
    assert row["unit"] == "%"
    assert row["effect"] == pytest.approx(100 * (math.sqrt(0.99) - 1))
    assert row["low"] == pytest.approx(100 * (math.exp(middle - half) - 1), rel=1e-4)
    assert row["high"] == pytest.approx(100 * (math.exp(middle + half) - 1), rel=1e-4)
    assert row["better"]


@pytest.mark.parametrize(("metric", "better"), [("perplexity", False), ("acc_norm", True)])
def test_more_is_better_of_accuracies_and_worse_of_perplexities(
    make_table: MakeTable, metric: str, better: bool
) -> None:
    rows = [*seeds("corpus", [0.5], metric=metric), *seeds("other", [0.6], metric=metric)]
    assert compare_with_reference(make_table(rows), "corpus")["better"].to_list() == [better]


def test_one_pair_has_a_difference_but_no_interval(make_table: MakeTable) -> None:
    row = compare_with_reference(
        make_table([*seeds("corpus", [0.5]), *seeds("other", [0.6])]), "corpus"
    ).iloc[0]
    assert row["pairs"] == 1
    assert row["effect"] == pytest.approx(10)
    assert np.isnan([row["low"], row["high"], row["p"], row["p_holm"]]).all()


def test_seeds_that_only_one_calibration_has_do_not_count(make_table: MakeTable) -> None:
    failed = {"calibration": "other", "seed": 1, "status": "failed", "task": None, "metric": None}
    rows = [*seeds("corpus", [0.5, 0.9]), *seeds("other", [0.6]), failed]
    row = compare_with_reference(make_table(rows), "corpus").iloc[0]
    assert (row["pairs"], row["reference_mean"]) == (1, 0.5)


def test_holm_counts_the_comparisons_of_one_metric_together(make_table: MakeTable) -> None:
    values = {"corpus": [0.5, 0.6], "near": [0.51, 0.63], "far": [0.1, 0.3]}
    rows = [
        row
        for calibration, numbers in values.items()
        for metric in ("acc", "acc_norm")
        for row in seeds(calibration, numbers, metric=metric)
    ]
    compared = compare_with_reference(make_table(rows), "corpus")
    for _, family in compared.groupby("metric"):
        small, large = sorted(family["p"])
        assert sorted(family["p_holm"]) == pytest.approx(
            sorted([min(1, 2 * small), min(1, max(2 * small, large))])
        )


def test_an_unknown_reference_is_refused_with_the_known_ones(make_table: MakeTable) -> None:
    table = make_table([*seeds("corpus", [0.5]), *seeds("other", [0.6])])
    with pytest.raises(TableError, match=r"reference nothing: .*corpus; other"):
        compare_with_reference(table, "nothing")


def test_the_dense_model_and_pruners_without_data_do_not_compete(make_table: MakeTable) -> None:
    rows = [*seeds("corpus", [0.5, 0.6]), *seeds("other", [0.6, 0.65])]
    rows += [{**DENSE, "value": 0.9}, {**MAGNITUDE, "value": 0.95}]
    table = make_table(rows)
    best = best_calibration(table, "questions", "acc", "corpus")
    assert set(compare_with_reference(table, "corpus")["pruner"]) == {"wanda"}
    assert best[["pruner", "calibration"]].to_numpy().tolist() == [["wanda", "other"]]
    assert best["effect"].to_list() == pytest.approx([7.5])


def test_the_best_perplexity_is_the_lowest_at_each_target(make_table: MakeTable) -> None:
    number = {"task": "heldout", "metric": "perplexity"}
    rows = [
        *seeds("corpus", [10.0, 11.0], **number),
        *seeds("other", [12.0, 13.0], **number),
        *seeds("corpus", [30.0, 31.0], sparsity=0.6, **number),
        *seeds("other", [20.0, 22.0], sparsity=0.6, **number),
    ]
    best = best_calibration(make_table(rows), "heldout", "perplexity", "corpus")
    assert best.set_index("target")["calibration"].to_dict() == {"50 %": "corpus", "60 %": "other"}
    assert best.set_index("target")["mean"].to_dict() == {"50 %": 10.5, "60 %": 21.0}
    assert math.isnan(best.set_index("target").loc["50 %", "effect"])


def test_an_unmeasured_metric_is_refused_with_the_measured_ones(
    make_table: MakeTable,
) -> None:
    table = make_table(seeds("corpus", [0.5]))
    with pytest.raises(TableError, match=r"heldout: perplexity .*questions: acc"):
        best_calibration(table, "heldout", "perplexity", "corpus")


def test_two_cells_with_the_same_labels_are_refused(make_table: MakeTable) -> None:
    rows = [{"cell": "one", "value": 0.4}, {"cell": "two", "value": 0.6}]
    with pytest.raises(TableError, match=r"cells one, two.*different names"):
        summarize(make_table(rows))


def test_settings_that_vary_within_a_calibration_are_compared_as_sources(
    make_table: MakeTable,
) -> None:
    rows = [
        {**row, "prefix_tokens": prefix}
        for prefix, values in ((4, [0.5, 0.6]), (16, [0.6, 0.8]))
        for row in seeds("self", values, cell=f"{prefix}")
    ]
    for number, row in enumerate(rows):
        row["cell"] = str(number)
    table = make_table(rows)
    compared = compare_with_reference(table, "self, 4 prefix tokens")
    assert compared["source"].to_list() == ["self, 16 prefix tokens"]
    assert compared["effect"].to_list() == pytest.approx([15.0])
    with pytest.raises(TableError, match="several settings"):
        compare_with_reference(table, "self")


def test_mean_accuracy_is_over_tasks_of_cells_that_have_all(make_table: MakeTable) -> None:
    rows = [
        *seeds("corpus", [0.2, 0.4], task="rivers"),
        *seeds("corpus", [0.6], task="colours"),
        *seeds("corpus", [7.0, 8.0], task="heldout", metric="perplexity"),
    ]
    table = make_table(rows)
    added = with_mean_accuracy(table).iloc[len(table) :]
    assert added[["task", "seed"]].to_numpy().tolist() == [["mean of 2 tasks", 0]]
    assert added["value"].to_list() == pytest.approx([0.4])


def test_one_task_needs_no_mean_over_tasks(make_table: MakeTable) -> None:
    table = make_table(seeds("corpus", [0.2, 0.4]))
    assert with_mean_accuracy(table) is table
