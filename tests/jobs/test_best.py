"""The best cell of a finished grid, on planted results, and what is said of it."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from cluster.store import Store
from jobs.__main__ import app
from jobs.before_after import before_after, losses, measured_in
from jobs.best import best_cell
from jobs.gather import gather, write_table
from jobs.grid import Grid
from jobs.model_card import model_card
from jobs.plan import Plan, make_plan
from pipeline.errors import InputError
from pipeline.evaluation.schemas import METRICS_SCHEMA, REQUESTS_SCHEMA
from pipeline.specs import AWQ, GPTQ, EvaluateSpec, PruneSpec, Reconstruction

Content = dict[str, Any]
Level = Callable[[Any], float]
WINDOWS = 24


def plant(plan: Plan, store: Store, level: Level, kinds: tuple[str, ...] = ("loss", "kl")) -> None:
    """Write an evaluation for each cell: windows are hard or easy for all cells alike."""
    draws = np.random.default_rng(0)
    hard = draws.gamma(4.0, 0.25, size=WINDOWS)
    for key, cell in plan.cells.items():
        spec = plan.specs[key]
        values = {
            kind: hard * (level(cell) + 0.02 * draws.normal(size=WINDOWS))
            if kind != "acc"
            else np.asarray(hard * level(cell) > 1.0, dtype=np.float64)
            for kind in kinds
            if not (kind == "kl" and cell.pruner is None)
        }
        metrics = [
            {"task": "true", "metric": kind, "value": float(each.mean()), "stderr": 0.01}
            for kind, each in values.items()
        ]
        if "loss" in values:
            perplexity = float(np.exp(values["loss"].mean()))
            metrics[0] |= {"metric": "perplexity", "value": perplexity, "samples": WINDOWS}
        requests = [
            {"task": "true", "doc_id": number, "metric": kind, "value": value}
            for kind, each in values.items()
            for number, value in enumerate(each.tolist())
        ]
        with store.attempt(key) as attempt:
            for name, rows, schema in (
                ("metrics", metrics, METRICS_SCHEMA),
                ("requests", requests, REQUESTS_SCHEMA),
            ):
                empty = dict.fromkeys(schema.names)
                table = pa.Table.from_pylist([{**empty, **row} for row in rows], schema=schema)
                pq.write_table(table, attempt.folder / f"{name}.parquet")
            attempt.commit(
                kind="evaluate",
                spec=spec.lineage,
                report={},
                seconds=1.0,
                peak_memory_bytes=None,
                versions={},
                host="here",
            )


def quality(cell: Any) -> float:
    """Wanda with the model's own text is best, magnitude worst."""
    if cell.pruner is None:
        return 0.5
    if cell.pruner.name == "magnitude":
        return 2.0
    return {"true": 1.2, "own": 1.0}[cell.calibration] + 0.02 * cell.seed


@pytest.fixture
def small(content: Content) -> Content:
    del content["evaluate"]["tasks"], content["evaluate"]["task_folder"]
    return content


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def plan(small: Content, load: Callable[[Content], Grid]) -> Plan:
    return make_plan(load(small))


def test_the_planted_best_is_found_and_its_best_seed(plan: Plan, store: Store) -> None:
    plant(plan, store, quality)
    found = best_cell(plan, store, None, "0.5")
    assert (found.cell.calibration, found.cell.seed, found.metric) == ("own", 0, "kl")
    assert [each.name.split()[0] for each in found.standings] == ["wanda", "wanda", "magnitude"]
    assert found.seeds == 1  # magnitude has no seeds, so they do not pair
    (key,) = (key for key, cell in plan.cells.items() if cell == found.cell)
    spec = plan.specs[key]
    assert isinstance(spec, EvaluateSpec)
    assert isinstance(spec.model, PruneSpec)
    assert spec.model.key == found.prune_key
    assert "each other one is shown to be worse" in found.reason


