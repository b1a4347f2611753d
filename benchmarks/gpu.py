"""Measure all that needs a GPU in under 8 minutes: `python -m benchmarks.gpu --output FILE`.

Wanda, SparseGPT and DSnoT on LLaMA-2-7B's shape, generation and scoring at a vocabulary of 128,000,
and torch's 2:4 products, all with random weights. It needs torch, transformers, pyarrow, pydantic,
typer and rich, but neither Ray nor vLLM. Every part is written as soon as it is measured. If a part
fails, its traceback is written and the others go on. A part that would overrun the budget is
skipped.

    python -m benchmarks.gpu --device cpu --small --output FILE

runs all parts except the 2:4 products on tiny shapes on a CPU, only to show that they run.
"""

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks.floor import floating_point_operations, layer_products, square_product
from benchmarks.geometry import LLAMA_2_7B, Geometry
from benchmarks.measure import SPARSITY, PrunerRow, pruner_spec
from benchmarks.real_model import PREFIX, measure_generation, measure_scoring
from benchmarks.record import machine, write_json
from benchmarks.tables import pruners_table, targets_table
from benchmarks.targets import Target
from benchmarks.timing import best_of, clock
from pipeline.models.matrices import set_to_zero
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.prune import prune_model
from pipeline.pruning.pruners.masks import smallest_in_groups

RUN_SECONDS = 450.0
"""Budget of the whole run: 8 minutes, less the time to load."""

LARGE_VOCABULARY = Geometry("1b", 2048, 8192, 16, 32, 8, 128_000, nsamples=8, seqlen=2048)
"""The shape of Llama 3.2 1B at a vocabulary of 128,000, and the samples that are scored."""

TINY = Geometry("tiny", 64, 128, 2, 4, 2, 512, nsamples=2, seqlen=32)
"""A shape to run everything once without a GPU; its figures mean nothing."""

logger = logging.getLogger("benchmarks")


@dataclass
class GpuReport:
    """All that was measured, skipped and failed."""

    machine: dict[str, Any]
    pruners: list[PrunerRow] = field(default_factory=list)
    figures: list[Target] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each part."""
    skipped: list[str] = field(default_factory=list)
    """Parts that would overrun the budget, or that the device cannot run."""
    failed: dict[str, str] = field(default_factory=dict)
    """Part to traceback."""


@dataclass(frozen=True)
class GpuPart:
    """One measurement."""

    name: str
    expected_seconds: float
    """On an H100; the part is skipped if less of the budget is left."""
    run: Callable[[GpuReport], None]


@dataclass(frozen=True)
class Shapes:
    """The sizes that the parts run on."""

    pruned: Geometry
    generating: Geometry
    samples: int
    """Generated as one batch."""
    tokens: int
    """Of a generated sample."""
    square: int
    """Rows and columns of the large square product."""


LARGE = Shapes(LLAMA_2_7B, LARGE_VOCABULARY, samples=64, tokens=256, square=8192)
SMALL = Shapes(TINY, TINY, samples=4, tokens=16, square=64)


def parts(shapes: Shapes, device: torch.device) -> list[GpuPart]:
    """Return all parts, quick ones first."""
    dtype = torch.bfloat16
    expected = {"wanda": 60.0, "dsnot": 80.0, "sparsegpt": 120.0}

    def two_to_four(report: GpuReport) -> None:
        if device.type != "cuda":
            raise NotImplementedError("torch has 2:4 products on CUDA only")
        report.figures += measure_two_to_four(shapes.pruned, device, dtype)

    def scoring(report: GpuReport) -> None:
        report.figures += scoring_figures(shapes, device, dtype)

    def generation(report: GpuReport) -> None:
        geometry = shapes.generating
        model = geometry.model(device, dtype)
        ids = torch.arange(shapes.samples * PREFIX) % geometry.vocabulary
        prefixes: list[list[int]] = ids.reshape(-1, PREFIX).tolist()
        report.figures += _without_targets(
            measure_generation(model, prefixes, shapes.tokens, rounds=2)
        )

    def pruning(name: str) -> Callable[[GpuReport], None]:
        return lambda report: report.pruners.append(
            prune_once(shapes.pruned, name, device, dtype, shapes.square)
        )

    return [
        GpuPart("2:4 products", 15.0, two_to_four),
        GpuPart("scoring", 30.0, scoring),
        GpuPart("generation", 90.0, generation),
        *(GpuPart(name, seconds, pruning(name)) for name, seconds in expected.items()),
    ]


def run_parts(planned: Sequence[GpuPart], report: GpuReport, save: Callable[[], object]) -> None:
    """Run parts in order, as long as the budget lasts, and add their figures to the report.

    Args:
        save: called after each part.
    """
    start = time.perf_counter()
    for part in planned:
        began = time.perf_counter()
        left = RUN_SECONDS - (began - start)
        if part.expected_seconds > left:
            report.skipped.append(f"{part.name}: {left:.0f} s were left of {RUN_SECONDS:.0f}")
            save()
            continue
        logger.info("%s", part.name)
        try:
            part.run(report)
        except NotImplementedError as error:
            report.skipped.append(f"{part.name}: {error}")
        except Exception:  # the GPU may not be available again: the other parts go on
            report.failed[part.name] = traceback.format_exc()
        report.seconds[part.name] = time.perf_counter() - began
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        save()


def prune_once(
    geometry: Geometry, name: str, device: torch.device, dtype: torch.dtype, square: int
) -> PrunerRow:
    """Time one run of a pruner, after one on a single layer with few windows.

    Args:
        square: rows and columns of the large square product.
    """
    pruner = pruner_spec(name)
    few = replace(geometry, layers=1, nsamples=min(8, geometry.nsamples))
    prune_model(few.model(device, dtype), few.windows(), pruner, ModelTarget(LayerTarget(SPARSITY)))
    layer_operations, multiply_layer = layer_products(geometry, device, dtype)
    square_operations, multiply_square = square_product(square, device, dtype)
    rates = best_of(
        {"layer": lambda: multiply_layer, "square": lambda: multiply_square}, 1.0, device
    )
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    model, windows = geometry.model(device, dtype), geometry.windows()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start = clock(device)
    prune_model(model, windows, pruner, ModelTarget(LayerTarget(SPARSITY)))
    seconds = clock(device) - start
    return PrunerRow(
        geometry=geometry.name,
        pruner=name,
        seconds=seconds,
        plain_seconds=None,
        agreement=None,
        floating_point_operations=floating_point_operations(geometry, name),
        layer_rate=layer_operations / rates["layer"],
        square_rate=square_operations / rates["square"],
        peak_bytes=torch.cuda.max_memory_allocated(device) - before if cuda else None,
    )


def scoring_figures(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> list[Target]:
    """Measure scoring, and the share of the device's matrix rate that its products reach."""
    geometry = shapes.generating
    model, windows = geometry.model(device, dtype), geometry.windows()
    measure_scoring(model, windows, rounds=1)  # first calls allocate
    found = _without_targets(measure_scoring(model, windows, rounds=3))
    operations, multiply = square_product(shapes.square, device, dtype)
    rate = operations / best_of({"square": lambda: multiply}, 1.0, device)["square"]
    weights = sum(rows * columns for group in geometry.matrices for rows, columns in group)
    attention = geometry.seqlen * geometry.hidden  # two products, causal halves
    body = geometry.layers * (weights + attention)
    token_operations = 2 * (body + geometry.hidden * geometry.vocabulary)
    reached = found[0].reached * token_operations / rate
    return [*found, Target("scoring: share of the matrix rate", None, reached)]


