"""Read the results table from a store or from one Parquet file."""

import json
import posixpath
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.labels import in_order, with_labels

COLUMNS: dict[str, str] = {
    "grid": "str",
    "cell": "str",
    "status": "str",
    "error": "str",
    "model": "str",
    "calibration": "str",
    "pruner": "str",
    "pruner_options": "str",
    "allocation": "str",
    "allocation_options": "str",
    "reconstruction": "str",
    "sparsity": "float64",
    "pattern": "str",
    "bits": "Int64",
    "seed": "Int64",
    "nsamples": "Int64",
    "seqlen": "Int64",
    "prefix_tokens": "Int64",
    "drop_fraction": "float64",
    "drop_by": "str",
    "within": "str",
    "num_samples": "Int64",
    "temperature": "float64",
    "measured_sparsity": "float64",
    "task": "str",
    "metric": "str",
    "value": "float64",
    "stderr": "float64",
    "samples": "Int64",
    "limit": "Int64",
    "num_fewshot": "Int64",
    "task_version": "str",
    "lm_eval": "str",
    "dtype": "str",
    "tokenizer": "str",
    "chat_template": "str",
    "traceback": "category",
    "seconds_generate": "float64",
    "seconds_score": "float64",
    "seconds_prune": "float64",
    "seconds_evaluate": "float64",
    "peak_memory_bytes": "Int64",
    "note": "category",
    "versions": "category",
    "host": "category",
    "prune_key": "str",
    "prune_report": "category",
    "calibration_report": "category",
    "calibration_tokens": "Int64",
    "calibration_overlap": "float64",
    "evaluate_key": "str",
    "bytes_dense": "Int64",
    "bytes_masks": "Int64",
    "bytes_compressed": "Int64",
    "speed_2_4": "str",
    "lineage": "category",
}
"""Columns of a results table and their types. Categories are long texts that many rows share.

A test compares the names with those that `jobs` writes, which `analysis` cannot import."""

SHARED = [column for column, dtype in COLUMNS.items() if dtype == "category"]

INTEGERS = {pa.int64(): pd.Int64Dtype()}
"""Integers stay integers: as floats, those beyond 2**53 would be rounded where others are null."""

STATUS = pd.CategoricalDtype(["ok", "failed", "missing"], ordered=True)

REMEDY = "write it with `python -m jobs run GRID` or `python -m jobs gather GRID`"


class TableError(ValueError):
    """A results table, or a question to it, is wrong; the message names the remedy."""


def load_results(location: str | Path, grid: str | None = None) -> pd.DataFrame:
    """Read a results table: one row per cell, task and metric; a lost cell is one row.

    The columns are those of `docs/analysis.md`. `source`, `method` and `target` name the
    calibration, the pruner and the sparsity with every setting that varies in the grid. Columns
    with an order of their own are ordered categories.

    Args:
        location: a store's folder or fsspec URL, or one Parquet file. All grids of a store are
            read into one table.
        grid: read this grid only.

    Raises:
        FileNotFoundError: if there is no such table.
        TableError: if a column is missing or has a wrong type, a number is not finite, or the URL
            cannot be opened.
    """
    files, root = file_system(location)
    if root.endswith(".parquet"):
        if not files.exists(root):
            raise FileNotFoundError(f"{location}: no such results table: {REMEDY}")
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


class Continuation(NamedTuple):
    """What a model wrote after the prompt."""

    name: str
    text: str
    """The prompt and what follows."""


class Texts(NamedTuple):
    """What a grid's dense model and pruned ones wrote from one prompt."""

    prompt: str
    written: tuple[Continuation, ...]


def load_texts(location: str | Path, grid: str) -> Texts | None:
    """Read `results/<grid>.texts.json`, which `run --prompt` writes; None if there is none.

    Args:
        location: a store's folder or fsspec URL, or one Parquet file in it.
        grid: the grid's name.
    """
    document = read_document(location, f"{grid}.texts.json")
    if document is None:
        return None
    return Texts(document["prompt"], tuple(Continuation(**each) for each in document["texts"]))


def read_document(location: str | Path, name: str) -> dict[str, Any] | None:
    """Return the JSON document of this name beside the results; None if there is none."""
    files, root = file_system(location)
    folder = posixpath.dirname(root) if root.endswith(".parquet") else f"{root}/results"
    path = posixpath.join(folder, name)
    if not files.exists(path):
        return None
    document: dict[str, Any] = json.loads(files.cat_file(path))
    return document


def file_system(location: str | Path) -> tuple[Any, str]:
    """Return the fsspec file system of a folder or URL, and the path in it.

    Raises:
        TableError: if no installed package can open such a URL.
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
            raise TableError(f"{path}: is not a Parquet file ({error}): {REMEDY}") from error
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise TableError(f"{path}: columns are missing: {', '.join(missing)}: {REMEDY}")
    typed = table.assign(**{column: _typed(table, column, path) for column in COLUMNS})
    unknown = in_order(set(typed["status"].dropna()) - set(STATUS.categories))
    if unknown or typed["status"].isna().any():
        raise TableError(f"{path}: status is {', '.join(unknown) or 'null'}: {REMEDY}")
    wrong = typed[typed["metric"].notna() & ~np.isfinite(typed["value"])]
    if not wrong.empty:
        first = wrong.iloc[0]
        number = f"{first['task']} {first['metric']} is {first['value']}"
        raise TableError(f"{path}: cell {first['cell']}: {number}: {REMEDY}")
    return typed.astype({"status": STATUS})


def _typed(table: pd.DataFrame, column: str, path: str) -> Any:
    dtype: Any = COLUMNS[column]
    values = table[column]
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
