"""Compare perplexities by layer with those of a model in memory: `python -m benchmarks.streamed`.

The model is that of `python -m jobs prepare`, in float32. Both ways run in turns in one process, on
one thread. The memory by layer is that of a process of its own.
"""

import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.footprint import watched
from benchmarks.real_model import on_cpu, real_windows
from benchmarks.record import machine, write_json
from benchmarks.tables import targets_table
from benchmarks.targets import Target
from benchmarks.timing import median_seconds
from pipeline.evaluation.perplexity import ScoredWindow, batches, losses
from pipeline.models.heap import keep_freed_memory
from pipeline.models.loading import stream_model
from pipeline.models.memory import BATCH_TOKENS
from pipeline.models.output_layer import OutputLayer
from pipeline.real.prepare import REAL_FOLDER
from pipeline.specs import LocalModel

_CPU = torch.device("cpu")

_SLOWER = 1.3
"""The longest time by layer, in times of the model in memory."""

_MEMORY = 0.6
"""The most memory by layer beyond that of the libraries, as a share of the model's bytes."""


@dataclass(frozen=True)
class Report:
    """All that was measured in one run."""

    machine: dict[str, Any]
    windows: int
    seqlen: int
    targets: list[Target]


def in_files(folder: Path, scratch: Path) -> Any:
    """Load a folder's model but for its decoder layers."""
    return stream_model(LocalModel(path=str(folder), dtype="float32"), {}, scratch, _CPU)


def windows_of(folder: Path, nsamples: int, seqlen: int) -> list[ScoredWindow]:
    """Return windows of real text."""
    rows = real_windows(AutoTokenizer.from_pretrained(folder), nsamples, seqlen)
    return [ScoredWindow(row.numpy(), 1, 0, 0) for row in rows]


def window_losses(model: Any, windows: list[ScoredWindow]) -> list[float]:
    """Return the loss of each window, all of one length."""
    layer = OutputLayer(model)
    places = batches(windows, BATCH_TOKENS, None, layer.lengths)
    batched = [[windows[place] for place in batch] for batch in places]
    return [loss for batch in losses(layer, batched) for loss in batch]


def compare(folder: Path, windows: list[ScoredWindow], rounds: int) -> list[Target]:
    """Measure the CPU and wall seconds of both ways, and how far their losses are apart."""
    found: dict[str, list[float]] = {}
    wall: dict[str, list[float]] = {"whole": [], "by layer": []}
    with tempfile.TemporaryDirectory() as scratch:
        models = {"whole": on_cpu(folder, "float32"), "by layer": in_files(folder, Path(scratch))}

        def run(way: str) -> None:
            start = time.perf_counter()
            found[way] = window_losses(models[way], windows)
            wall[way].append(time.perf_counter() - start)

        ways = {way: lambda way=way: lambda: run(way) for way in models}
        seconds = median_seconds(ways, rounds, _CPU)
    apart = np.max(np.abs(np.array(found["by layer"]) / np.array(found["whole"]) - 1))
    times = seconds["by layer"] / seconds["whole"]
    return [
        Target("in memory: CPU seconds", None, seconds["whole"]),
        Target("by layer: times in memory, CPU", _SLOWER, times, at_most=True),
        Target(
            "by layer: times in memory, wall",
            _SLOWER,
            float(np.median(wall["by layer"]) / np.median(wall["whole"])),
            at_most=True,
        ),
        Target("losses: difference, in millionths", 10.0, 1e6 * float(apart), at_most=True),
    ]


def peak_bytes(folder: Path, windows: list[ScoredWindow]) -> int:
    """Return the most memory that opening the model and measuring by layer takes beyond what the
    process has now.

    Pages of mapped files do not count: the system may drop them.
    """
    torch.set_num_threads(1)
    keep_freed_memory()  # as a worker does; without it glibc's heap grows with every layer
    torch.ones(256, 256) @ torch.ones(256, 256)  # sets up the libraries
    with tempfile.TemporaryDirectory() as scratch:
        before, highest = watched(lambda: window_losses(in_files(folder, Path(scratch)), windows))
    return highest - before


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path(REAL_FOLDER, "model"),
    windows: Annotated[int, typer.Option(min=1)] = 64,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Compare both ways, and measure the memory of the one by layer."""
    torch.set_num_threads(1)
    given = windows_of(model, windows, seqlen)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    targets = compare(model, given, rounds)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        share = pool.apply(peak_bytes, (model, given)) / size
    targets.append(
        Target("by layer: memory, as a share of the model's bytes", _MEMORY, share, at_most=True)
    )
    Console(width=100).print(targets_table(targets))
    write_json(output, Report(machine(_CPU, torch.float32), windows, seqlen, targets))


if __name__ == "__main__":
    typer.run(main)
