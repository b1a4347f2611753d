import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from cluster.store import Store
from jobs.cells import GENERATED_FIELDS
from jobs.grid import Grid
from jobs.plan import make_plan
from jobs.recommend import (
    SIGNIFICANCE,
    Candidate,
    Record,
    chance_of,
    left_out,
    objections,
    print_ranking,
    rank,
    read_record,
    scores_only,
    scoring_plan,
    worth_of,
)
from tests.made import make_here

Content = dict[str, Any]
Load = Callable[[Content], Grid]


def record_of(slope: float, noise: float, sources: int = 12) -> Record:
    draws = np.random.default_rng(2)
    x = np.linspace(-1, 1, sources)
    level = slope * x[:, None] + noise * draws.normal(size=(sources, 3))
    scores = {"min_k_plus_plus": x, "loss": draws.normal(size=sources)}
    return Record(("testbed",), scores, level - level.mean(axis=0), True)


def candidates(*scores: float) -> list[Candidate]:
    return [
        Candidate("testbed", f"at {score:g}", {"min_k_plus_plus": score}, {"min_k_plus_plus": 0.01})
        for score in scores
    ]


def test_a_record_with_an_effect_ranks_by_it_and_is_sure() -> None:
    ranked = rank(candidates(-0.5, 0.9, 0.2), "min_k_plus_plus", record_of(-0.3, 0.01))
    assert [each.candidate.name for each in ranked] == ["at 0.9", "at 0.2", "at -0.5"]
    assert ranked[0].best > 0.95
    assert ranked[2].expected == pytest.approx(0.3 * 1.4, abs=0.02)
    assert ranked[2].low < 0.3 * 1.4 < ranked[2].high


def test_a_record_of_noise_leaves_the_choice_open() -> None:
    ranked = rank(candidates(-0.5, 0.9, 0.2), "min_k_plus_plus", record_of(0.0, 0.3))
    assert max(each.best for each in ranked) < 0.6
    assert all(each.low < 0 < each.high for each in ranked[1:])


def test_eighty_percent_intervals_hold_what_is_drawn_anew() -> None:
    draws = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        x = draws.normal(size=10)
        harm = (0.2 * x + 0.1 * draws.normal(size=10))[:, None]
        record = Record(("testbed",), {"min_k_plus_plus": x}, harm - harm.mean(axis=0), True)
        ranked = rank(candidates(-1.0, 1.0), "min_k_plus_plus", record)
        first, last = (each.candidate.scores["min_k_plus_plus"] for each in ranked)
        truth = 0.2 * (last - first) + 0.1 * (draws.normal() - draws.normal())
        inside += ranked[1].low < truth < ranked[1].high
    assert 0.72 < inside / 200 < 0.88


def test_the_worth_of_a_score_is_that_of_leaving_sources_out() -> None:
    good = worth_of(record_of(-0.3, 0.01), "min_k_plus_plus")
    assert good.explained > 0.97
    assert good.rank > 0.95
    assert good.regret < 0.05 < good.random_regret
    assert worth_of(record_of(-0.3, 0.01), "loss").explained < 0.3


def test_what_a_line_misses_is_that_of_fits_without_the_source() -> None:
    draws = np.random.default_rng(3)
    x, harm = draws.normal(size=(2, 9)), draws.normal(size=(9, 3))
    residuals, of_mean = left_out(x, harm)
    scaled = (harm - harm.mean(axis=0)) / harm.std(axis=0)
    for place in range(9):
        others = np.arange(9) != place
        np.testing.assert_allclose(of_mean[place], scaled[place] - scaled[others].mean(axis=0))
        for number in range(2):
            for setting in range(3):
                line = np.polyfit(x[number, others], scaled[others, setting], 1)
                missed = scaled[place, setting] - np.polyval(line, x[number, place])
                assert residuals[number, place, setting] == pytest.approx(missed)


def test_the_best_of_seven_scores_of_noise_carries_a_ranking_one_time_in_twenty() -> None:
    draws = np.random.default_rng(4)
    names = [f"score {number}" for number in range(7)]
    carried = 0
    for _ in range(40):
        harm = draws.normal(size=(12, 2))
        scores = {name: draws.normal(size=12) for name in names}
        record = Record(("testbed",), scores, harm - harm.mean(axis=0), True)
        carried += chance_of(record, names, draws=200) < SIGNIFICANCE
    assert carried <= 5  # of 40; 6 or more have a probability of 0.014 at one in twenty
    assert chance_of(record_of(-0.3, 0.01), ["min_k_plus_plus", "loss"]) < 0.001


