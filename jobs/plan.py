"""From a grid to the deduplicated graph of its stages."""

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from cluster.graph import Graph, Resources, Stage, needed
from cluster.store import Store
from jobs.cells import Cell, describe_spec, evaluate_spec, expand
from jobs.cost import (
    CORE_FLOPS,
    GPU_FLOPS,
    ModelSize,
    Sizes,
    estimate,
    expected_seconds,
    model_name,
    model_size,
)
from jobs.footprint import Footprint, Shape, footprint, pretrained_shape, shape_of
from jobs.grid import GeneratedCalibration, Grid, lines_of
from jobs.labels import labels
from jobs.memory import ReadsTexts, least_gpu_bytes, reads_by_layer
from jobs.sizes import checkpoint_parameters, tensor_shapes
from jobs.stages import LINES, STAGES, StageWork, line_of, stage_name
from pipeline.specs import (
    GenerateSpec,
    OutliersSpec,
    PretrainSpec,
    PruneSpec,
    ShardedSpec,
    ShardSpec,
    StageSpec,
    Vllm,
    WindowsSpec,
)


@dataclass(frozen=True)
class Plan:
    """A grid's cells and their stages."""

    grid: Grid
    cells: dict[str, Cell]
    """Key of each cell's last stage to the cell."""
    descriptions: dict[str, str]
    """Key of each cell's last stage to that of the description of its calibration set, if any."""
    specs: dict[str, StageSpec]
    """Every unique stage, each after its inputs."""
    graph: Graph
    sizes: Sizes
    """Of the models whose size is known."""
    shapes: dict[str, Shape]
    """Shapes by the same names, if the model's files or its configuration are here."""
    targets: list[str]
    """Keys of the stages that it is for."""


def make_plan(grid: Grid, of_cells: Iterable[Cell] | None = None) -> Plan:
    """Expand the grid and deduplicate its stages.

    Args:
        of_cells: these cells in place of the grid's own.

    Raises:
        InputError: naming field, value and remedy.
    """
    cells: dict[str, Cell] = {}
    specs: dict[str, StageSpec] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    descriptions: dict[str, str] = {}
    sets: dict[Cell, WindowsSpec] = {}
    with lines_of(grid):
        for cell in expand(grid) if of_cells is None else of_cells:
            last = evaluate_spec(grid, cell, sets)
            cells[last.key] = cell
            _collect(last, specs, inputs)
            description = describe_spec(grid, cell, sets)
            if description is not None:
                _collect(description, specs, inputs)
                descriptions[last.key] = description.key
    shapes = model_shapes(grid)
    sizes = model_sizes(grid, shapes)
    named = labels(cells, descriptions, specs, inputs)
    graph = {key: _stage(grid, spec, inputs[key], named[key], sizes) for key, spec in specs.items()}
    return Plan(
        grid=grid,
        cells=cells,
        descriptions=descriptions,
        specs=specs,
        graph=graph,
        sizes=sizes,
        shapes=shapes,
        targets=list(dict.fromkeys([*cells, *descriptions.values()])),
    )


def plan_for(plan: Plan, targets: Collection[str]) -> Plan:
    """Return the part of a plan that makes some of its stages; it has no cells."""
    keys = set(needed(plan.graph, targets, ()))
    return replace(
        plan,
        cells={},
        descriptions={},
        specs={key: spec for key, spec in plan.specs.items() if key in keys},
        graph={key: stage for key, stage in plan.graph.items() if key in keys},
        targets=list(dict.fromkeys(targets)),
    )


