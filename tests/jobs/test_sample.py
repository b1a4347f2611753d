"""The models of a grid that continue a prompt."""

import math
from typing import Any

import pyarrow as pa

from jobs.sample import best_cells


def row(key: str, pruner: str, value: float, **further: Any) -> dict[str, Any]:
    fields = {
        "evaluate_key": key,
        "model": "small",
        "pruner": pruner,
        "calibration": "none" if pruner in ("dense", "magnitude") else "prose",
        "sparsity": 0.0 if pruner == "dense" else 0.5,
        "pattern": None if pruner == "dense" else "unstructured",
        "seed": None if pruner in ("dense", "magnitude") else 1,
        "task": "text",
        "metric": "bits_per_byte",
        "value": value,
    }
    return {**fields, **further}


def test_the_dense_model_and_the_best_of_each_pruner_are_named() -> None:
    rows = [
        row("d", "dense", 1.0),
        row("m", "magnitude", 3.0, pattern="2:4"),
        row("w1", "wanda", 1.2),
        row("w1", "wanda", 1.9, task="other"),
        row("w2", "wanda", 1.4, calibration="code", seed=0),
        row("w2", "wanda", 1.5, calibration="code", seed=0, task="other"),
        row("w3", "wanda", math.nan, calibration="broken"),
    ]
    assert best_cells(pa.Table.from_pylist(rows)) == {
        "dense": "d",
        "magnitude 2:4": "m",
        "wanda 50% code seed 0": "w2",
    }


def test_the_model_is_named_if_there_are_several() -> None:
    rows = [row("a", "dense", 1.0), row("b", "dense", 2.0, model="large")]
    assert best_cells(pa.Table.from_pylist(rows)) == {"small dense": "a", "large dense": "b"}


def test_perplexity_decides_if_there_are_no_bits_per_byte() -> None:
    rows = [
        row("w1", "wanda", 9.0, metric="perplexity"),
        row("w2", "wanda", 8.0, metric="perplexity", calibration="code"),
        row("w3", "wanda", 0.1, metric="acc", calibration="questions"),
    ]
    assert list(best_cells(pa.Table.from_pylist(rows)).values()) == ["w2"]
    assert best_cells(pa.Table.from_pylist(rows[2:])) == {}
