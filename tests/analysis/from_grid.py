"""Results of a study's own grid with planted effects: as if its grid had run."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from analysis.study import Results, Study, read_results
from cluster.store import Store
from jobs.cells import Cell
from jobs.declared import record_design
from jobs.gather import cell_fields
from jobs.grid import read_grid
from jobs.plan import make_plan
from tests.analysis.conftest import Row, write

Effect = Callable[[Cell, str], float]
"""A cell's log perplexity on a corpus, minus that of an arm without effect; of a task the log of
its inverse accuracy."""

SPREAD = 0.004
"""Standard deviation of an effect between models, and between draws."""


def run_planted(study: Study, folder: Path, effect: Effect) -> Results:
    """Write the design and results of a study's grid to a store, and read them.

    Models and draws differ at random; the dense model is 0.3 below an arm without effect.
    """
    plan = make_plan(read_grid(study.grid_file))
    store = Store(str(folder))
    record_design(plan, store)
    evaluated = plan.grid.evaluate
    measures = [(entry.corpus, "perplexity", entry.kl) for entry in evaluated.all_perplexities()]
    measures += [(task.name, "acc", False) for task in evaluated.all_tasks()]
    chance = np.random.default_rng(1)
    of_model: dict[tuple[str, str, str], float] = {}
    between = SPREAD if len(plan.grid.models) > 1 else 0.0  # to one model it would be an effect
    rows: list[Row] = []
    for cell in plan.cells.values():
        fields = {**cell_fields(plan.grid.name, cell), "note": plan.grid.note, **seconds(cell)}
        for task, metric, kl in measures:
            dense = level = 1.5 + of_model.setdefault(("", cell.model, ""), chance.normal(0, 0.1))
            dense -= 0.3
            if cell.pruner is None:
                level = dense
            else:
                arm = (str(cell.calibration), cell.model, task)
                level += of_model.setdefault(arm, chance.normal(0, between))
                level += effect(cell, task) + chance.normal(0, SPREAD)
            values = {metric: float(np.exp(level if metric == "perplexity" else 1 - level))}
            if metric == "perplexity":
                values["bits_per_byte"] = level / math.log(2)  # with a byte a token
            if kl and cell.pruner is not None:
                values["kl"] = level - dense
            rows += [
                {**fields, "task": task, "metric": name, "value": value}
                for name, value in values.items()
            ]
    write(rows, folder / "results" / f"{plan.grid.name}.parquet")
    return read_results(str(folder), plan.grid.name)


def seconds(cell: Cell) -> Row:
    """Return what a cell's stages took: a second for eight samples, one to score, two to prune."""
    made = cell.num_samples is not None
    return {
        "seconds_generate": (cell.num_samples or 0) / 8,
        "seconds_score": float(made),
        "seconds_prune": 2.0,
    }
