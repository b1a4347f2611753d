"""The results table, from a store or from one Parquet file."""

import posixpath
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.labels import in_order, with_labels

ESSENTIAL: dict[str, str] = {
    "grid": "str",
    "cell": "str",
    "status": "str",
    "model": "str",
    "calibration": "str",
    "pruner": "str",
    "sparsity": "float64",
    "pattern": "str",
    "seed": "Int64",
    "task": "str",
    "metric": "str",
    "value": "float64",
}
"""Columns without which there is nothing to say, and their types."""

OPTIONAL: dict[str, str] = {
    "error": "str",
    "traceback": "category",
    "pruner_options": "str",
    "allocation": "str",
    "allocation_options": "str",
    "nsamples": "Int64",
    "seqlen": "Int64",
    "prefix_tokens": "Int64",
    "drop_fraction": "float64",
    "num_samples": "Int64",
    "temperature": "float64",
    "stderr": "float64",
    "samples": "Int64",
    "limit": "Int64",
    "num_fewshot": "Int64",
    "task_version": "str",
    "lm_eval": "str",
    "dtype": "str",
    "tokenizer": "str",
    "chat_template": "str",
    "measured_sparsity": "float64",
    "seconds_prune": "float64",
    "seconds_evaluate": "float64",
    "peak_memory_bytes": "Int64",
    "note": "category",
    "versions": "category",
    "host": "category",
    "evaluate_key": "str",
    "prune_key": "str",
    "prune_report": "category",
    "lineage": "category",
}
"""Columns that are null throughout where a table lacks them. Categories are long texts that many
rows share."""

NUMBER = ("task", "metric", "stderr", "samples")
"""What describes a number besides its value; null in the row of a cell that has none."""

SHARED = [column for column, dtype in OPTIONAL.items() if dtype == "category"]

INTEGERS = {pa.int64(): pd.Int64Dtype()}
"""Read as they are: by way of floats a null would be a number."""

STATUS = pd.CategoricalDtype(["ok", "failed", "missing"], ordered=True)

REMEDY = "write it with `python -m jobs run GRID` or `python -m jobs gather GRID`"


class TableError(ValueError):
    """A results table, or what is asked of it, is wrong; the message says what to do."""


def load_results(location: str | Path, grid: str | None = None) -> pd.DataFrame:
    """Read a results table: one row a cell, task and metric; failed cells are one row.

    A cell with a number that is NaN, infinite or not there is a failed one, as the tables of older
    versions may hold it: its model is broken, and its other numbers say nothing.

    Columns are those of `docs/analysis.md`; further ones are kept as they are. `source`, `method`
    and `target` name the calibration, the pruner and the sparsity with all that varies in the grid.
    What has an order that is not the alphabet's is an ordered category.

    Args:
        location: a store's folder or fsspec URL, whose grids are read one below the other, or one
            Parquet file.
        grid: read this grid only.

    Raises:
        FileNotFoundError: if there is no such table.
        TableError: if a column is missing or has a wrong type, or the URL cannot be used.
    """
    files, root = file_system(location)
    if root.endswith(".parquet"):
        if not files.exists(root):
            raise FileNotFoundError(f"{location}: there is no such results table: {REMEDY}")
        paths = [root]
    else:
        paths = sorted(files.glob(posixpath.join(root, "results", "*.parquet")))
        if not paths:
            raise FileNotFoundError(f"{location}: holds no results/*.parquet: {REMEDY}")
        if grid is not None:
            paths = _of_grid(grid, paths)
    table = pd.concat([_read(files, path) for path in paths], ignore_index=True)
    if grid is not None:
        table = table[table["grid"] == grid].reset_index(drop=True)
        if table.empty:
            raise FileNotFoundError(f"{location}: has no row of grid {grid}: {REMEDY}")
    return with_labels(table.astype(dict.fromkeys(SHARED, "category")))


def file_system(location: str | Path) -> tuple[Any, str]:
    """The fsspec file system of a folder or URL, and the path in it.

    Raises:
        TableError: if nothing installed can read such a URL.
    """
    try:
        files, root = fsspec.core.url_to_fs(str(location))
    except (ImportError, ValueError) as error:
        raise TableError(f"{location}: cannot be opened: {error}") from error
    return files, root.rstrip("/")


def _of_grid(grid: str, paths: list[str]) -> list[str]:
    stems = {posixpath.basename(path).removesuffix(".parquet"): path for path in paths}
    if grid not in stems:
        raise FileNotFoundError(
            f"grid {grid}: the store holds {', '.join(stems)}: name one of these, or {REMEDY}"
        )
    return [stems[grid]]


def _read(files: Any, path: str) -> pd.DataFrame:
    with files.open(path, "rb") as file:
        try:
            read = pq.read_table(file, read_dictionary=SHARED)
            table: pd.DataFrame = read.to_pandas(types_mapper=INTEGERS.get)
        except pa.ArrowInvalid as error:
            raise TableError(f"{path}: is no Parquet file ({error}): {REMEDY}") from error
    missing = [column for column in ESSENTIAL if column not in table]
    if missing:
        raise TableError(f"{path}: column {', '.join(missing)} is missing: {REMEDY}")
    typed = {column: _typed(table, column, path) for column in {**ESSENTIAL, **OPTIONAL}}
    unknown = in_order(set(typed["status"].dropna()) - set(STATUS.categories))
    if unknown or typed["status"].isna().any():
        raise TableError(f"{path}: status is {', '.join(unknown) or 'null'}: {REMEDY}")
    return _spoilt_as_failed(table.assign(**typed)).astype({"status": STATUS})


def _spoilt_as_failed(table: pd.DataFrame) -> pd.DataFrame:
    """One failed row in the place of each cell that has a number that is not finite."""
    spoilt = (table["status"] == "ok") & table["metric"].notna() & ~np.isfinite(table["value"])
    if not spoilt.any():
        return table
    first = table[spoilt].drop_duplicates(["grid", "cell"])
    reasons = [
        f"{task} {metric} is {value}: no result"
        for task, metric, value in zip(first["task"], first["metric"], first["value"], strict=True)
    ]
    failed = first.assign(status="failed", error=reasons, value=np.nan)
    failed[list(NUMBER)] = None
    cells = pd.MultiIndex.from_frame(table[["grid", "cell"]])
    kept = table[~cells.isin(pd.MultiIndex.from_frame(first[["grid", "cell"]]))]
    whole: pd.DataFrame = pd.concat([kept, failed.astype(table.dtypes)]).sort_index()
    return whole


def _typed(table: pd.DataFrame, column: str, path: str) -> Any:
    dtype: Any = {**ESSENTIAL, **OPTIONAL}[column]
    values = table[column] if column in table else pd.Series(np.nan, table.index)
    try:
        if dtype in ("str", "category"):
            return values.astype(dtype)
        if values.isna().all():
            return pd.Series(np.nan, table.index).astype(dtype)
        return pd.to_numeric(values).astype(dtype)
    except (TypeError, ValueError) as error:
        raise TableError(
            f"{path}: column {column} should be {dtype} but is {values.dtype} ({error}): {REMEDY}"
        ) from error
