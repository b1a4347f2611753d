"""The origin of each cell's numbers, as one small document for the page.

An evaluation's spec nests the specs of all stages before it, and cells share most of them. So the
document holds each spec once, under a number, and refers to it as `{"$spec": number}`.
"""

import json
from typing import Any

import pandas as pd

from analysis.metrics import value_text

_REFERENCE = "$spec"


def lineage_document(table: pd.DataFrame) -> dict[str, Any]:
    """Return `cells`, by their hashes, and the list of `specs` that they refer to.

    A cell has its names, `status`, any `error`, the artifacts' `keys`, `seconds`, `host`, its
    `numbers` as text, and the number of its evaluation's spec.
    """
    specs: list[Any] = []
    known: dict[str, int] = {}
    cells = {}
    for cell, rows in table.groupby("cell", sort=False, observed=True):
        first = {name: value for name, value in rows.iloc[0].items() if not _is_null(value)}
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
            "spec": _interned(json.loads(first["lineage"]), specs, known),
        }
    return {"cells": cells, "specs": specs}


NAMES = ("status", "model", "method", "target", "source", "seed", "error", "host")


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


def _is_null(value: Any) -> bool:
    return bool(pd.isna(value))
