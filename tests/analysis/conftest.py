"""Handmade results tables in the form that `jobs gather` writes."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest
from moto.server import ThreadedMotoServer

from analysis.load import COLUMNS, load_results
from analysis.report import write_report

Row = dict[str, Any]
MakeTable = Callable[[list[Row]], pd.DataFrame]

WHERE = {
    "grid": "hand",
    "status": "ok",
    "error": None,
    "traceback": None,
    "model": "tiny",
    "calibration": "corpus",
    "pruner": "wanda",
    "sparsity": 0.5,
    "pattern": "unstructured",
    "seed": 0,
    "task": "questions",
    "metric": "acc",
    "value": 0.5,
}
DENSE = {"calibration": "none", "pruner": "dense", "sparsity": 0.0, "pattern": None, "seed": None}
MAGNITUDE = {"calibration": "none", "pruner": "magnitude", "seed": None}
CELL = ["grid", "model", "calibration", "pruner", "sparsity", "pattern", "seed"]
TASKS = {"heldout": "perplexity", "colours": "acc", "rivers": "acc"}


def write(rows: list[Row], path: Path) -> None:
    """Write rows as a results table; a field that a row leaves out is that of WHERE, or null."""
    full = [{**WHERE, **row} for row in rows]
    for row in full:
        if row["metric"] is None:
            row["value"] = None
        row.setdefault("cell", "-".join(str(row[name]) for name in CELL).replace(" ", "-"))
        row.setdefault("evaluate_key", f"evaluate-{row['cell']}")
        row.setdefault("lineage", json.dumps(lineage(row)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(full, columns=list(COLUMNS)).astype({"seed": "Int64"}).to_parquet(path)


def lineage(row: Row) -> Row:
    """Return a spec shaped like an evaluation's, with the specs before it."""
    model: Row = {"kind": "pretrain", "steps": 700}
    if row["pruner"] != "dense":
        corpus = {"kind": "testbed-corpus", "name": row["calibration"]}
        windows = {"kind": "windows", "source": corpus, "seed": row["seed"], "model": model}
        pruner = {"name": row["pruner"]}
        model = {"kind": "prune", "model": model, "calibration": windows, "pruner": pruner}
    return {"kind": "evaluate", "batch_size": 32, "model": model}


@pytest.fixture
def make_table(tmp_path: Path) -> MakeTable:
    def make(rows: list[Row]) -> pd.DataFrame:
        write(rows, tmp_path / "hand.parquet")
        return load_results(tmp_path / "hand.parquet")

    return make


def whole_grid() -> list[Row]:
    """Return a dense model, magnitude, and two pruners at 4 targets with 3 calibrations and 2
    seeds; one cell failed and one is missing."""
    rows: list[Row] = []

    def measure(cell: Row, harm: float) -> None:
        values = (8 * 2.0**harm, 0.3 + 0.5 / (1 + harm), 0.25 + 0.4 / (1 + harm))
        for (task, metric), value in zip(TASKS.items(), values, strict=True):
            number = {"task": task, "metric": metric, "value": value}
            rows.append({**cell, **number, "versions": json.dumps({"torch": "2.9.0"})})

    measure(DENSE, 0.0)
    targets = [(0.5, "unstructured"), (0.6, "unstructured"), (0.7, "unstructured"), (0.5, "2:4")]
    for step, (sparsity, pattern) in enumerate(targets, start=1):
        at = {"sparsity": sparsity, "pattern": pattern}
        measure({**MAGNITUDE, **at}, 0.9 * step)
        sources = enumerate(("self-generated", "pretraining", "mismatched"))
        for pruner, (place, source), seed in itertools.product(
            ("sparsegpt", "wanda"), list(sources), (0, 1)
        ):
            cell = {**at, "pruner": pruner, "calibration": source, "seed": seed}
            names = (pruner, source, seed, pattern, sparsity)
            if names == ("wanda", "mismatched", 1, "unstructured", 0.7):
                reason = {"error": "ValueError: <b>bad</b>", "traceback": "Traceback of it"}
                rows.append({**cell, "status": "failed", **reason, "task": None, "metric": None})
            elif names == ("wanda", "pretraining", 1, "2:4", 0.5):
                rows.append({**cell, "status": "missing", "task": None, "metric": None})
            else:
                measure(cell, 0.4 * step * (1 + 0.2 * place) + 0.03 * seed * (1 + place))
    return rows


def many_models(count: int) -> list[Row]:
    """Return one cell of two calibrations of each model, and the dense model."""
    cells = [{"calibration": "corpus"}, {"calibration": "other"}, DENSE]
    return [
        {**cell, "model": f"model-{number:03}", "value": 0.5 + 0.001 * number}
        for number in range(count)
        for cell in cells
    ]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a store with the results of one grid, `hand`."""
    folder = tmp_path_factory.mktemp("store")
    write(whole_grid(), folder / "results" / "hand.parquet")
    return folder


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the file system of an S3 server with a bucket `analysis-tests`; the environment names
    the server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        files = fsspec.filesystem("s3")
        files.mkdir("analysis-tests")
        yield files
    finally:
        files.rm("analysis-tests", recursive=True)  # servers of one process share their files
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="session")
def table(store: Path) -> pd.DataFrame:
    return load_results(store)


@pytest.fixture(scope="session")
def report_page(store: Path, table: pd.DataFrame) -> Path:
    """Return the page of the store's report, with `mismatched` as the reference."""
    return write_report(table, store / "report" / "hand", "mismatched")
