"""Choose the best pruned model of a finished grid, with the reason."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from cluster.store import Store
from jobs.cells import Cell, candidate_names
from jobs.gather import gather
from jobs.pilot import Standing, compare
from jobs.plan import Plan
from pipeline.errors import InputError
from pipeline.specs import target_name

_Values = npt.NDArray[np.float64]

METRICS = {
    "kl": "KL divergence from the dense model, in nats a token",
    "loss": "loss, in nats a token",
    "acc": "share of wrong answers",
}
"""What models are compared by, in this order: the first that all of them have on every text or
task. In the results of each window or question."""


class Best(NamedTuple):
    """The choice at one model and target."""

    model: str
    target: str
    """In words, such as 50% or 4 bit."""
    prune_key: str
    """Of the candidate's seed with the lowest number."""
    cell: Cell
    metric: str
    """One of `METRICS`."""
    standings: list[Standing]
    """All candidates, the best first."""
    failed: dict[str, str]
    """Candidates without a result, and why."""
    seeds: int
    """That all candidates have; 1 if they differ in them."""

    @property
    def reason(self) -> str:
        """Why it is chosen, and how sure that is."""
        best, *others = self.standings
        over = "questions" if self.metric == "acc" else "windows"
        over += f" and {self.seeds} seeds" if self.seeds > 1 else ", for these draws of data"
        seed = "" if self.cell.seed is None else f", seed {self.cell.seed}"
        choice = (
            f"{best.name}{seed}: the lowest {METRICS[self.metric]} ({best.kl:.4g}) of "
            f"{len(self.standings)} candidates for {self.model} at {self.target}"
        )
        tied = [each.name for each in others if not each.is_worse]
        if not others:
            sure = "; there is no other"
        elif tied:
            sure = f"; not told apart (95 %, over {over}) from {', '.join(tied)}"
        else:
            sure = f"; each other one is shown to be worse (95 %, over {over})"
        out = f". Without a result: {', '.join(self.failed)}" if self.failed else ""
        return f"{choice}{sure}{out}."


def best_cell(plan: Plan, store: Store, model: str | None, sparsity: str | None) -> Best:
    """Return the best pruned model of a grid at one target.

    A candidate is a cell without its seed. Texts and tasks count the same, windows and questions of
    each are averaged, and intervals are those of pilot pruning (`jobs.pilot.compare`).

    Args:
        model: one of the grid's models; None if it has one.
        sparsity: one of its targets, as `0.5`, `2:4`, `4 bit` or `4 bit 50%`; None if it has one.

    Raises:
        InputError: if the choice is not one of like with like, cells have not run, or nothing that
            is measured compares them.
    """
    keys = {cell: key for key, cell in plan.cells.items() if cell.pruner is not None}
    cells = list(keys)
    models = list(dict.fromkeys(cell.model for cell in cells))
    cells = [cell for cell in cells if cell.model == _chosen("model", model, models)]
    targets = list(dict.fromkeys(cell.target_name for cell in cells))
    if sparsity is not None and _as_target(sparsity) in targets:
        sparsity = _as_target(sparsity)
    target = _chosen("sparsity", sparsity, targets)
    cells = [cell for cell in cells if cell.target_name == target]
    rows = {row["evaluate_key"]: row for row in gather(plan, store).to_pylist()}
    missing = sum(rows[keys[cell]]["status"] == "missing" for cell in cells)
    if missing:
        remedy = f"{missing} of {len(cells)} cells at {target} have not run: run it first"
        raise InputError("grid", plan.grid.name, remedy)
    names = _names(cells)
    failed = {
        names[cell]: rows[keys[cell]]["error"]
        for cell in cells
        if rows[keys[cell]]["status"] != "ok"
    }
    sound = [cell for cell in cells if names[cell] not in failed]
    if not sound:
        raise InputError("grid", plan.grid.name, f"every cell at {target} failed: show says why")
    measured = {cell: _by_task(store, keys[cell]) for cell in sound}
    metric = _shared_metric(list(measured.values()))
    telling = _telling_tasks([own[metric] for own in measured.values()], plan.grid.name)
    by_name: dict[str, dict[Cell, list[_Values]]] = {}
    for cell in sound:
        own = measured[cell][metric]
        by_name.setdefault(names[cell], {})[cell] = [own[task] for task in telling]
    seeds = {tuple(sorted(str(cell.seed) for cell in own)) for own in by_name.values()}
    values = {
        name: [np.stack(each) for each in zip(*own.values(), strict=True)]
        for name, own in by_name.items()
    }
    if len(seeds) > 1:  # they do not pair
        values = {
            name: [each.mean(axis=0, keepdims=True) for each in own] for name, own in values.items()
        }
    standings = compare(values)
    of_best = by_name[standings[0].name]
    cell = min(of_best, key=lambda each: float(np.mean([one.mean() for one in of_best[each]])))
    key = rows[keys[cell]]["prune_key"]
    paired = len(seeds.pop()) if len(seeds) == 1 else 1
    return Best(cell.model, target, key, cell, metric, standings, failed, paired)


