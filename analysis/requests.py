"""Per-request results: what a model answered to each question, or a window's perplexity.

They stand in an evaluation's artifact beside the metrics, where the evaluation kept them.
"""

import json
import posixpath
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from analysis.labels import with_labels
from analysis.load import TableError, file_system
from analysis.wide import NUMBER

FILE = "requests.parquet"

COLUMNS = ["task", "doc_id", "metric", "value"]

THREADS = 16


def load_requests(location: str | Path, table: pd.DataFrame) -> pd.DataFrame:
    """The per-request results of a table's cells: one row a cell, task, request and metric.

    Columns are those that name the cell in `table`, then `task`, `doc_id`, `metric` and `value`.
    A cell without per-request results stays as one row with `status = missing`, or with the status
    it has, and tells why in `error`.

    Args:
        location: the store the table was loaded from.
        table: as `load_results` gives it, or rows of it.

    Raises:
        TableError: if no cell has per-request results.
    """
    files, root = file_system(location)
    cells = with_labels(table).drop_duplicates(["grid", "cell"])
    cells = cells.drop(columns=[name for name in NUMBER if name in cells])
    keys = sorted(set(cells.loc[cells["status"] == "ok", "evaluate_key"].dropna()))
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(keys, pool.map(lambda key: _read(files, root, key), keys), strict=True))
    if all(rows is None for rows in found.values()):
        raise TableError(
            f"{location}: no evaluation of these {len(cells)} cells holds {FILE}: evaluate them "
            "anew, with per-request results kept"
        )
    held = [rows.assign(evaluate_key=key) for key, rows in found.items() if rows is not None]
    without = cells["evaluate_key"].isin([key for key, rows in found.items() if rows is None])
    cells.loc[without, "status"] = "missing"
    cells.loc[without, "error"] = f"its evaluation holds no {FILE}"
    answers = cells.merge(pd.concat(held, ignore_index=True), on="evaluate_key", how="left")
    lost = answers["status"] != "ok"
    answers.loc[lost, COLUMNS] = pd.NA
    return answers.reset_index(drop=True)


def _read(files: Any, root: str, key: str) -> pd.DataFrame | None:
    manifest = posixpath.join(root, "manifests", f"{key}.json")
    if not files.exists(manifest):
        return None
    told = json.loads(files.cat_file(manifest))
    if FILE not in told["files"]:
        return None
    with files.open(posixpath.join(root, told["data"], FILE), "rb") as file:
        rows: pd.DataFrame = pq.read_table(file, columns=COLUMNS).to_pandas()
    return rows.astype({"task": "str", "metric": "str", "value": "float64"})
