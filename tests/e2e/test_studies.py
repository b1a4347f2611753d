"""Small versions of three studies, from grid file to finding, as a user starts them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from analysis.studies import STUDIES
from tests.e2e.conftest import Finished, begin, calprune, environment

SMALLER: dict[str, dict[str, Any]] = {
    "similarity": {"calibration": ["unseen-0", "unseen-50", "unseen-100"], "sparsity": 0.6},
    "sparsity": {"sparsity": [0.5, 0.7]},
    "predictor": {
        "calibration": ["pretraining", "facts", "code", "recipes", "arithmetic", "self-generated"],
        "sparsity": 0.6,
    },
}


@pytest.fixture(scope="module")
def store(finished: tuple[Path, Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which small versions of three studies have run."""
    folder = tmp_path_factory.mktemp("studies")
    begin(finished[0], folder / "store")
    for name, axes in SMALLER.items():
        content = yaml.safe_load(STUDIES[name].grid_file.read_text())
        content |= {"models": {"testbed": "testbed-tiny"}, "resources": {}}
        content["cells"] |= {"pruner": "wanda", "seed": [0, 1], "nsamples": 8, "seqlen": 64, **axes}
        content["evaluate"]["perplexity"][0] |= {"seqlen": 64, "max_windows": 16}
        for calibration in content["calibrations"].values():
            if "prefixes" in calibration:
                calibration |= {"num_samples": 16, "shard_size": 16}
        grid = folder / f"{name}.yaml"
        grid.write_text(yaml.safe_dump(content))
        run = calprune("run", grid, "--store", folder / "store")
        assert run.returncode == 0, run.stdout + run.stderr
    return folder / "store"


def test_findings_of_small_studies_are_told_and_drawn(store: Path) -> None:
    command = [sys.executable, "-m", "analysis", "study", "all", "--store", str(store)]
    told = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert told.returncode == 1  # seven others have not run
    assert told.stdout.count("make its results with `python -m jobs run") == 7
    for name in SMALLER:
        assert f"figure: {store}/studies/{name}.svg" in told.stdout
        assert (store / "studies" / f"{name}.svg").read_bytes().startswith(b"<?xml")
        numbers = pd.read_csv(store / "studies" / f"{name}.csv")
        assert numbers.select_dtypes("number").notna().to_numpy().any()


def test_candidates_are_ranked_from_what_the_predictor_study_left(store: Path) -> None:
    told = calprune("recommend", store.parent / "predictor.yaml", "--store", store)
    assert told.returncode == 0, told.stderr
    assert "record: 6 sources of grid predictor" in told.stdout
    assert "probability of being best" in told.stdout
    for calibration in SMALLER["predictor"]["calibration"]:
        assert calibration in told.stdout