def print_best(best: Best, console: Console) -> None:
    """Print the candidates, the best first, and the reason."""
    table = Table(title=f"{best.model} at {best.target}, by {METRICS[best.metric]}")
    for heading in ("candidate", "mean", "against the best (95 %)"):
        table.add_column(heading)
    for place, each in enumerate(best.standings):
        difference = f"{each.against_best:+.1%} ({each.low:+.1%} to {each.high:+.1%})"
        table.add_row(each.name, f"{each.kl:.4g}", difference if place else "")
    for name, why in best.failed.items():
        table.add_row(name, "failed", why)
    console.print(table)
    console.print(f"best: {best.reason}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"prune_key: {best.prune_key}", soft_wrap=True)


def _as_target(sparsity: str) -> str:
    """Return the name of a target that is given as in a grid, as a share, or by its name."""
    with contextlib.suppress(ValueError):
        return target_name(float(sparsity), None)
    return sparsity


def _chosen(field: str, asked: str | None, known: Sequence[str]) -> str:
    """Return the one that is asked for, or the only one."""
    if asked is None and len(known) == 1:
        return known[0]
    if asked in known and asked is not None:
        return asked
    remedy = f"the grid has {', '.join(known)}: name one of them with --{field}"
    raise InputError(field, asked, remedy)


def _names(cells: Sequence[Cell]) -> dict[Cell, str]:
    """Return the name of each cell without its seed: the pruner, then the data."""
    data = candidate_names(cells)
    allocations = {cell.allocation for cell in cells}
    fits = {cell.reconstruction for cell in cells}
    names = {}
    for cell in cells:
        assert cell.pruner is not None
        options = cell.pruner.model_dump(exclude={"name"}, exclude_defaults=True)
        parts = [cell.pruner.name, *(f"{name} {value}" for name, value in options.items())]
        if len(allocations) > 1 and cell.allocation is not None:
            parts.append(cell.allocation.name)
        if len(fits) > 1 and cell.reconstruction is not None:
            parts.append(cell.reconstruction.words)
        names[cell] = " ".join([*parts, data[cell]])
    return names


def _by_task(store: Store, key: str) -> dict[str, dict[str, _Values]]:
    """Return a cell's numbers of each window or question, by metric of `METRICS` and task."""
    columns = ["task", "doc_id", "metric", "value"]
    table: pa.Table = pq.read_table(store.fetch(key) / "requests.parquet", columns=columns)
    found: dict[str, dict[str, list[float]]] = {}
    for row in table.sort_by([("task", "ascending"), ("doc_id", "ascending")]).to_pylist():
        metric = row["metric"].partition(",")[0]
        if metric in METRICS and row["value"] is not None:
            value = 1 - row["value"] if metric == "acc" else row["value"]
            found.setdefault(metric, {}).setdefault(row["task"], []).append(value)
    return {
        metric: {task: np.array(values) for task, values in tasks.items()}
        for metric, tasks in found.items()
    }


def _shared_metric(measured: Sequence[Mapping[str, Mapping[str, _Values]]]) -> str:
    for metric in METRICS:
        sizes = [
            {task: len(values) for task, values in own.get(metric, {}).items()} for own in measured
        ]
        if sizes[0] and all(each == sizes[0] for each in sizes):
            return metric
    remedy = f"its cells share none of {', '.join(METRICS)}: measure a perplexity"
    raise InputError("evaluate", None, remedy)


def _telling_tasks(measured: Sequence[Mapping[str, _Values]], grid: str) -> list[str]:
    """Return the texts or tasks on which not all cells have the same numbers."""
    telling = [
        task
        for task in sorted(measured[0])
        if any(not np.array_equal(own[task], measured[0][task]) for own in measured)
    ]
    if not telling and len(measured) > 1:
        remedy = "all cells have the same number on every text and task: measure something else"
        raise InputError("grid", grid, remedy)
    return telling or sorted(measured[0])
