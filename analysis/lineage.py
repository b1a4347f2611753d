"""Where each cell's numbers come from, as one small document that a page can carry.

The specs of all stages before an evaluation are nested in its own, and cells share most of them. So
each spec is held once, under a number, and stands elsewhere as `{"$spec": number}`.
"""

import json
from typing import Any

import pandas as pd

from analysis.metrics import value_text

REFERENCE = "$spec"


def lineage_document(table: pd.DataFrame) -> dict[str, Any]:
    """`cells`, by their hashes, and the `specs` that they are made by.

    A cell has its names, `status`, `error` if it has one, the artifacts' `keys`, `seconds`, `host`,
    its `numbers` as text, and the number of its evaluation's spec, null where the table has none.
    """
    specs: list[Any] = []
    known: dict[str, int] = {}
    cells = {}
    for cell, rows in table.groupby("cell", sort=False, observed=True):
        first = {name: value for name, value in rows.iloc[0].items() if not _is_null(value)}
        spec = first.get("lineage")
        cells[str(cell)] = {
            **{name: str(first[name]) for name in NAMES if name in first},
            "keys": {name: first[name] for name in ("evaluate_key", "prune_key") if name in first},
            "seconds": {
                stage: round(float(first[f"seconds_{stage}"]), 1)
                for stage in ("prune", "evaluate")
                if f"seconds_{stage}" in first
            },
            "numbers": {
                f"{task}: {metric}": value_text(value, metric)
                for task, metric, value in zip(
                    rows["task"], rows["metric"], rows["value"], strict=True
                )
                if not _is_null(value)
            },
            "spec": None if spec is None else _interned(json.loads(spec), specs, known),
        }
    return {"cells": cells, "specs": specs}


NAMES = ("status", "model", "method", "target", "source", "seed", "error", "host")


def _interned(spec: dict[str, Any], specs: list[Any], known: dict[str, int]) -> int:
    """The number of a spec, whose own specs are references."""
    held = {name: _held(value, specs, known) for name, value in spec.items()}
    text = json.dumps(held, sort_keys=True)
    if text not in known:
        known[text] = len(specs)
        specs.append(held)
    return known[text]


def _held(value: Any, specs: list[Any], known: dict[str, int]) -> Any:
    if isinstance(value, dict) and "kind" in value:
        return {REFERENCE: _interned(value, specs, known)}
    if isinstance(value, dict):
        return {name: _held(each, specs, known) for name, each in value.items()}
    if isinstance(value, list):
        return [_held(each, specs, known) for each in value]
    return value


def _is_null(value: Any) -> bool:
    return bool(pd.isna(value))
