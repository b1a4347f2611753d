"""Per-request results: a model's answer to each question, or its loss on each window.

They are a file of the evaluation's artifact.
"""

import json
import posixpath
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from analysis.load import TableError, file_system
from analysis.wide import NUMBER

_COLUMNS = ["task", "doc_id", "metric", "value"]

THREADS = 16


def load_requests(location: str | Path, table: pd.DataFrame) -> pd.DataFrame:
    """Read the per-request results of a table's cells: one row per cell, request and metric.

    The columns are those of the cell in `table`, then `task`, `doc_id`, `metric` and `value`. A
    failed or missing cell is one row. So is a cell whose evaluation the store lacks: its `status`
    is `missing`, and `error` says why.

    Args:
        location: the store the table was loaded from.
        table: rows of a table that `load_results` returned.

    Raises:
        TableError: if the store has no evaluation of these cells.
    """
    files, root = file_system(location)
    cells = table.drop_duplicates(["grid", "cell"]).drop(columns=list(NUMBER))
    keys = sorted(set(cells.loc[cells["status"] == "ok", "evaluate_key"].dropna()))
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(keys, pool.map(lambda key: _read(files, root, key), keys), strict=True))
    if all(rows is None for rows in found.values()):
        raise TableError(
            f"{location}: holds no evaluation of these {len(cells)} cells: "
            "name the store that the table was loaded from"
        )
    answers = [rows.assign(evaluate_key=key) for key, rows in found.items() if rows is not None]
    without = cells["evaluate_key"].isin([key for key, rows in found.items() if rows is None])
    cells.loc[without, "status"] = "missing"
    cells.loc[without, "error"] = "its evaluation is not in the store"
    rows = cells.merge(pd.concat(answers, ignore_index=True), on="evaluate_key", how="left")
    rows.loc[rows["status"] != "ok", _COLUMNS] = pd.NA
    return rows


def _read(files: Any, root: str, key: str) -> pd.DataFrame | None:
    manifest = posixpath.join(root, "manifests", f"{key}.json")
    if not files.exists(manifest):
        return None
    artifact = json.loads(files.cat_file(manifest))
    with files.open(posixpath.join(root, artifact["data"], "requests.parquet"), "rb") as file:
        rows: pd.DataFrame = pq.read_table(file, columns=_COLUMNS).to_pandas()
    return rows.astype({"task": "str", "metric": "str", "value": "float64"})
