"""Gather the results of a grid's cells in one tidy table: a row for each cell, task and metric."""

import functools
import io
import json
import math
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from cluster.graph import descendants, readers
from cluster.store import CorruptArtifactError, Failure, Manifest, Store
from jobs.averages import average_rows
from jobs.cells import Cell, cell_name
from jobs.flips import flip_rows, has_answers, read_answers
from jobs.plan import Plan
from pipeline.evaluation.schemas import METRICS_SCHEMA
from pipeline.specs import (
    EvaluateSpec,
    FilterSpec,
    GenerateSpec,
    PruneSpec,
    ShardedSpec,
    Spec,
    bits_of,
    canonical_json,
)

CELL_COLUMNS: dict[str, pa.DataType] = {
    "grid": pa.string(),
    "cell": pa.string(),
    "status": pa.string(),
    "error": pa.string(),
    "model": pa.string(),
    "calibration": pa.string(),
    "pruner": pa.string(),
    "pruner_options": pa.string(),
    "allocation": pa.string(),
    "allocation_options": pa.string(),
    "reconstruction": pa.string(),
    "sparsity": pa.float64(),
    "pattern": pa.string(),
    "bits": pa.int64(),
    "seed": pa.int64(),
    "nsamples": pa.int64(),
    "seqlen": pa.int64(),
    "prefix_tokens": pa.int64(),
    "drop_fraction": pa.float64(),
    "drop_by": pa.string(),
    "within": pa.string(),
    "num_samples": pa.int64(),
    "temperature": pa.float64(),
    "measured_sparsity": pa.float64(),
}
"""The cell and its status. These and the metrics depend on the specs alone."""

RUN_COLUMNS: dict[str, pa.DataType] = {
    "traceback": pa.string(),
    "seconds_generate": pa.float64(),
    "seconds_score": pa.float64(),
    "seconds_prune": pa.float64(),
    "seconds_evaluate": pa.float64(),
    "peak_memory_bytes": pa.int64(),
    "note": pa.string(),
    "versions": pa.string(),
    "host": pa.string(),
    "prune_key": pa.string(),
    "prune_report": pa.string(),
    "calibration_report": pa.string(),
    "calibration_tokens": pa.int64(),
    "calibration_overlap": pa.float64(),
    "evaluate_key": pa.string(),
    "bytes_dense": pa.int64(),
    "bytes_masks": pa.int64(),
    "bytes_compressed": pa.int64(),
    "speed_2_4": pa.string(),
    "lineage": pa.string(),
}
"""How the result was made; it differs from run to run."""

METRIC_COLUMNS = dict(zip(METRICS_SCHEMA.names, METRICS_SCHEMA.types, strict=True))

RESULT_COLUMNS = {**CELL_COLUMNS, **METRIC_COLUMNS, **RUN_COLUMNS}


def gather(plan: Plan, store: Store) -> pa.Table:
    """Return the results table of a grid, as far as the store has results.

    A failed cell is one row with `status = failed` and the error. So is a cell with a NaN or
    infinite number. A cell that has not run is one row with `status = missing`.
    """
    reasons = _reasons(plan, store)
    cells = {
        key: _rows(plan, store, key, cell, reasons.get(key)) for key, cell in plan.cells.items()
    }
    dense = {cell.model: key for key, cell in plan.cells.items() if cell.pruner is None}
    answered = functools.cache(lambda key: read_answers(store.fetch(key)))
    rows = []
    for key, cell in plan.cells.items():
        own, reference = _measured(cells[key]), dense.get(cell.model)
        of_dense = [] if reference is None else _measured(cells[reference])
        rows += cells[key]
        for further in average_rows(plan.grid.evaluate.suites, own, of_dense):
            rows.append({**cells[key][0], **dict.fromkeys(METRIC_COLUMNS), **further})
        if of_dense and key != reference and has_answers(own):
            rows += flip_rows(own, answered(key), answered(reference))
    schema = pa.schema(list(RESULT_COLUMNS.items()))
    return pa.Table.from_pylist(rows, schema=schema)


def _measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("metric") is not None]


def write_table(table: pa.Table, grid: str, store: Store) -> str:
    """Write `results/<grid>.parquet`, and a CSV of the columns that the specs determine, which two
    runs of one grid write with the same bytes.

    Returns:
        The Parquet file's path.
    """
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table.select([*CELL_COLUMNS, *METRIC_COLUMNS]), buffer)
    store.write(f"results/{grid}.csv", buffer.getvalue())
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return store.write(f"results/{grid}.parquet", buffer.getvalue())


