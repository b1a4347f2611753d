"""Whole runs of a small grid from the command line, as a user starts them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

GRID = """
name: tiny
models: {testbed: testbed-tiny}
corpora:
  pretraining: testbed-pretraining
  mismatched: testbed-mismatched
  heldout: {preset: testbed-pretraining, split: evaluation}
calibrations:
  pretraining: {corpus: pretraining}
  self-generated: {prefixes: mismatched, num_samples: 48, shard_size: 16}
cells:
  model: testbed
  calibration: [pretraining, self-generated]
  pruner: [magnitude, wanda, sparsegpt]
  sparsity: [0.6, "2:4"]
  seed: 0
  nsamples: 16
  seqlen: 64
evaluate:
  perplexity: [{corpus: heldout, seqlen: 64, max_windows: 32}]
  tasks: [{name: testbed_facts, limit: 40}]
  task_folder: {kind: testbed-tasks}
"""

Finished = subprocess.CompletedProcess[str]


def calprune(*words: str | Path) -> Finished:
    """Run `python -m jobs` to its end."""
    return subprocess.run(command(*words), capture_output=True, text=True, env=environment())


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "jobs", *map(str, words)]


def environment() -> dict[str, str]:
    """As with the environment activated; without what would send a run to the Ray of another test,
    and with the token that a Ray head asks for once there is one on the machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "COLUMNS": "200", "RAY_AUTH_MODE": "token"}


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "tiny.yaml"
    path.write_text(GRID)
    return path


@pytest.fixture(scope="session")
def finished(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A store in which the grid has run, and what the run printed."""
    store = tmp_path_factory.mktemp("finished") / "store"
    return store, calprune("run", grid, "--store", store)


@pytest.fixture
def edited(grid: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """The grid with one piece of text replaced."""

    def edit(old: str, new: str) -> Path:
        text = grid.read_text()
        assert old in text
        path = tmp_path / "edited.yaml"
        path.write_text(text.replace(old, new))
        return path

    return edit
