"""Small versions of two studies, from grid file to finding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.studies import STUDIES
from cluster.store import Store
from jobs.check import check_plan
from jobs.declared import record_design
from jobs.gather import gather, write_table
from jobs.grid import load_grid
from jobs.plan import make_plan
from tests.e2e.conftest import Finished, begin
from tests.made import make_here

SMALLER: dict[str, dict[str, Any]] = {
    "generator": {"seed": 0},
    "predictor": {
        "calibration": ["pretraining", "facts", "code", "recipes", "arithmetic", "self-generated"],
        "sparsity": 0.6,
    },
}


@pytest.fixture(scope="module")
def store(finished: tuple[Path, Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which small versions of the studies have run."""
    folder = tmp_path_factory.mktemp("studies")
    store = Store(str(begin(finished[0], folder / "store")))
    plans = [make_plan(load_grid(smaller(name, folder))) for name in SMALLER]
    graph = {key: stage for plan in plans for key, stage in plan.graph.items()}
    targets = list(dict.fromkeys(key for plan in plans for key in plan.targets))
    for plan in plans:
        check_plan(plan)
        record_design(plan, store)
    make_here(graph, targets, store)
    for plan in plans:
        write_table(gather(plan, store), plan.grid.name, store)
    return folder / "store"


def smaller(name: str, folder: Path) -> Path:
    content = yaml.safe_load(STUDIES[name].grid_file.read_text())
    content |= {"models": {"testbed": "testbed-tiny"}, "resources": {}}
    content["cells"] |= {"pruner": "wanda", "seed": [0, 1], "nsamples": 8, "seqlen": 64}
    content["cells"] |= SMALLER[name]
    for entry in content["evaluate"]["perplexity"]:
        entry |= {"seqlen": 64, "max_windows": 16}
    for calibration in content["calibrations"].values():
        if "prefixes" in calibration:
            calibration |= {"num_samples": 16, "shard_size": 16}
    grid = folder / f"{name}.yaml"
    grid.write_text(yaml.safe_dump(content))
    return grid


def test_findings_of_small_studies_are_told_and_drawn(store: Path) -> None:
    done = CliRunner().invoke(app, ["study", "all", "--store", str(store)])
    assert done.exit_code == 1  # the others have not run
    others = len(STUDIES) - len(SMALLER)
    assert done.stdout.count("make its results with `python -m jobs run") == others
    for name in SMALLER:
        assert f"figure: {store}/studies/{name}.svg" in done.stdout
        assert (store / "studies" / f"{name}.svg").read_bytes().startswith(b"<?xml")
        numbers = pd.read_csv(store / "studies" / f"{name}.csv")
        assert numbers.select_dtypes("number").notna().to_numpy().any()


def test_candidates_are_ranked_from_what_the_predictor_study_left(
    store: Path, calprune_inside: Callable[..., Finished]
) -> None:
    done = calprune_inside("recommend", store.parent / "predictor.yaml", "--store", store)
    assert done.returncode == 0, done.stderr
    assert "record: 6 sources of grid predictor" in done.stdout
    for calibration in SMALLER["predictor"]["calibration"]:
        assert calibration in done.stdout