def _rows(
    plan: Plan, store: Store, key: str, cell: Cell, failure: Failure | None
) -> list[dict[str, Any]]:
    spec = plan.specs[key]
    assert isinstance(spec, EvaluateSpec)
    pruned = spec.model if isinstance(spec.model, PruneSpec) else None
    row = {
        **cell_fields(plan.grid.name, cell),
        "note": plan.grid.note,
        "evaluate_key": key,
        "prune_key": None if pruned is None else pruned.key,
        "lineage": canonical_json(spec.lineage).decode(),
    }
    try:
        evaluation = store.manifest(key)
        metrics = [] if evaluation is None else _metrics(store, key)
    except CorruptArtifactError as error:
        return [{**row, "status": "failed", "error": str(error), "traceback": str(error)}]
    if evaluation is None:
        if failure is None:
            return [{**row, "status": "missing"}]
        cause = {"error": f"{failure.kind}: {failure.error}", "traceback": failure.traceback}
        return [{**row, "status": "failed", **cause}]
    row |= _run_fields(evaluation, None if pruned is None else store.manifest(pruned.key))
    row |= _calibration_fields(plan, store, key, pruned)
    broken = next((metric for metric in metrics if not _is_finite(metric)), None)
    if broken is not None:
        value, stderr = broken["value"], broken.get("stderr")
        reason = f"{broken['task']} {broken['metric']} is {value} ± {stderr}: no result"
        return [{**row, "status": "failed", "error": reason}]
    return [{**row, **metric} for metric in metrics]


def cell_fields(grid: str, cell: Cell) -> dict[str, Any]:
    """Return the columns of the results that name a cell."""
    fields = cell.model_dump(exclude={"pruner", "allocation", "reconstruction"})
    pruner, allocation, fitted = cell.pruner, cell.allocation, cell.reconstruction
    dense = pruner is None
    return {
        **fields,
        "grid": grid,
        "cell": cell_name(cell),
        "status": "ok",
        "pruner": "dense" if pruner is None else pruner.name,
        "pruner_options": _options(pruner),
        "allocation": None if allocation is None else allocation.name,
        "allocation_options": _options(allocation),
        "reconstruction": None if fitted is None else _options(fitted),
        "pattern": None if dense else cell.pattern or "unstructured",
        "bits": bits_of(pruner),
    }


def _options(chosen: Spec | None) -> str:
    """Return the options that differ from their defaults, as JSON."""
    options = {} if chosen is None else chosen.model_dump(exclude={"name"}, exclude_defaults=True)
    return json.dumps(options, sort_keys=True)


def _run_fields(evaluation: Manifest, pruning: Manifest | None) -> dict[str, Any]:
    stages = [evaluation] if pruning is None else [evaluation, pruning]
    peaks = [stage.peak_memory_bytes for stage in stages if stage.peak_memory_bytes is not None]
    fields = {
        "seconds_evaluate": evaluation.seconds,
        "peak_memory_bytes": max(peaks, default=None),
        "versions": json.dumps(evaluation.versions, sort_keys=True),
        "host": evaluation.host,
        "speed_2_4": evaluation.report.get("speed_2_4"),
        **{f"bytes_{form}": taken for form, taken in evaluation.report.get("bytes", {}).items()},
    }
    if pruning is None:
        return {**fields, "measured_sparsity": 0.0}
    return {
        **fields,
        "seconds_prune": pruning.seconds,
        "measured_sparsity": pruning.report.get("sparsity"),
        "prune_report": json.dumps(pruning.report, sort_keys=True),
    }


def _calibration_fields(
    plan: Plan, store: Store, key: str, pruned: PruneSpec | None
) -> dict[str, Any]:
    """Return the cost of the calibration set, and its description if the grid asks for one.

    The seconds are summed over all shards, on any number of devices.
    """
    calibration = None if pruned is None else pruned.calibration
    if calibration is None:
        return {}
    fields: dict[str, Any] = {"seconds_generate": 0.0, "seconds_score": 0.0}
    stages: list[ShardedSpec] = []
    if isinstance(calibration.source, FilterSpec):
        scores = calibration.source.scores
        if isinstance(scores.samples, GenerateSpec):
            stages.append(scores.samples)
        if calibration.source.reads_scores:
            stages.append(scores)
    for stage in stages:
        shards = [store.manifest(shard.key) for shard in stage.shards()]
        known = [shard.seconds for shard in shards if shard is not None]
        fields[f"seconds_{stage.kind}"] = sum(known) if len(known) == len(shards) else None
    windows = store.manifest(calibration.key)
    if windows is not None:
        fields["calibration_tokens"] = windows.report.get("distinct_tokens")
        fields["calibration_overlap"] = windows.report.get("overlap")
    described = plan.descriptions.get(key)
    description = None if described is None else store.manifest(described)
    if description is not None:
        fields["calibration_report"] = json.dumps(description.report, sort_keys=True)
    return fields


def _metrics(store: Store, key: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(store.fetch(key) / "metrics.parquet").to_pylist()
    return rows


def _is_finite(metric: dict[str, Any]) -> bool:
    """Return whether a number and its standard error, if any, are finite."""
    value, stderr = metric["value"], metric.get("stderr")
    return value is not None and math.isfinite(value) and (stderr is None or math.isfinite(stderr))


def _reasons(plan: Plan, store: Store) -> dict[str, Failure]:
    """Return the first failure that keeps each stage from its artifact, by key."""
    failed = (store.names("failures") & plan.graph.keys()) - store.keys()
    read_by = readers(plan.graph) if failed else {}
    reasons: dict[str, Failure] = {}
    for key in plan.graph:
        failure = store.failure(key) if key in failed else None
        if failure is not None:
            for name in (key, *descendants(read_by, key)):
                reasons.setdefault(name, failure)
    return reasons
