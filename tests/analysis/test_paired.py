import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.load import TableError
from analysis.paired import bootstrap_means, compare_selections, hedges_g, mcnemar_p
from analysis.statistics import holm
from tests.analysis.conftest import MAGNITUDE, MakeTable
from tests.analysis.test_statistics import T_975, seeds


def sides(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of the calibrations `other` and `corpus`."""
    return table[table["calibration"] == "other"], table[table["calibration"] == "corpus"]


def only(compared: pd.DataFrame) -> Any:
    assert len(compared) == 1
    return compared.iloc[0]


def answered(values: dict[str, list[list[float]]]) -> pd.DataFrame:
    """Return per-request accuracies as `load_requests` does, from each calibration's runs."""
    rows = [
        {
            **{"grid": "hand", "model": "tiny", "method": "wanda", "target": "50 %"},
            **{"task": "questions", "metric": "acc", "status": "ok", "cell": f"{name}{seed}"},
            **{"source": name, "calibration": name, "pruner": "wanda"},
            **{"seed": seed, "doc_id": request, "value": value},
        }
        for name, runs in values.items()
        for seed, run in enumerate(runs)
        for request, value in enumerate(run)
    ]
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def test_seeds_pair_up_and_the_interval_is_students(make_table: MakeTable) -> None:
    rows = [*seeds("corpus", [0.5, 0.6, 0.7]), *seeds("other", [0.52, 0.63, 0.71])]
    row = only(compare_selections(*sides(make_table(rows))))
    half = 100 * T_975[2] * 0.01 / math.sqrt(3)
    assert (row["pairs"], row["n_a"], row["n_b"], row["unit"]) == (3, 3, 3, "points")
    assert row["effect"] == pytest.approx(2.0)
    assert (row["low"], row["high"]) == pytest.approx((2 - half, 2 + half), abs=1e-3)
    assert row["better"]
    assert row["test"] == "t"
    expected = stats.ttest_rel([0.52, 0.63, 0.71], [0.5, 0.6, 0.7]).pvalue
    assert row["p"] == pytest.approx(expected)


def test_the_bootstrap_interval_is_that_of_all_possible_resamples(make_table: MakeTable) -> None:
    rows = [*seeds("corpus", [0.5] * 4), *seeds("other", [0.51, 0.54, 0.53, 0.59])]
    row = only(compare_selections(*sides(make_table(rows))))
    every = [100 * np.mean(each) for each in itertools.product([0.01, 0.04, 0.03, 0.09], repeat=4)]
    low, high = np.quantile(every, [0.025, 0.975])
    assert row["bootstrap_low"] == pytest.approx(low, abs=0.15)
    assert row["bootstrap_high"] == pytest.approx(high, abs=0.15)


def test_resampled_means_agree_with_scipys_bootstrap() -> None:
    values = np.random.default_rng(1).exponential(size=60)
    ours = np.quantile(bootstrap_means(values[None, :])[0], [0.025, 0.975])
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=2
    ).confidence_interval
    assert ours == pytest.approx(list(theirs), abs=0.02)


def test_perplexities_are_bootstrapped_on_the_log_scale(make_table: MakeTable) -> None:
    number = {"task": "heldout", "metric": "perplexity"}
    rows = [*seeds("corpus", [10.0, 20.0], **number), *seeds("other", [11.0, 18.0], **number)]
    row = only(compare_selections(*sides(make_table(rows))))
    assert row["effect"] == pytest.approx(100 * (math.sqrt(1.1 * 0.9) - 1))
    assert (row["bootstrap_low"], row["bootstrap_high"]) == pytest.approx((-10, 10))


@pytest.mark.parametrize("n", [3, 5, 12])
def test_hedges_g_is_unbiased_where_the_plain_ratio_is_not(n: int) -> None:
    draws = np.random.default_rng(n).normal(1.0, 2.0, size=(20_000, n))
    corrected = np.array([hedges_g(draw) for draw in draws])
    plain = draws.mean(axis=1) / draws.std(axis=1, ddof=1)
    error = corrected.std() / math.sqrt(len(corrected))
    assert corrected.mean() == pytest.approx(0.5, abs=4 * error)
    assert plain.mean() - 0.5 > 4 * error


def test_two_pairs_have_no_effect_size() -> None:
    assert math.isnan(hedges_g(np.array([1.0, 2.0])))


def test_holm_corrects_for_all_rows(make_table: MakeTable) -> None:
    rows = [
        row
        for sparsity, gain in ((0.5, 0.02), (0.6, 0.05), (0.7, 0.2))
        for name, more in (("corpus", [0.0] * 3), ("other", [0.0, 0.01, gain]))
        for row in seeds(name, [0.3 + each for each in more], sparsity=sparsity)
    ]
    compared = compare_selections(*sides(make_table(rows)))
    assert compared["target"].to_list() == ["50 %", "60 %", "70 %"]
    assert compared["p_holm"].to_list() == pytest.approx(list(holm(compared["p"].to_list())))


