"""Flips: questions that a pruned model answers right and the dense one wrong, or the reverse.

Two models of equal accuracy can differ in many answers; flips count them (arXiv 2407.09141).
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]

METRICS = ("acc", "exact_match")
"""Metrics that are 1 for a right answer and 0 for a wrong one; the first that a task has counts."""

Answers = Mapping[str, dict[tuple[int, str], float]]
"""By task, whether each question was answered right, by document and hash of what was asked."""


def has_answers(measured: Iterable[Row]) -> bool:
    """Return whether any row of a cell is about questions that are right or wrong."""
    return any(row["metric"].partition(",")[0] in METRICS for row in measured)


def read_answers(artifact: Path) -> Answers:
    """Read which questions an evaluation's model answered right."""
    columns = ["task", "doc_id", "metric", "value", "request_hash"]
    table: pa.Table = pq.read_table(artifact / "requests.parquet", columns=columns)
    found: dict[str, dict[str, dict[tuple[int, str], float]]] = {}
    for row in table.to_pylist():
        metric = row["metric"].partition(",")[0]
        if metric in METRICS and row["value"] in (0.0, 1.0):
            answers = found.setdefault(row["task"], {}).setdefault(metric, {})
            answers[row["doc_id"], row["request_hash"]] = row["value"]
    return {
        task: next(answers[metric] for metric in METRICS if metric in answers)
        for task, answers in found.items()
    }


def flip_rows(measured: Iterable[Row], own: Answers, dense: Answers) -> list[Row]:
    """Return a row with the metric `flips` for each task that both models were asked alike.

    A value is the share of questions; its standard error is that of a mean over questions.

    Args:
        measured: rows of the pruned model's cell, which say how each task was run.
    """
    by_task = {row["task"]: row for row in measured}
    rows = []
    for task, answers in own.items():
        if task not in by_task or answers.keys() != dense.get(task, {}).keys():
            continue
        count = len(answers)
        share = sum(answers[each] != dense[task][each] for each in answers) / count
        error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
        found = {"metric": "flips", "value": share, "stderr": error, "samples": count}
        rows.append({**by_task[task], **found})
    return rows
