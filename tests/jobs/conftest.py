"""A small grid as a mapping, which tests change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.grid import Grid, load_grid

Content = dict[str, Any]


@pytest.fixture
def content(tmp_path: Path) -> Content:
    notes = tmp_path / "notes.txt"
    notes.write_text("\n".join("a line of text, which is one document " * 20 for _ in range(90)))
    return {
        "name": "small",
        "models": {"testbed": "testbed-tiny"},
        "corpora": {
            "true": "testbed-pretraining",
            "other": {"preset": "testbed-mismatched", "split": "calibration"},
            "notes": {"kind": "file-corpus", "path": str(notes)},
        },
        "calibrations": {
            "true": {"corpus": "true"},
            "notes": {"corpus": "notes"},
            "own": {"prefixes": "other", "num_samples": 80, "drop_fraction": 0.2},
        },
        "cells": {
            "model": "testbed",
            "calibration": ["true", "own"],
            "pruner": ["magnitude", "wanda"],
            "sparsity": [0.5, "2:4"],
            "seed": [0, 1],
            "nsamples": 16,
            "seqlen": 64,
        },
        "evaluate": {
            "perplexity": [{"corpus": "true", "seqlen": 64, "max_windows": 8}],
            "tasks": ["testbed_facts"],
            "task_folder": {"kind": "testbed-tasks"},
        },
    }


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Content], Grid]:
    def load_content(content: Content) -> Grid:
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(content))
        return load_grid(path)

    return load_content