def test_a_ranking_is_declined_for_noise_another_model_and_a_candidate_beyond_the_record() -> None:
    record = record_of(-0.3, 0.01)
    assert objections(candidates(-0.5, 0.9), "min_k_plus_plus", record, 0.01) == []
    (noise,) = objections(candidates(-0.5, 0.9), "min_k_plus_plus", record, 0.21)
    assert "probability 0.21" in noise
    (beyond,) = objections(candidates(-0.5, 1.2), "min_k_plus_plus", record, 0.01)
    assert beyond == "at 1.2 has min_k_plus_plus 1.2, and the record's sources have -1 to 1"
    other = record._replace(models=("llama", "opt"))
    (model,) = objections(candidates(-0.5, 0.9), "min_k_plus_plus", other, 0.01)
    assert model == "the record is of llama, opt"


def table_of(sources: int) -> pd.DataFrame:
    """A results table in which harm falls with Min-K%++."""
    rows = [
        {
            **dict.fromkeys(GENERATED_FIELDS),
            "status": "ok",
            "model": "testbed",
            "calibration": f"source-{place}",
            "pruner": "wanda",
            "pruner_options": "{}",
            "sparsity": sparsity,
            "pattern": "unstructured",
            "task": "heldout",
            "metric": "perplexity",
            "value": float(np.exp(1 + sparsity + 0.1 * place + 0.01 * seed)),
            "calibration_report": json.dumps({"min_k_plus_plus": -place / 10, "loss": 2.0}),
        }
        for place in range(sources)
        for sparsity in (0.5, 0.6)
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows)


def stored(table: pd.DataFrame, folder: Path) -> Store:
    store = Store(str(folder))
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    store.write("results/predictor.parquet", buffer.getvalue())
    return store


def test_a_record_is_read_from_a_results_table(tmp_path: Path) -> None:
    record = read_record(stored(table_of(6), tmp_path / "six"), "predictor")
    assert record is not None
    assert record.harm.shape == (6, 2)
    steps = np.diff(record.harm, axis=0)
    assert np.allclose(steps, 0.1)
    assert record.scores["min_k_plus_plus"].tolist() == [0.0, -0.1, -0.2, -0.3, -0.4, -0.5]
    assert read_record(stored(table_of(4), tmp_path / "four"), "predictor") is None
    assert read_record(Store(str(tmp_path / "none")), "predictor") is None


def test_a_source_without_a_finite_number_is_left_out_and_counted(tmp_path: Path) -> None:
    whole = read_record(stored(table_of(6), tmp_path / "whole"), "predictor")
    for number, (column, value) in enumerate(
        [("value", np.inf), ("value", np.nan), ("calibration_report", '{"min_k_plus_plus": NaN}')]
    ):
        table = table_of(7)
        table.loc[table[table["calibration"] == "source-6"].index[0], column] = value
        record = read_record(stored(table, tmp_path / str(number)), "predictor")
        assert record is not None
        assert record.left_out == 1
        assert whole is not None
        assert np.array_equal(record.harm, whole.harm)


def test_only_descriptions_and_what_they_need_are_made(content: Content, load: Load) -> None:
    plan = scores_only(scoring_plan(load(content)))
    assert {plan.specs[key].kind for key in plan.targets} == {"describe"}
    assert len(plan.targets) == 4  # two calibrations, two seeds


def test_a_grid_without_a_description_makes_none(content: Content, load: Load) -> None:
    assert make_plan(load(content)).descriptions == {}


def test_a_ranking_is_printed_with_its_record(
    content: Content, load: Load, tmp_path: Path, tiny_model_folder: Path
) -> None:
    store = stored(table_of(8), tmp_path / "store")
    model = {"kind": "local-model", "path": str(tiny_model_folder / "model"), "dtype": "float32"}
    content["models"] = {"other": model}
    content["calibrations"]["own"]["num_samples"] = 8
    content["cells"] |= {"model": "other", "pruner": "wanda", "sparsity": 0.5, "seed": 0}
    plan = scoring_plan(load(content))
    targets = scores_only(plan).targets
    make_here(plan.graph, targets, store)
    made = {plan.specs[key].kind for key in store.keys() & plan.specs.keys()}
    assert "describe" in made
    assert not made & {"prune", "evaluate"}
    console = Console(width=200, record=True, file=io.StringIO())
    print_ranking(plan, store, "predictor", console)
    printed = console.export_text()
    assert "record: 8 sources of grid predictor, each predicted from the others" in printed
    assert "no recommendation for other: the record is of testbed" in printed
    assert "add --probe TEXT_FILE" in printed
    assert "ranked by" not in printed
    print_ranking(plan, store, "nothing", console)
    assert "no recommendation: the store holds no results of grid nothing" in console.export_text()
    own = table_of(8).assign(
        model="other",
        calibration_report=[
            json.dumps({"min_k_plus_plus": 20.0 - 5 * place, "loss": 2.0})
            for place in range(8)
            for _ in range(4)
        ],
    )
    print_ranking(plan, stored(own, tmp_path / "store"), "predictor", console)
    assert "calibration data for other, ranked by min_k_plus_plus" in console.export_text()
