"""What a notebook calls, on planted results."""

from collections.abc import Callable
from typing import Any

import pytest

from cluster.store import Store
from jobs import library
from jobs.grid import CorpusCalibration, Evaluation, Grid
from jobs.plan import make_plan
from jobs.suites import CorpusPerplexity
from jobs.watch import _redraws
from pipeline.data.presets import CORPUS_PRESETS
from pipeline.errors import InputError
from pipeline.specs import Wanda
from pipeline.testbed.presets import PRETRAIN_PRESETS
from tests.jobs.test_best import plant, quality

Content = dict[str, Any]


@pytest.fixture
def objects() -> Content:
    return {
        "name": "objects",
        "models": {"testbed": PRETRAIN_PRESETS["tiny"]},
        "corpora": {
            "true": CORPUS_PRESETS["testbed-pretraining"],
            "own": CORPUS_PRESETS["testbed-mismatched"],
        },
        "calibrations": {name: CorpusCalibration(corpus=name) for name in ("true", "own")},
        "cells": {
            "model": "testbed",
            "calibration": ["true", "own"],
            "pruner": Wanda(),
            "sparsity": 0.5,
            "seed": 0,
            "nsamples": 8,
            "seqlen": 64,
        },
        "evaluate": Evaluation(perplexity=(CorpusPerplexity(corpus="true", seqlen=64),)),
    }


def test_objects_make_the_same_grid_as_a_file(
    objects: Content, load: Callable[[Content], Grid]
) -> None:
    in_words = {
        **objects,
        "models": {"testbed": "testbed-tiny"},
        "corpora": {"true": "testbed-pretraining", "own": "testbed-mismatched"},
        "calibrations": {name: {"corpus": name} for name in ("true", "own")},
        "evaluate": {"perplexity": [{"corpus": "true", "seqlen": 64}]},
    }
    in_words["cells"] = {**objects["cells"], "pruner": "wanda"}
    assert make_plan(library.read(objects)).targets == make_plan(load(in_words)).targets


def test_a_run_returns_its_results_and_the_best_cell(objects: Content, tmp_path: Any) -> None:
    grid = library.read(objects)
    store = Store(str(tmp_path / "store"))
    plan = make_plan(grid)
    plant(plan, store, quality)
    table = library.run(grid, store.url)  # all is there, so no Ray starts
    assert set(table["calibration"]) == {"none", "true", "own"}
    assert len(store.names("results", ".parquet")) == 1
    found = library.best(grid, store.url)
    assert found.cell.calibration == "own"
    assert found.prune_key in set(table["prune_key"])
    assert len(library.results(grid, store.url)) == len(table)


def test_a_mistake_in_a_mapping_is_named(objects: Content) -> None:
    objects["cells"]["seqlen"] = 4
    with pytest.raises(InputError, match=r"cells\.seqlen: 4: must be at least 8"):
        make_plan(library.read(objects))


def test_a_notebook_without_widgets_gets_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    class Console:
        is_jupyter = True

    monkeypatch.setattr("jobs.watch.find_spec", lambda name: None)
    assert not _redraws(Console())  # type: ignore[arg-type]
    monkeypatch.setattr("jobs.watch.find_spec", lambda name: object())
    assert _redraws(Console())  # type: ignore[arg-type]
