"""Time how a results table of a million rows is loaded, grouped, widened and compared, and how a
report of 10,000 cells is written and opened: `python -m benchmarks.analysis`.
"""

import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from rich.console import Console

import analysis
from analysis.load import COLUMNS
from analysis.report import write_report
from benchmarks.browser import CHROMIUM, DRIVER, start_chromium

T = TypeVar("T")

_MODELS, _CALIBRATIONS, SEEDS, _TASKS = 100, 10, 5, 10
_PRUNERS = ("magnitude", "wanda", "sparsegpt", "dsnot")
_SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)

_REPORTED_MODELS = 10

SEED_STEP = 0.01
"""The difference in value from seed to seed."""


def made_table(models: int = _MODELS) -> pd.DataFrame:
    """Return 10,000 rows per model: 1,000 cells with 10 accuracies each.

    A cell's value is 0.001 times the calibration's number, plus `SEED_STEP` times the seed.
    """
    axes = (range(models), range(_CALIBRATIONS), _PRUNERS, _SPARSITIES, range(SEEDS))
    cells = pd.DataFrame(
        itertools.product(*axes), columns=["model", "calibration", "pruner", "sparsity", "seed"]
    )
    cells["value"] = 0.001 * cells["calibration"] + SEED_STEP * cells["seed"]
    for name in ("model", "calibration"):
        cells[name] = f"{name}-" + cells[name].astype(str)
    cells = cells.assign(
        grid="made",
        cell=[f"{number:012x}" for number in range(len(cells))],
        status="ok",
        pattern="unstructured",
        metric="acc",
    ).reindex(columns=list(COLUMNS))
    rows = cells.loc[cells.index.repeat(_TASKS)].reset_index(drop=True)
    return rows.assign(task=np.tile([f"task-{number}" for number in range(_TASKS)], len(cells)))


def with_origins(table: pd.DataFrame) -> pd.DataFrame:
    """Return a made table with what a report shows of each cell: keys, costs and lineage."""
    cells = table.drop_duplicates("cell").set_index("cell")
    origins = {}
    for cell, row in cells.iterrows():
        model = {"kind": "hub-model", "name": row["model"], "revision": "main"}
        corpus = {"kind": "hub-corpus", "name": row["calibration"]}
        windows = {"kind": "windows", "source": corpus, "model": model, "seed": row["seed"]}
        prune = {"kind": "prune", "model": model, "calibration": windows, "pruner": row["pruner"]}
        spec = {"kind": "evaluate", "model": {**prune, "sparsity": row["sparsity"]}}
        origins[cell] = json.dumps(spec)
    keys = {cell: hashlib.sha256(str(cell).encode()).hexdigest() for cell in origins}
    return table.assign(
        lineage=table["cell"].map(origins),
        prune_key=table["cell"].map(keys),
        seconds_prune=100.0,
        seconds_evaluate=50.0,
        stderr=0.01,
    )


def seconds_to_open(page: Path, profile: Path) -> float | None:
    """Return how long Chromium takes until it has drawn a page; None if it is not installed."""
    if CHROMIUM is None or DRIVER is None:
        return None
    browser = start_chromium(profile)
    try:
        browser.get("about:blank")  # its own start does not count
        start = time.perf_counter()
        browser.get(page.as_uri())
        browser.execute_script("return ready.then(() => true)")
        return time.perf_counter() - start
    finally:
        browser.quit()


def main() -> None:
    """Time each step once and print it."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.parquet"
        made_table().to_parquet(path)
        seconds, table = _timed(lambda: analysis.load_results(path))
        console.print(f"load {len(table):,} rows: {seconds:.1f} s")
        seconds, levels = _timed(lambda: analysis.summarize(table))
        console.print(f"summarize to {len(levels):,} groups: {seconds:.1f} s")
        seconds, cells = _timed(lambda: analysis.wide(table))
        console.print(f"wide, {len(cells):,} cells: {seconds:.1f} s")
        a, b = (table[table["calibration"] == f"calibration-{number}"] for number in (1, 0))
        seconds, compared = _timed(lambda: analysis.compare_selections(a, b))
        console.print(f"compare in {len(compared):,} groups: {seconds:.1f} s")
        with_origins(made_table(_REPORTED_MODELS)).to_parquet(path)
        table = analysis.load_results(path)
        seconds, page = _timed(lambda: write_report(table, Path(folder), "calibration-0"))
        size = page.stat().st_size / 1e6
        console.print(
            f"report of {table['cell'].nunique():,} cells: {seconds:.0f} s, {size:.1f} MB"
        )
        opened = seconds_to_open(page, Path(folder, "profile"))
        known = "no chromium and chromedriver here" if opened is None else f"{opened:.1f} s"
        console.print(f"open it in Chromium: {known}")


def _timed(step: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