def machine_bytes() -> int:
    """Return this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class StageCount:
    """One line of a printed plan."""

    stage: str
    unique: int
    stored: int
    to_make: int
    device_hours: float
    gigabytes: float


def count_stages(plan: Plan, stored: Collection[str]) -> list[StageCount]:
    """Count the stages of each line, in the order of `jobs.stages.STAGES`.

    Args:
        stored: keys that the store holds.
    """
    missing = set(needed(plan.graph, plan.targets, stored))
    by_line: dict[str, list[str]] = {line: [] for line in LINES}
    for key, spec in plan.specs.items():
        by_line[line_of(spec)].append(key)
    lines = []
    for stage, keys in by_line.items():
        to_make = [key for key in keys if key in missing]
        guesses = [
            estimate(plan.specs[key], plan.grid.cost, plan.sizes, plan.graph[key].resources)
            for key in to_make
        ]
        known = [guess for guess in guesses if guess is not None]
        lines.append(
            StageCount(
                stage=stage,
                unique=len(keys),
                stored=sum(key in stored for key in keys),
                to_make=len(to_make),
                device_hours=sum(guess.seconds for guess in known) / 3600,
                gigabytes=sum(guess.bytes for guess in known) / 1e9,
            )
        )
    return [line for line in lines if line.unique]


def plan_counts(plan: Plan, stored: Collection[str]) -> dict[str, Any]:
    """Return what `print_plan` counts, for programs."""
    stages = {line.stage: asdict(line) for line in count_stages(plan, stored)}
    return {"grid": plan.grid.name, "cells": len(plan.cells), "stages": stages}


def print_plan(plan: Plan, store: Store, console: Console) -> None:
    """Print cells, unique stages, what the store holds, and the estimate."""
    lines = count_stages(plan, store.keys())
    table = Table(title=f"{plan.grid.name}: {len(plan.cells)} cells", show_footer=True)
    table.add_column("stage", footer="all")
    for heading, field, form in (
        ("unique", "unique", "d"),
        ("in store", "stored", "d"),
        ("to make", "to_make", "d"),
        ("device hours", "device_hours", ",.2f"),
        ("GB to store", "gigabytes", ",.2f"),
    ):
        total = sum(getattr(line, field) for line in lines)
        table.add_column(heading, footer=format(total, form), justify="right")
    for line in lines:
        table.add_row(
            line.stage,
            str(line.unique),
            str(line.stored),
            str(line.to_make),
            f"{line.device_hours:,.2f}",
            f"{line.gigabytes:,.2f}",
        )
    console.print(table)
    console.print(f"store: {store.url}", soft_wrap=True)
    console.print(f"estimate: {_rests_on(plan)}; jobs/cost.py states the model", soft_wrap=True)
    for name, chosen in plan.grid.auto_dtypes.items():
        console.print(f"models.{name}: {chosen}", soft_wrap=True)
    for name, calibration in plan.grid.calibrations.items():
        if isinstance(calibration, GeneratedCalibration):
            console.print(f"calibrations.{name}: {_engine(calibration.backend)} generates")
    if isinstance(plan.grid.evaluate.backend, Vllm):
        console.print(f"evaluate: {_engine(plan.grid.evaluate.backend)} answers tasks")
    _print_footprints(plan, console)
    for reading in _read_by_layer(plan):
        console.print(reading, soft_wrap=True)
    for name, model in plan.grid.models.items():
        if model_size(model, plan.sizes) is None:
            console.print(f"not in the estimate: model {name}; give cost.parameters.{name}")


def _print_footprints(plan: Plan, console: Console) -> None:
    """Print what a stage of each kind takes at its peak."""
    machine = machine_bytes()
    found = footprints(plan, plan.specs, None, machine)
    if not found:
        return
    table = Table(title="largest peak of a stage, estimated (docs/scale.md)")
    for heading in ("stage", "model", "weights"):
        table.add_column(heading)
    for heading in ("GPU GB", "host GB", "temporary GB"):
        table.add_column(heading, justify="right")
    for (kind, name), each in found.items():
        amounts = [f"{size / 1e9:,.2f}" if size else "-" for size in each.peaks]
        table.add_row(kind, name, "by layer" if each.streamed else "whole", *amounts)
    console.print(table)
    console.print(
        f"this machine has {machine / 1e9:,.1f} GB; a run compares with the cluster's nodes",
        soft_wrap=True,
    )


def _rests_on(plan: Plan) -> str:
    given = plan.grid.cost.flops_per_second
    if given is not None:
        return f"{given:.3g} FLOP/s for a stage (cost.flops_per_second)"
    on_gpus = any(stage.resources.gpus for stage in plan.graph.values())
    per = [f"{CORE_FLOPS:.3g} FLOP/s a CPU core", *([f"{GPU_FLOPS:.3g} a GPU"] if on_gpus else [])]
    return f"{' and '.join(per)} that a stage asks for; a run scales it by what it measures"


def _read_by_layer(plan: Plan) -> Iterable[str]:
    """Return a line for each stage and model that it reads, or may read, by layer."""
    lines: dict[str, None] = {}
    for key, stage in plan.specs.items():
        spec = stage.of if isinstance(stage, ShardSpec) else stage
        if not isinstance(spec, ReadsTexts) or isinstance(stage, ShardedSpec):
            continue
        of = (plan.sizes, plan.graph[key].resources)
        why, least = reads_by_layer(spec, *of), least_gpu_bytes(spec, *of)
        if why is None and least is not None:
            why = f"on a GPU with less than {least / 1e9:,.0f} GB"
        if why is not None:
            name = model_name(spec.model)
            lines[f"{spec.kind}: reads {name} one decoder layer at a time: {why}"] = None
    return lines


def _engine(backend: Literal["transformers"] | Vllm) -> str:
    if not isinstance(backend, Vllm):
        return backend
    set_fields = backend.model_dump(exclude={"name"}, exclude_defaults=True)
    return " ".join(["vllm", *(f"{field}={value}" for field, value in set_fields.items())])


def _collect(
    spec: StageSpec, into: dict[str, StageSpec], inputs: dict[str, tuple[str, ...]]
) -> None:
    """Add a stage and all before it, inputs first."""
    if spec.key not in into:
        all_before = spec.inputs()
        for before in all_before:
            _collect(before, into, inputs)
        into[spec.key] = spec
        inputs[spec.key] = tuple(before.key for before in all_before)


def model_sizes(grid: Grid, shapes: Mapping[str, Shape]) -> dict[str, ModelSize]:
    """Return sizes by hub name or path: by the grid's number, or by the model's files."""
    sizes: dict[str, ModelSize] = {}
    for own, model in grid.models.items():
        if isinstance(model, PretrainSpec):
            continue  # its spec gives them
        name, stated = model_name(model), grid.cost.parameters.get(own)
        if not stated and name in shapes:
            sizes[name] = shapes[name].size
            continue
        counted = stated or checkpoint_parameters(model)
        if counted is not None:
            sizes[name] = ModelSize.of(counted)
    return sizes


def model_shapes(grid: Grid) -> dict[str, Shape]:
    """Return shapes by hub name or path; for the testbed's models by their kind, the largest."""
    shapes: dict[str, Shape] = {}
    for model in grid.models.values():
        if isinstance(model, PretrainSpec):
            shape: Shape | None = pretrained_shape(model)
        else:
            tensors = tensor_shapes(model)
            shape = None if tensors is None else shape_of(tensors)
        name = model_name(model)
        if shape is not None and (name not in shapes or shapes[name].weights < shape.weights):
            shapes[name] = shape
    return shapes