def measure_two_to_four(
    geometry: Geometry, device: torch.device, dtype: torch.dtype
) -> list[Target]:
    """Compare torch's semi-structured products with dense ones, from one token to 8,192."""
    found = []
    for rows, columns in sorted({shape for group in geometry.matrices for shape in group}):
        weight = torch.randn(rows, columns, device=device).to(dtype)
        set_to_zero(weight, smallest_in_groups(weight.float().abs(), 2, 4))
        packed = torch.sparse.to_sparse_semi_structured(weight)
        for tokens in (1, 64, 8192):
            inputs = torch.randn(tokens, columns, device=device).to(dtype)
            products = {
                name: _product(inputs, each) for name, each in (("dense", weight), ("2:4", packed))
            }
            torch.testing.assert_close(
                products["2:4"](), products["dense"](), rtol=0.05, atol=0.05 * columns**0.5
            )
            seconds = best_of({name: _often(run) for name, run in products.items()}, 0.2, device)
            what = f"2:4, {rows} x {columns}, {tokens} tokens: times dense"
            found.append(Target(what, None, seconds["dense"] / seconds["2:4"]))
    return found


def _product(inputs: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: nn.functional.linear(inputs, weight)


def _often(run: Callable[[], object]) -> Callable[[], Callable[[], object]]:
    def repeat() -> None:
        for _ in range(20):  # one is too short for the clock
            run()

    return lambda: repeat


def _without_targets(found: list[Target]) -> list[Target]:
    """Drop the wanted values: they hold for a CPU."""
    return [replace(each, wanted=None) for each in found]


def main(
    output: Annotated[Path, typer.Option(help="JSON file of all that was measured.")],
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cuda",
    small: Annotated[
        bool, typer.Option(help="Use tiny shapes, to see that everything runs.")
    ] = False,
) -> None:
    """Measure everything; write each part at once, and print all in the end."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "--device: torch sees no GPU: make it visible, or give --device cpu --small"
        )
    if device == "cpu" and not small:
        raise typer.BadParameter("--device: cpu takes hours on these shapes: add --small")
    chosen = torch.device(device)
    report = GpuReport(machine(chosen, torch.bfloat16))
    planned = parts(SMALL if small else LARGE, chosen)
    run_parts(planned, report, lambda: write_json(output, report))
    console = Console(width=120)
    console.print(pruners_table(report.pruners))
    console.print(targets_table(report.figures))
    for line in report.skipped:
        console.print(f"skipped: {line}")
    for name, trace in report.failed.items():
        console.print(f"failed: {name}\n{trace}", markup=False)
    raise typer.Exit(1 if report.failed else 0)


if __name__ == "__main__":
    typer.run(main)
