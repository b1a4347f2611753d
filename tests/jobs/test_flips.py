"""Flips: answers that are right for one of two models only."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.flips import flip_rows, read_answers
from pipeline.evaluation.schemas import REQUESTS_SCHEMA


def answers(folder: Path, name: str, right: dict[str, list[int]], asked: str = "q") -> Any:
    """An evaluation's answers, by task; `acc_norm` has the reverse of each."""
    rows: list[dict[str, Any]] = []
    for task, values in right.items():
        for place, value in enumerate(values):
            each = {"task": task, "doc_id": place, "request_hash": f"{asked}{place}"}
            rows.append({**each, "metric": "acc_norm,none", "value": 1.0 - value})
            rows.append({**each, "metric": "acc,none", "value": float(value)})
    rows.append({"task": "text", "doc_id": 0, "metric": "loss", "value": 1.0})
    (folder / name).mkdir()
    table = pa.Table.from_pylist(rows, schema=REQUESTS_SCHEMA)
    pq.write_table(table, folder / name / "requests.parquet")
    return read_answers(folder / name)


def test_flips_count_changes_in_both_directions_that_cancel_in_the_accuracy(tmp_path: Path) -> None:
    dense = answers(tmp_path, "dense", {"facts": [1, 1, 0, 0, 1], "other": [1, 0]})
    own = answers(tmp_path, "own", {"facts": [0, 1, 1, 0, 1], "other": [1, 0]})
    measured = [
        {"task": "facts", "metric": "acc", "value": 0.6, "stderr": 0.2, "num_fewshot": 3},
        {"task": "other", "metric": "acc", "value": 0.5, "stderr": 0.5, "num_fewshot": 0},
    ]
    facts, other = flip_rows(measured, own, dense)
    assert (facts["task"], facts["metric"], facts["value"]) == ("facts", "flips", 2 / 5)
    # The standard error of the mean of 1, 0, 1, 0, 0.
    assert facts["stderr"] == pytest.approx((0.3 / 5) ** 0.5)
    assert (facts["samples"], facts["num_fewshot"]) == (5, 3)
    assert other["value"] == 0.0


def test_models_that_were_asked_differently_are_not_compared(tmp_path: Path) -> None:
    dense = answers(tmp_path, "dense", {"facts": [1, 0]}, asked="before")
    own = answers(tmp_path, "own", {"facts": [0, 1]}, asked="after")
    assert flip_rows([{"task": "facts"}], own, dense) == []
