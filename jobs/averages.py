"""A suite's averages of a cell's metrics, and their retention against the dense model."""

import math
from collections.abc import Iterable
from typing import Any

from jobs.suites import Suite, SuiteUse

_Row = dict[str, Any]

_SHARED = ("lm_eval", "dtype", "tokenizer", "chat_template")
"""Columns that are equal in all rows of an evaluation."""


def average_rows(uses: Iterable[SuiteUse], measured: list[_Row], dense: list[_Row]) -> list[_Row]:
    """Return the suites' rows of one cell, with task `<suite>-<average>`.

    Args:
        measured: the cell's rows, one per task and metric.
        dense: those of the dense model; empty until it is evaluated.
    """
    rows: list[_Row] = []
    for use in uses:
        for name, members in use.suite.averages.items():
            own = _average(use.suite, members, measured)
            if own is None:
                continue
            row = {"task": f"{use.name}-{name}", **own}
            rows.append({**row, "metric": "acc_average"})
            reference = _average(use.suite, members, dense)
            if use.suite.retention and reference is not None and reference["value"] > 0:
                share = row["value"] / reference["value"]
                rows.append({**row, "metric": "retention", "value": share, "stderr": None})
    return rows


def _average(suite: Suite, members: Iterable[str], measured: list[_Row]) -> _Row | None:
    """Return the unweighted mean of each task's metric, or None if one is missing.

    The standard error assumes that tasks' questions are independent. The limit is the smallest of
    the tasks'.
    """
    numbers = {(row["task"], row["metric"]): row for row in measured}
    chosen = [numbers.get((member, suite.metric(member))) for member in members]
    rows = [row for row in chosen if row is not None]
    if len(rows) < len(chosen):
        return None
    errors = [row["stderr"] for row in rows]
    limits = [row["limit"] for row in rows if row["limit"] is not None]
    return {
        "value": math.fsum(row["value"] for row in rows) / len(rows),
        "stderr": None if None in errors else math.hypot(*errors) / len(rows),
        "samples": sum(row["samples"] or 0 for row in rows),
        "limit": min(limits, default=None),
        **{column: rows[0][column] for column in _SHARED},
    }
