"""Time how a results table of a million rows is loaded, grouped, widened and compared:
`python -m benchmarks.analysis`.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

import analysis
from analysis.load import COLUMNS

_MODELS, _CALIBRATIONS, SEEDS, _TASKS = 100, 10, 5, 10
_PRUNERS = ("magnitude", "wanda", "sparsegpt", "dsnot")
_SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)

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


def _timed(step: Callable[[], pd.DataFrame]) -> tuple[float, pd.DataFrame]:
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
