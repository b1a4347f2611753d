"""Grids and single models from Python: what the commands do, with tables as DataFrames.

logging.basicConfig(level=logging.INFO)                 # shows a run where no live view can

from jobs import library as calprune
from jobs.one_model import OneModel

grid = calprune.read("grid.yaml")                       # or a mapping with the same fields
table = calprune.run(grid, "s3://bucket/store")         # a live view below the cell
calprune.best(grid, "s3://bucket/store", sparsity="0.5", folder="pruned").reason

calprune.prune(OneModel("path/to/model", sparsity="2:4"), "pruned")
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.run import Outcome
from cluster.store import Store
from jobs.before_after import BeforeAfter, before_after
from jobs.check import check_plan
from jobs.cost import model_size
from jobs.declared import record_design
from jobs.export import check_unused, export
from jobs.export_calibration import export_calibration
from jobs.fetch import copies, model_copies
from jobs.gather import gather, write_table
from jobs.grid import Grid, grid_of, lines_of, load_grid
from jobs.grid_files import grid_file
from jobs.one_model import OneModel, calibration_plan, pruning_plan, with_devices
from jobs.outside import with_fingerprints
from jobs.plan import Plan, make_plan
from jobs.run import run_grid
from jobs.stores import open_store, writable_store
from pipeline.hub import used

if TYPE_CHECKING:  # scipy and pandas take as long to import as all the rest
    import pandas as pd

    from jobs.best import Best

logger = logging.getLogger("jobs")

STORE = ".calprune"
"""The store that is taken where none is named."""


class StagesFailedError(RuntimeError):
    """Stages failed; the same call tries them again."""

    def __init__(self, outcome: Outcome) -> None:
        reasons = "; ".join(f"{each.kind}: {each.error}" for each in outcome.failed.values())
        super().__init__(f"{len(outcome.failed)} stages failed; run it again to retry: {reasons}")


def read(grid: str | Path | Mapping[str, Any]) -> Grid:
    """Return a grid from its file, one that calprune brings by its name, or a mapping.

    A mapping has the fields of a file. Its values may be objects of `jobs.grid` and
    `pipeline.specs`.

    Raises:
        InputError: naming field, value and remedy.
    """
    if isinstance(grid, Mapping):
        return with_fingerprints(grid_of(grid))
    return load_grid(grid_file(str(grid)))


def checked_plan(grid: Grid, store: str = STORE) -> Plan:
    """Return the plan of a grid after checking all that it reads; log the check's warnings.

    Raises:
        InputError: at the first mistake.
    """
    kept = open_store(store)
    with used(model_copies(grid, kept) if kept.local else {}):
        plan = make_plan(grid)
    with lines_of(grid):
        _check(plan, kept)
        if any(model_size(model, plan.sizes) is None for model in grid.models.values()):
            plan = make_plan(grid)  # the check has downloaded model configurations to the cache
    return plan


def run(
    grid: Grid, store: str = STORE, *, address: str | None = None, workers: int | None = None
) -> "pd.DataFrame":
    """Run a grid, or continue it, and return its results (docs/results.md).

    A cell that failed is a row with its error; another call tries it again.

    Args:
        store: a folder or fsspec URL.
        address: of a running Ray cluster; None starts a local Ray.
        workers: the most stages at one time; None takes as many as fit.

    Raises:
        InputError: before any work, naming field, value and remedy.
    """
    plan = checked_plan(grid, store)
    kept = writable_store(store)
    record_design(plan, kept)
    run_grid(plan, kept, address, workers)
    return _frame(_written(plan, kept))


def results(grid: Grid, store: str = STORE) -> "pd.DataFrame":
    """Return a grid's results so far, and write its table: a row for each cell, task and metric."""
    return _frame(_written(make_plan(grid), open_store(store)))


def best(
    grid: Grid,
    store: str = STORE,
    *,
    model: str | None = None,
    sparsity: str | None = None,
    folder: str | Path | None = None,
) -> "Best":
    """Choose the best pruned model of a finished grid, and export it if a folder is named.

    Raises:
        InputError: as `jobs.best.best_cell` and `jobs.export.export`.
    """
    from jobs.best import best_cell

    kept = open_store(store)
    if folder is not None:
        check_unused(Path(folder))
    found = best_cell(make_plan(grid), kept, model, sparsity)
    if folder is not None:
        export(kept, found.prune_key, Path(folder))
    return found


def prune(
    asked: OneModel, folder: str | Path, store: str = STORE, *, address: str | None = None
) -> tuple[str, list[BeforeAfter]]:
    """Prune one model, compare it with the dense one, and write a checkpoint with a card.

    Returns:
        The key of the pruned model, and what was measured of both.

    Raises:
        InputError: before any work, naming field, value and remedy.
        StagesFailedError: if a stage failed.
    """
    check_unused(Path(folder))
    plan, key = pruning_plan(with_devices(asked, address))
    kept = _run_all(plan, store, address)
    table = _written(plan, kept)
    export(kept, key, Path(folder))
    return key, before_after(table, key)


def calibrate(
    asked: OneModel, folder: str | Path, store: str = STORE, *, address: str | None = None
) -> tuple[str, int]:
    """Let a model write its calibration set, and export it as a data set folder with a card.

    Returns:
        The key of the texts, and their number.

    Raises:
        InputError: before any work, naming field, value and remedy.
        StagesFailedError: if a stage failed.
    """
    check_unused(Path(folder))
    plan, key = calibration_plan(with_devices(asked, address))
    kept = _run_all(plan, store, address)
    return key, export_calibration(kept, key, Path(folder))


def _written(plan: Plan, store: Store) -> pa.Table:
    """Return a grid's results so far, after writing their table."""
    table = gather(plan, store)
    write_table(table, plan.grid.name, store)
    return table


def _frame(table: pa.Table) -> "pd.DataFrame":
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _run_all(plan: Plan, store: str, address: str | None) -> Store:
    kept = writable_store(store)
    _check(plan, kept)
    outcome = run_grid(plan, kept, address, None)
    if outcome.failed:
        raise StagesFailedError(outcome)
    return kept


def _check(plan: Plan, store: Store) -> None:
    with used(copies(plan, store) if store.local else {}):
        for note in check_plan(plan):
            logger.warning("%s", note)