def footprints(
    plan: Plan, keys: Iterable[str], gpu_bytes: float | None, host_bytes: float
) -> dict[tuple[str, str], Footprint]:
    """Return the largest footprint by kind of stage and name of the model, if its shape is known.

    Args:
        keys: of the stages.
        gpu_bytes: memory of a GPU, if it is known.
        host_bytes: memory of a node.
    """
    largest: dict[tuple[str, str], Footprint] = {}
    asked = plan.grid.resources
    budgets = {kind: each.settings(kind) for kind, each in asked.items()}
    for key in keys:
        stage = plan.specs[key]
        made: Any = stage.of if isinstance(stage, ShardSpec) else stage
        name = model_name(made.model) if hasattr(made, "model") else None
        if name not in plan.shapes:
            continue
        resources = plan.graph[key].resources
        memory = gpu_bytes if resources.gpus else resources.memory_bytes or host_bytes
        budget = budgets.get(made.kind)
        found = footprint(stage, plan.shapes[name], resources, memory, budget)
        if found is not None:
            place = made.kind, name
            largest[place] = max(largest.get(place, found), found, key=lambda each: each.peaks)
    return largest


def _stage(
    grid: Grid,
    spec: StageSpec,
    inputs: tuple[str, ...],
    label: str,
    sizes: Sizes,
) -> Stage:
    name = stage_name(spec)
    asked = grid.resources.get(name)
    joins = isinstance(spec, ShardedSpec)  # without a device
    resources = Resources() if asked is None or joins else asked.resources()
    resources = replace(resources, actors=min(resources.actors, _groups(spec)))
    settings = {} if asked is None or joins else asked.settings(name)
    return Stage(
        key=spec.key,
        kind=name,
        label=label,
        spec=spec.lineage,
        payload=StageWork(spec=spec, settings=settings).model_dump_json(),
        inputs=inputs,
        resources=resources,
        seconds=expected_seconds(spec, grid.cost, sizes, resources),
        pool=_pool(spec, shared=resources.actors > 1),
    )


def _groups(spec: StageSpec) -> int:
    """Return how many actors can share a stage."""
    match spec:
        case PruneSpec():
            return spec.window_groups if spec.pruner.calibrated else 1
        case OutliersSpec():
            return spec.window_groups
        case _:
            return 1


def _pool(spec: StageSpec, shared: bool) -> str | None:
    """Name what an actor keeps loaded: a model, or an engine for its longest text and batch."""
    name = stage_name(spec)
    keeps = STAGES[name].keeps_model or shared  # only actors of a pool have helpers
    if not keeps or isinstance(spec, ShardedSpec):
        return None
    made: Any = spec.of if isinstance(spec, ShardSpec) else spec
    engine = ""
    if isinstance(made, GenerateSpec) and isinstance(made.backend, Vllm):
        engine = f" {made.backend} {made.seqlen} {made.shard_size}"
    actors = " shared" if shared else ""
    return f"{name} {made.model}{engine}{actors}"