def test_seeds_count_where_all_candidates_have_them(
    small: Content, load: Callable[[Content], Grid], store: Store
) -> None:
    small["cells"]["pruner"] = "wanda"
    plan = make_plan(load(small))
    plant(plan, store, lambda cell: 1.0 + (0.3 * cell.seed if cell.pruner else 0.0))
    found = best_cell(plan, store, None, "2:4")
    assert found.seeds == 2
    assert "not told apart (95 %, over windows and 2 seeds)" in found.reason


@pytest.mark.parametrize(("kind", "best"), [("loss", "wanda own"), ("acc", "magnitude")])
def test_the_loss_decides_where_there_is_no_divergence_and_answers_where_no_text(
    plan: Plan, store: Store, kind: str, best: str
) -> None:
    """A high level is a bad loss, and many right answers."""
    plant(plan, store, quality, (kind,))
    found = best_cell(plan, store, "testbed", "0.5")
    assert found.metric == kind
    assert found.standings[0].name.startswith(best)


def test_questions_that_all_answer_alike_decide_nothing(plan: Plan, store: Store) -> None:
    plant(plan, store, lambda cell: 100.0, ("acc",))
    with pytest.raises(InputError, match="all cells have the same number on every text and task"):
        best_cell(plan, store, None, "0.5")


def test_what_cannot_be_chosen_is_refused(plan: Plan, store: Store) -> None:
    with pytest.raises(InputError, match=r"sparsity: None: the grid has 50%, 2:4: name one of"):
        best_cell(plan, store, None, None)
    with pytest.raises(InputError, match=r"sparsity: '0.7': the grid has"):
        best_cell(plan, store, None, "0.7")
    with pytest.raises(InputError, match=r"model: 'other': the grid has testbed"):
        best_cell(plan, store, "other", "0.5")
    with pytest.raises(InputError, match=r"of 5 cells at 50% have not run: run it first"):
        best_cell(plan, store, None, "0.5")


def test_models_of_fewer_bits_are_not_compared_with_those_of_more(
    small: Content, load: Callable[[Content], Grid], store: Store
) -> None:
    several = [{"name": "rtn", "bits": bits} for bits in (3, 8)]
    small["cells"] |= {"pruner": several, "sparsity": 0}
    plan = make_plan(load(small))
    plant(plan, store, lambda cell: 1.0 if cell.pruner is None else 1 + 1 / cell.pruner.bits)
    with pytest.raises(InputError, match=r"sparsity: '0': the grid has 3 bit, 8 bit: name one of"):
        best_cell(plan, store, None, "0")
    assert best_cell(plan, store, None, "3 bit").target == "3 bit"


def test_a_failed_candidate_is_out_and_named(plan: Plan, store: Store) -> None:
    broken = [
        key for key, cell in plan.cells.items() if cell.calibration == "own" and cell.seed == 1
    ]
    plant(plan, store, quality)
    for key in broken:
        store.discard(key)
    with pytest.raises(InputError, match=r"1 of 5 cells at 50% have not run"):
        best_cell(plan, store, None, "0.5")
    part = {key: cell for key, cell in plan.cells.items() if key in broken}
    plant(dataclasses.replace(plan, cells=part), store, lambda cell: math.nan)
    found = best_cell(plan, store, None, "0.5")
    assert found.cell.calibration == "true"
    assert [name.split()[-1] for name in found.failed] == ["own"]
    assert "Without a result: wanda own" in found.reason


