"""A grid's design, resolved to its cells: what is compared with what, stored before results exist.

`results/<grid>.design.json` holds every version of the declared design, each with the number of its
cells that had results when it was written; and for the last one the cells by name, in pairs or
blocks. `analysis` needs no more to judge it.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from cluster.store import Store
from jobs.cells import NO_CALIBRATION, Cell, cell_name
from jobs.design import Choice, Contrast, Measure, Selection, detectable
from jobs.grid import Grid
from jobs.plan import Plan
from pipeline.errors import InputError, did_you_mean
from pipeline.mistakes import explained
from pipeline.specs import canonical_json


class Pair(NamedTuple):
    """Two cells that differ in what a contrast compares."""

    first: Cell
    second: Cell
    setting: int
    """Number of what they have besides model and seed."""


class Blocks(NamedTuple):
    """The cells of a choice."""

    candidates: tuple[str, ...]
    cells: tuple[tuple[int, tuple[Cell, ...]], ...]
    """The number of a setting, and one cell for each candidate."""


class Declared(NamedTuple):
    """A design's cells, by the names of contrasts and choices."""

    pairs: dict[str, list[Pair]]
    blocks: dict[str, Blocks]

    @property
    def cells(self) -> set[Cell]:
        """All cells that are compared."""
        paired = {cell for pairs in self.pairs.values() for pair in pairs for cell in pair[:2]}
        return paired | {
            cell for own in self.blocks.values() for _, block in own.cells for cell in block
        }


def resolve(grid: Grid, cells: Iterable[Cell]) -> Declared:
    """Return the cells that a grid's design compares.

    Raises:
        InputError: if a field, task or value does not exist, or a side selects no cell.
    """
    design = grid.design
    if design is None:
        return Declared({}, {})
    pruned = [cell for cell in cells if cell.pruner is not None]
    pairs, blocks = {}, {}
    for name, contrast in design.contrasts.items():
        _check_tasks(grid, contrast, f"design.contrasts.{name}.tasks")
        pairs[name] = _pairs(grid, contrast, pruned, f"design.contrasts.{name}")
    for name, choice in design.choices.items():
        _check_tasks(grid, choice, f"design.choices.{name}.tasks")
        blocks[name] = _blocks(grid, choice, pruned, f"design.choices.{name}")
    return Declared(pairs, blocks)


def record_design(plan: Plan, store: Store) -> None:
    """Write the design of a grid to `results/`, if it declares one.

    A design that differs from the stored one is added to it: the file tells whether it was changed
    after results existed.
    """
    grid = plan.grid
    if grid.design is None:
        return
    declared = resolve(grid, plan.cells.values())
    keys = {cell: key for key, cell in plan.cells.items()}
    compared = {keys[cell] for cell in declared.cells}
    draws: defaultdict[str, set[int]] = defaultdict(set)
    for cell in declared.cells:
        draws[cell.model] |= set() if cell.seed is None else {cell.seed}
    design = {
        **grid.design.model_dump(mode="json", exclude={"contrasts", "choices"}),
        "contrasts": _in_order(grid.design.contrasts),
        "choices": _in_order(grid.design.choices),
        "replicates": {model: sorted(seeds) for model, seeds in sorted(draws.items())},
    }
    name = f"results/{grid.name}.design.json"
    stored = store.read(name)
    history = [] if stored is None else json.loads(stored)["history"]
    if not history or history[-1]["design"] != design:
        measured = len(compared & store.keys())
        history.append({"design": design, "measured": measured, "cells": len(compared)})
    document = {
        "grid": grid.name,
        "history": history,
        "pairs": {
            each: [[cell_name(first), cell_name(second), at] for first, second, at in pairs]
            for each, pairs in declared.pairs.items()
        },
        "candidates": {each: own.candidates for each, own in declared.blocks.items()},
        "blocks": {
            each: [[at, [cell_name(cell) for cell in cells]] for at, cells in own.cells]
            for each, own in declared.blocks.items()
        },
    }
    content = canonical_json(document)
    if content != stored:
        store.write(name, content)


def _in_order(measures: Mapping[str, Measure]) -> list[dict[str, Any]]:
    """Return entries as a list: canonical JSON sorts names, and the first contrast's family is the
    main one."""
    return [{"name": name, **each.model_dump(mode="json")} for name, each in measures.items()]


def print_design(plan: Plan, console: Console) -> None:
    """Print, for each contrast, the replicates and the effect they let it see."""
    design = plan.grid.design
    if design is None:
        return
    table = Table(
        title=f"contrasts; seen: with 80 % power, without the noise of texts; seeds {design.seeds}"
    )
    for heading in ("contrast", "models x seeds", "pairs", "seen", "smallest of interest", ""):
        table.add_column(heading)
    for name, pairs in resolve(plan.grid, plan.cells.values()).pairs.items():
        contrast = design.contrasts[name]
        models = {pair.first.model for pair in pairs}
        seeds = {(pair.first.model, pair.first.seed, pair.second.seed) for pair in pairs}
        family = design.family_size(contrast.family)
        seen = detectable(contrast.metric, contrast.spread, len(models), family)
        unit = " %" if contrast.metric.endswith("perplexity") else ""
        verdict = "enough" if seen <= contrast.smallest else "too few models"
        table.add_row(
            name,
            f"{len(models)} x {len(seeds) / len(models):g}",
            str(len(pairs)),
            f"{seen:.2g}{unit}" if len(models) > 1 else "nothing of other models",
            f"{contrast.smallest:g}{unit}",
            verdict,
        )
    console.print(table)


