"""Measure how fast models are pruned: `python -m benchmarks.prune`, or `make bench`.

Everything that is compared is measured in one run, taking turns.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from benchmarks.geometry import GROWING, LLAMA_2_7B, MIDDLE, TESTBED, Geometry
from benchmarks.measure import (
    PRUNER_NAMES,
    GrowthRow,
    MaskRow,
    PrunerRow,
    measure_growth,
    measure_masks,
    measure_pruner,
)
from benchmarks.tables import growth_table, masks_table, pruners_table, targets_table
from benchmarks.targets import Target, targets

BUDGET_SECONDS = 6.0
"""Of each comparison, unless its rounds at the least take longer."""

logger = logging.getLogger("benchmarks")


@dataclass(frozen=True)
class Report:
    """All that was measured in one run."""

    machine: dict[str, Any]
    pruners: list[PrunerRow]
    masks: list[MaskRow]
    growth: list[GrowthRow]
    targets: list[Target]


def measure(
    geometries: Sequence[Geometry],
    growing: Geometry,
    device: torch.device,
    dtype: torch.dtype,
    plainly: bool,
    square: int,
    budget_seconds: float,
) -> Report:
    """Measure every pruner on every geometry, the masks of their largest matrices, and growth.

    Args:
        growing: the geometry whose layers and windows are multiplied.
        plainly: whether to run the plain implementations too.
        square: rows and columns of the large square product.
        budget_seconds: of each comparison, see `benchmarks.timing.best_of`.
    """
    pruners = [
        measure_pruner(geometry, name, device, dtype, plainly, square, budget_seconds)
        for geometry in geometries
        for name in PRUNER_NAMES
    ]
    masks = [
        measure_masks(geometry.intermediate, geometry.hidden, device, budget_seconds)
        for geometry in geometries
    ]
    growth = [
        measure_growth(growing, name, axis, device, dtype, budget_seconds)
        for name in PRUNER_NAMES
        for axis in ("layers", "nsamples")
    ]
    return Report(machine(device, dtype), pruners, masks, growth, targets(pruners, masks))


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the figures of a run hold for."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }


def show(report: Report, console: Console) -> None:
    """Print the tables."""
    console.print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    console.print(pruners_table(report.pruners))
    console.print(masks_table(report.masks))
    console.print(growth_table(report.growth))
    console.print(targets_table(report.targets))


def as_json(report: object) -> str:
    """A dataclass of what was measured, with all that follows from it, such as ratios."""
    return json.dumps(_plain(report), indent=2) + "\n"


def _plain(value: object) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not is_dataclass(value):
        return value
    derived = [name for name, each in vars(type(value)).items() if isinstance(each, property)]
    names = [each.name for each in fields(value)] + derived
    return {name: _plain(getattr(value, name)) for name in names}


def main(
    device: Annotated[
        Literal["cpu", "cuda"],
        typer.Option(help="cuda measures the shape of LLaMA-2-7B in bfloat16."),
    ] = "cpu",
    output: Annotated[Path, typer.Option(help="JSON file of all that was measured.")] = Path(
        "benchmark.json"
    ),
) -> None:
    """Time the pruners against their plain implementations and the machine's matrix rate."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    from cluster.heap import keep_freed_memory  # here: benchmarks.gpu needs nothing of cluster

    keep_freed_memory()  # as every stage does; the plain implementations have it too
    chosen = torch.device(device)
    if device == "cuda":
        report = measure([LLAMA_2_7B], GROWING, chosen, torch.bfloat16, False, 8192, BUDGET_SECONDS)
    else:
        report = measure(
            [TESTBED, MIDDLE], GROWING, chosen, torch.float32, True, 2048, BUDGET_SECONDS
        )
    show(report, Console(width=120))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(as_json(report))


if __name__ == "__main__":
    typer.run(main)
