"""What a report shows of each cell: its numbers, artifacts, costs and origin, as one document.

An evaluation's spec nests the specs of all stages before it, and cells share most of them. So the
document holds each spec once, under a number, and refers to it as `{"$spec": number}`.
"""

import json
from collections.abc import Hashable
from typing import Any

import pandas as pd

from analysis.labels import DENSE
from analysis.metrics import short_heading, value_text

_REFERENCE = "$spec"

_NAMES = ("status", "model", "method", "target", "source", "seed", "host", "prune_key")

_MEASURED = ("measured_sparsity", "peak_memory_bytes", "bytes_dense", "bytes_compressed")

_STAGES = ("generate", "score", "prune", "evaluate")


def cell_pages(table: pd.DataFrame) -> dict[str, Any]:
    """Return `cells` in the table's order, and what several of them share.

    A cell has its `id`, its names, `seconds` by stage, what was `measured` of its model, any
    `error` and the number of its traceback in `tracebacks`, its `numbers` as
    `[number in metrics, value, standard error or null]`, and the number of its evaluation's spec
    in `specs`. `dense` has the number of each model's dense cell.
    """
    metrics: dict[tuple[str, str], int] = {}
    tracebacks: dict[str, int] = {}
    specs: list[Any] = []
    known: dict[str, int] = {}
    by_lineage: dict[str, int] = {}
    cells: dict[str, dict[str, Any]] = {}
    dense: dict[str, int] = {}
    for row in table.drop_duplicates("cell").to_dict("records"):
        lineage = str(row["lineage"])
        if lineage not in by_lineage:
            by_lineage[lineage] = _interned(json.loads(lineage), specs, known)
        cell = _described(row) | {"spec": by_lineage[lineage]}
        if not pd.isna(row["error"]):
            cell["error"] = str(row["error"])
        if not pd.isna(row["traceback"]):
            cell["traceback"] = tracebacks.setdefault(str(row["traceback"]), len(tracebacks))
        if row["pruner"] == DENSE:
            dense.setdefault(str(row["model"]), len(cells))
        cells[str(row["cell"])] = cell
    columns = ["cell", "task", "metric", "value", "stderr"]
    rows = table.loc[table["value"].notna(), columns].itertuples(index=False, name=None)
    for cell_id, task, metric, value, stderr in rows:
        place = metrics.setdefault((task, metric), len(metrics))
        error = None if pd.isna(stderr) else value_text(stderr, metric)
        cells[str(cell_id)]["numbers"].append([place, value_text(value, metric), error])
    return {
        "cells": list(cells.values()),
        "metrics": [short_heading(task, metric) for task, metric in metrics],
        "dense": dense,
        "tracebacks": list(tracebacks),
        "specs": specs,
    }


def _described(row: dict[Hashable, Any]) -> dict[str, Any]:
    held = {name: value for name, value in row.items() if not pd.isna(value)}
    return {
        "id": str(row["cell"]),
        **{name: str(held[name]) for name in _NAMES if name in held},
        "seconds": {
            stage: round(float(held[f"seconds_{stage}"]), 1)
            for stage in _STAGES
            if held.get(f"seconds_{stage}")
        },
        "measured": {name: float(f"{held[name]:.4g}") for name in _MEASURED if name in held},
        "numbers": [],
    }


def _interned(spec: dict[str, Any], specs: list[Any], known: dict[str, int]) -> int:
    """Add a spec, with references to its inner specs, unless it is there; return its number."""
    flat = {name: _flat(value, specs, known) for name, value in spec.items()}
    text = json.dumps(flat, sort_keys=True)
    if text not in known:
        known[text] = len(specs)
        specs.append(flat)
    return known[text]


def _flat(value: Any, specs: list[Any], known: dict[str, int]) -> Any:
    if isinstance(value, dict) and "kind" in value:
        return {_REFERENCE: _interned(value, specs, known)}
    if isinstance(value, dict):
        return {name: _flat(each, specs, known) for name, each in value.items()}
    if isinstance(value, list):
        return [_flat(each, specs, known) for each in value]
    return value