def _check_tasks(grid: Grid, measure: Measure, where: str) -> None:
    evaluated = grid.evaluate
    known = [entry.corpus for entry in evaluated.all_perplexities()]
    known += [task.name for task in evaluated.all_tasks()]
    known += [f"{use.name}-{name}" for use in evaluated.suites for name in use.suite.averages]
    for task in measure.tasks:
        if task not in known:
            raise InputError(where, task, f"is not evaluated; {did_you_mean(task, known)}")


def _pairs(grid: Grid, contrast: Contrast, cells: list[Cell], where: str) -> list[Pair]:
    first, second = (
        _selected(cells, contrast.where, side, f"{where}.{name}")
        for name, side in (("of", contrast.of), ("against", contrast.against))
    )
    compared = {*contrast.of, *contrast.against}
    together = [field for field in _fields(grid) if field not in compared]
    by_model: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell in second:
        by_model[cell.model].append(cell)
    rivals = [by_model[cell.model] if "model" in together else second for cell in first]
    found = [
        (cell, other)
        for cell, own in zip(first, rivals, strict=True)
        for other in own
        if cell != other and _agree(cell, other, together)
    ]
    if not found:
        remedy = (
            f"no cell of it agrees with one of against in {', '.join(together)}: select others, or "
            "name in of and against what they differ in"
        )
        raise InputError(f"{where}.of", contrast.of, remedy)
    settings: dict[tuple[Cell, Cell], int] = {}
    return [
        Pair(
            cell,
            other,
            settings.setdefault((_without_draw(cell), _without_draw(other)), len(settings)),
        )
        for cell, other in found
    ]


def _blocks(grid: Grid, choice: Choice, cells: list[Cell], where: str) -> Blocks:
    _check_field(choice.among, f"{where}.among")
    chosen = _selected(cells, choice.where, {}, f"{where}.where")
    chosen = [cell for cell in chosen if _value(cell, choice.among) is not None]
    together = [
        field
        for field in _fields(grid)
        if field != choice.among and all(_value(cell, field) is not None for cell in chosen)
    ]
    names = {cell: _label(cell, choice.among) for cell in chosen}
    candidates = tuple(dict.fromkeys(names.values()))
    if len(candidates) < 2:
        remedy = "has no two values in the chosen cells: name a field that varies in them"
        raise InputError(f"{where}.among", choice.among, remedy)
    blocks: defaultdict[tuple[object, ...], dict[str, Cell]] = defaultdict(dict)
    for cell in chosen:
        key = tuple(_value(cell, field) for field in together)
        if names[cell] in blocks[key]:
            remedy = "has several cells for one model, seed and setting: narrow it down by where"
            raise InputError(f"{where}.among", names[cell], remedy)
        blocks[key][names[cell]] = cell
    for block in blocks.values():
        if len(block) < len(candidates):
            lacking = next(name for name in candidates if name not in block)
            remedy = "lacks a cell where others have one: narrow it down by where"
            raise InputError(f"{where}.among", lacking, remedy)
    settings: dict[Cell, int] = {}
    return Blocks(
        candidates,
        tuple(
            (
                settings.setdefault(_without_draw(block[candidates[0]]), len(settings)),
                tuple(block[name] for name in candidates),
            )
            for block in blocks.values()
        ),
    )


def _selected(cells: list[Cell], where: Selection, side: Selection, field: str) -> list[Cell]:
    """Return the cells with all the values.

    Raises:
        InputError: if there is none.
    """
    both = {**where, **side}
    wanted = {name: _values(name, value, field) for name, value in both.items()}
    found = [
        cell
        for cell in cells
        if all(_value(cell, name) in values for name, values in wanted.items())
    ]
    if not found:
        raise InputError(field, both, "selects no cell of the grid: name values that cells have")
    return found


def _values(name: str, value: object, where: str) -> list[object]:
    """Return the values of a field that a selection names, as cells hold them."""
    _check_field(name, where)
    found = []
    for each in value if isinstance(value, list) else [value]:
        try:
            cell = Cell.model_validate({"model": "", name: each})
        except ValidationError as error:
            raise explained(error, (where,), {name: each}) from error
        found.append(_value(cell, name))
    return found


def _check_field(name: str, where: str) -> None:
    if name not in Cell.model_fields:
        remedy = f"cells have no such field; {did_you_mean(name, Cell.model_fields)}"
        raise InputError(where, name, remedy)


def _value(cell: Cell, name: str) -> object:
    """Return a field, None if it means nothing to the cell; a sparsity with its pattern, since 2:4
    is not 0.5; and what stands for a cell without reconstruction, which means something."""
    if name == "sparsity":
        return cell.sparsity, cell.pattern
    if name == "reconstruction":
        return _label(cell, name)
    value = getattr(cell, name)
    return None if name == "calibration" and value == NO_CALIBRATION else value


def _label(cell: Cell, field: str) -> str:
    value = getattr(cell, field)
    if field == "sparsity":
        return cell.pattern or f"{cell.sparsity:g}"
    if field == "reconstruction":
        return "none" if cell.reconstruction is None else cell.reconstruction.words
    return str(getattr(value, "name", value))


def _fields(grid: Grid) -> list[str]:
    """Return the fields that the grid's author set; all others follow from them."""
    named = {"model", "seed", *grid.cells, *(name for each in grid.include for name in each)}
    return [name for name in Cell.model_fields if name in named]


def _agree(one: Cell, other: Cell, fields: list[str]) -> bool:
    values = ((_value(one, name), _value(other, name)) for name in fields)
    return all(own == others or None in (own, others) for own, others in values)


def _without_draw(cell: Cell) -> Cell:
    return cell.model_copy(update={"model": "", "seed": None})