def test_the_command_prints_the_choice_for_programs(
    plan: Plan, store: Store, small: Content, tmp_path: Path
) -> None:
    plant(plan, store, quality)
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(small))
    words = ["best", str(path), "--store", store.url, "--sparsity", "0.5", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["candidates"][0]["name"].startswith("wanda own")
    assert answer["prune_key"].startswith("prune-")


# ------------------------------------------------------------------------------- before and after


def test_a_pruned_model_stands_beside_its_dense_one(plan: Plan, store: Store) -> None:
    plant(plan, store, quality)
    table = gather(plan, store)
    key = best_cell(plan, store, None, "0.5").prune_key
    measured = before_after(table, key)
    assert [each.metric for each in measured] == ["perplexity", "kl"]
    perplexity, kl = measured
    assert kl.dense is None
    assert kl.ratio is None
    assert perplexity.ratio is not None
    assert perplexity.dense is not None
    assert perplexity.ratio == pytest.approx(perplexity.pruned / perplexity.dense)
    write_table(table, plan.grid.name, store)
    assert measured_in(store, key) == measured
    assert measured_in(store, "prune-0") == []


def test_a_card_says_what_is_lost(plan: Plan, store: Store) -> None:
    plant(plan, store, quality)
    table = gather(plan, store)
    spec = next(spec for spec in plan.specs.values() if isinstance(spec, PruneSpec))
    measured = before_after(table, spec.key)
    (sentence,) = losses(measured)
    assert measured[0].ratio is not None
    assert f"{measured[0].ratio:.2f} times" in sentence
    assert ("of little use" in sentence) == (measured[0].ratio > 2)
    with store.attempt(spec.key) as attempt:
        attempt.commit(
            kind="prune",
            spec=spec.lineage,
            report={"sparsity": 0.5},
            seconds=1.0,
            peak_memory_bytes=None,
            versions={"torch": "1"},
            host="here",
        )
    manifest = store.manifest(spec.key)
    assert manifest is not None
    card = model_card(manifest, spec, measured)
    assert "50.00% of the weights are zero" in card
    assert f"- {sentence}." in card
    assert spec.key in card
    assert "Nothing was measured" in model_card(manifest, spec, [])


def test_a_card_says_that_weights_were_fitted_and_to_what(plan: Plan, store: Store) -> None:
    plant(plan, store, quality)
    pruned = [
        each.model
        for each in plan.specs.values()
        if isinstance(each, EvaluateSpec) and isinstance(each.model, PruneSpec)
    ]
    manifest = store.manifest(next(iter(plan.cells)))
    assert manifest is not None
    described = manifest.model_copy(update={"report": {"sparsity": 0.5}})
    spec = next(each for each in pruned if each.calibration is not None)
    assert spec.calibration is not None
    text = f"{spec.calibration.nsamples} windows of real text."
    for other, words in ((None, "the same windows."), (spec.calibration, text)):
        fitted = Reconstruction(calibration=other)
        card = model_card(described, spec.model_copy(update={"reconstruction": fitted}), [])
        assert f"by {spec.pruner.name}, kept weights fitted" in card
        assert f"then fitted to its dense outputs on {words}" in card
    assert "fitted" not in model_card(described, spec, [])


@pytest.mark.parametrize(
    ("pruner", "words"),
    [
        (GPTQ(), "the weights of 128 adjacent inputs have at most 16 values. "),
        (AWQ(bits=3), "at most 8 values while each input was scaled, and then scaled back. "),
    ],
)
def test_a_card_says_what_rounding_left(
    plan: Plan, store: Store, pruner: GPTQ | AWQ, words: str
) -> None:
    plant(plan, store, quality)
    pruned = next(
        each.model
        for each in plan.specs.values()
        if isinstance(each, EvaluateSpec)
        and isinstance(each.model, PruneSpec)
        and each.model.calibration is not None
    )
    manifest = store.manifest(next(iter(plan.cells)))
    assert manifest is not None
    spec = pruned.model_copy(update={"pruner": pruner, "sparsity": 0.0, "pattern": None})
    described = manifest.model_copy(update={"report": {"sparsity": 0.0}})
    card = model_card(described, spec, [])
    assert words in card
    assert f"rounded to {pruner.bits} bits by {pruner.name}" in card
    assert "only a program that makes use of few bits is quicker" in card
    assert "which vLLM reads" in model_card(described, spec, [], packed=True)
