"""Measure how fast models are pruned: `python -m benchmarks.prune`, or `make bench`.

All that is compared is measured in one run, in turns.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
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
from benchmarks.record import machine, write_json
from benchmarks.tables import growth_table, masks_table, pruners_table, targets_table
from benchmarks.targets import Target, targets
from pipeline.models.heap import keep_freed_memory

_BUDGET_SECONDS = 6.0
"""Of each comparison, unless its fewest rounds take longer."""

logger = logging.getLogger("benchmarks")


@dataclass(frozen=True)
class PruningReport:
    """All that was measured in one run."""

    machine: dict[str, Any]
    pruners: list[PrunerRow]
    masks: list[MaskRow]
    growth: list[GrowthRow]
    targets: list[Target]


def measure_pruning(
    geometries: Sequence[Geometry],
    growing: Geometry,
    device: torch.device,
    dtype: torch.dtype,
    plainly: bool,
    square: int,
    budget_seconds: float,
) -> PruningReport:
    """Measure every pruner on every geometry, the choice of masks, and growth.

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
    return PruningReport(machine(device, dtype), pruners, masks, growth, targets(pruners, masks))


def print_tables(report: PruningReport, console: Console) -> None:
    """Print the tables."""
    console.print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    console.print(pruners_table(report.pruners))
    console.print(masks_table(report.masks))
    console.print(growth_table(report.growth))
    console.print(targets_table(report.targets))


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
    keep_freed_memory()  # as every stage does; it holds for the plain implementations too
    chosen = torch.device(device)
    if device == "cuda":
        report = measure_pruning(
            [LLAMA_2_7B], GROWING, chosen, torch.bfloat16, False, 8192, _BUDGET_SECONDS
        )
    else:
        report = measure_pruning(
            [TESTBED, MIDDLE], GROWING, chosen, torch.float32, True, 2048, _BUDGET_SECONDS
        )
    print_tables(report, Console(width=120))
    write_json(output, report)


if __name__ == "__main__":
    typer.run(main)