def test_lost_cells_and_results_without_partner_are_counted(make_table: MakeTable) -> None:
    lost = {"calibration": "other", "task": None, "metric": None, "sparsity": 0.6}
    rows = [
        *seeds("corpus", [0.5, 0.6, 0.7]),
        *seeds("other", [0.6]),
        {**lost, "sparsity": 0.5, "seed": 1, "status": "failed"},
        *seeds("corpus", [0.4], sparsity=0.6),
        {**lost, "seed": 0, "status": "missing"},
        {**lost, "sparsity": 0.7, "seed": 0, "status": "failed"},
    ]
    compared = compare_selections(*sides(make_table(rows))).set_index("target")
    counts = compared[["pairs", "n_a", "n_b", "lost_a", "lost_b"]]
    assert counts.loc["50 %"].to_list() == [1, 1, 3, 1, 0]
    assert counts.loc["60 %"].to_list() == [0, 0, 1, 1, 0]
    assert counts.loc["70 %"].to_list() == [0, 0, 0, 1, 0]
    assert compared["effect"].notna().to_list() == [True, False, False]
    assert compared[["low", "p", "p_holm"]].isna().all(axis=None)


def test_a_pruner_without_seeds_pairs_with_every_seed(make_table: MakeTable) -> None:
    rows = [*seeds("corpus", [0.5, 0.6]), {**MAGNITUDE, "value": 0.4}]
    table = make_table(rows)
    wanda, magnitude = (table[table["pruner"] == name] for name in ("wanda", "magnitude"))
    row = only(compare_selections(wanda, magnitude, by=["model", "target", "task", "metric"]))
    assert (row["pairs"], row["n_a"], row["n_b"]) == (2, 2, 1)
    assert row["effect"] == pytest.approx(15)


def test_several_results_for_one_pair_are_refused_with_what_to_do(make_table: MakeTable) -> None:
    rows = [*seeds("corpus", [0.5]), *seeds("corpus", [0.4], sparsity=0.6)]
    rows += seeds("other", [0.6])
    with pytest.raises(
        TableError, match=r"b has several results of .*name the column they differ in"
    ):
        compare_selections(*sides(make_table(rows)), by=["task", "metric"])
    with pytest.raises(TableError, match="by: lacks metric"):
        compare_selections(*sides(make_table(rows)), by=["task"])
    with pytest.raises(TableError, match="a has no column nothing"):
        compare_selections(*sides(make_table(rows)), by=["metric", "nothing"])


def test_mcnemar_is_the_sign_test_of_the_answers_that_differ() -> None:
    a = np.array([1.0] * 9 + [0.0] * 2 + [1.0] * 20 + [0.0] * 5)
    b = np.array([0.0] * 9 + [1.0] * 2 + [1.0] * 20 + [0.0] * 5)
    assert mcnemar_p(a, b) == pytest.approx(stats.binomtest(2, 11, 0.5).pvalue)


def test_answers_of_one_seed_are_compared_by_mcnemar() -> None:
    better = [1.0] * 9 + [0.0] * 2 + [1.0] * 20
    worse = [0.0] * 9 + [1.0] * 2 + [1.0] * 20
    row = only(compare_selections(*sides(answered({"other": [better], "corpus": [worse]}))))
    assert (row["pairs"], row["test"]) == (31, "McNemar")
    assert row["p"] == pytest.approx(stats.binomtest(2, 11, 0.5).pvalue)
    assert row["effect"] == pytest.approx(100 * 7 / 31)
    assert row["bootstrap_low"] < row["effect"] < row["bootstrap_high"]


def test_answers_of_several_seeds_count_once_a_request() -> None:
    rng = np.random.default_rng(3)
    first = rng.random((2, 200)) < 0.7
    other = [list(map(float, run)) for run in first]
    corpus = [list(map(float, run & (rng.random(200) < 0.9))) for run in first]
    row = only(compare_selections(*sides(answered({"other": other, "corpus": corpus}))))
    differences = (np.array(other) - np.array(corpus)).mean(axis=0)
    expected = stats.ttest_1samp(differences, 0.0)
    assert (row["pairs"], row["test"]) == (200, "paired bootstrap")
    assert row["effect"] == pytest.approx(100 * differences.mean())
    interval = expected.confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx([100 * each for each in interval])
    assert (row["bootstrap_low"], row["bootstrap_high"]) == pytest.approx(
        [100 * each for each in interval], abs=1.0
    )
    assert row["p"] < 0.001


def test_under_the_null_the_bootstraps_p_is_below_a_tenth_once_in_ten() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=(60, 2, 2, 80)).tolist()
    tables = [
        answered({"other": other, "corpus": corpus}).assign(metric="score", task=f"task-{number}")
        for number, (other, corpus) in enumerate(values)
    ]
    compared = compare_selections(*sides(pd.concat(tables, ignore_index=True)))
    p_values = compared["p"].to_list()
    assert len(p_values) == 60
    below = sum(p < 0.1 for p in p_values)
    assert stats.binomtest(below, 60, 0.1).pvalue > 0.001
    assert 0.3 < np.mean(p_values) < 0.7
