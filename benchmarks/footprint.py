"""Compare the memory that stages take with `jobs.footprint`: `python -m benchmarks.footprint`.

Every stage runs in a process of its own, as on a worker, on a model with random weights. Its memory
is counted without pages of mapped files, which the system may drop. The checkpoint is in bfloat16
and the model in float32, so no weight is such a page.

    python -m benchmarks.footprint --scale

prints what the model says of Llamas on 1, 8 and 64 GPUs; it measures nothing.
"""

import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from cluster.graph import Resources
from jobs.cost import LOAD_SECONDS, estimate
from jobs.footprint import Shape, exchanged_bytes, footprint, llama_shape, shape_of
from jobs.grid import Cost
from jobs.sizes import tensor_shapes
from jobs.stages import STAGES
from pipeline.real.prepare import REAL_FOLDER
from pipeline.specs import (
    ALPS,
    GPTQ,
    DescribeSpec,
    EvaluateSpec,
    FileCorpus,
    FirstLayers,
    HubCorpus,
    HubModel,
    LocalModel,
    PerplexitySpec,
    PruneSpec,
    Reconstruction,
    SparseGPT,
    StageSpec,
    Wanda,
    WindowsSpec,
)

VOCABULARY = 49_152
"""That of the tokenizer of `python -m jobs prepare`."""

NETWORK_BYTES = 12.5e9
"""Bytes per second that a GPU's actor receives: a network of 100 Gb/s. Assumed."""

WIDE_GPU = 80e9
"""Memory of the GPU that `--scale` plans for."""


class Measured(NamedTuple):
    """One stage."""

    what: str
    bytes: int
    libraries: int
    """What its process had before it began."""
    modelled: float
    seconds: float
    """Of CPU."""
    estimated: float


# ---------------------------------------------------------------------------------------- measured


def save_model(folder: Path, layers: int, hidden: int, mlp: int, heads: tuple[int, int]) -> None:
    """Write a Llama with random weights, in bfloat16, and a tokenizer."""
    import torch

    from benchmarks.geometry import Geometry

    shape = Geometry("random", hidden, mlp, layers, *heads, VOCABULARY, nsamples=1, seqlen=4096)
    shape.model(torch.device("cpu"), torch.bfloat16).save_pretrained(folder)
    for path in Path(REAL_FOLDER, "model").glob("tokenizer*"):
        shutil.copy(path, folder)


def stages_of(windows: WindowsSpec, text: Path) -> Iterator[StageSpec]:
    """Yield the stages to measure: prunings, scores and a perplexity.

    Args:
        windows: a calibration set; the model and the sizes are its own.
        text: for the perplexity.
    """
    model = windows.model
    for pruner in (Wanda(), SparseGPT()):
        yield PruneSpec(model=model, pruner=pruner, sparsity=0.5, calibration=windows)
    yield DescribeSpec(model=model, calibration=windows)
    entry = PerplexitySpec(
        name="text",
        corpus=FileCorpus(path=str(text)),
        seqlen=windows.seqlen,
        max_windows=windows.nsamples,
    )
    yield EvaluateSpec(model=model, perplexity=(entry,), tasks=())


def costly_prunings(windows: WindowsSpec) -> Iterator[PruneSpec]:
    """Yield prunings of the first layers that hold more than a mask's statistics."""
    share = FirstLayers(share=0.1)
    yield PruneSpec(
        model=windows.model, pruner=GPTQ(), sparsity=0.0, calibration=windows, allocation=share
    )
    for pruner, reconstruction in ((ALPS(), None), (Wanda(), Reconstruction(epochs=1))):
        yield PruneSpec(
            model=windows.model,
            pruner=pruner,
            sparsity=0.5,
            calibration=windows,
            allocation=share,
            reconstruction=reconstruction,
        )


def peak(spec: Any, artifacts: dict[str, Path], memory: dict[str, int]) -> tuple[int, int, float]:
    """Run a stage; return the most memory of the process, what it has now, and CPU seconds."""
    import importlib

    import torch

    from pipeline.models.heap import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    module = importlib.import_module(STAGES[spec.kind].module)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as output:
        before, highest = watched(lambda: module.run(spec, artifacts, Path(output), **memory))
    return highest, before, time.process_time() - start


def watched(run: Callable[[], object]) -> tuple[int, int]:
    """Return this process's memory before a function runs, and the most meanwhile."""
    before = highest = own_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(timeout=0.005):
            highest = max(highest, own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return before, highest


def own_bytes() -> int:
    """Return this process's memory without pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def measure(folder: Path, nsamples: int, seqlen: int, rate: float) -> Iterator[Measured]:
    """Yield what each stage took on a folder's model, and what was modelled.

    Args:
        rate: FLOP per second of the model's matrix products on one thread.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = LocalModel(path=str(folder), dtype="float32")
    shape = shape_of(tensor_shapes(model) or {})
    assert shape is not None
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {n} of a text about nothing" for n in range(20_000)))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    calibrated = WindowsSpec(
        source=HubCorpus(path="none"), model=model, nsamples=nsamples, seqlen=seqlen
    )
    for spec in (*stages_of(calibrated, text), *costly_prunings(calibrated)):
        artifacts: dict[str, Path] = {}
        calibration = getattr(spec, "calibration", None)
        if calibration is not None:
            artifacts[calibration.key] = folder / "windows"
            artifacts[calibration.key].mkdir(exist_ok=True)
            ids = [
                [(row * seqlen + n) % 40_000 + 1 for n in range(seqlen)] for row in range(nsamples)
            ]
            pq.write_table(pa.table({"token_ids": ids}), folder / "windows" / "windows.parquet")
        ways: list[int | None] = [None] if isinstance(spec, PruneSpec) else [1, machine]
        for memory in ways:
            given = {} if memory is None else {"memory_bytes": memory}
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                taken, libraries, seconds = pool.apply(peak, (spec, artifacts, given))
            found = footprint(spec, shape, Resources(), memory)
            guess = estimate(spec, Cost(flops_per_second=rate), {str(folder): shape.size})
            assert found is not None
            assert guess is not None
            name = spec.pruner.name if isinstance(spec, PruneSpec) else spec.kind
            fitted = isinstance(spec, PruneSpec) and spec.reconstruction is not None
            way = "fitted" if fitted else "by layer" if found.streamed else "whole"
            yield Measured(
                f"{name}, {way}",
                taken,
                libraries,
                found.peaks[1],
                seconds,
                guess.seconds,
            )


def thread_rate(shape: Shape, tokens: int) -> float:
    """Return FLOP per CPU second of a decoder layer's products."""
    import torch

    inputs = {width: torch.randn(tokens, width) for width in shape.inputs.values()}
    weights = [torch.randn(matrix.rows, matrix.columns) for matrix in shape.matrices]
    start = time.process_time()
    for weight in weights:
        inputs[weight.shape[1]] @ weight.T
    work = 2 * tokens * sum(matrix.weights for matrix in shape.matrices)
    return work / (time.process_time() - start)


# ------------------------------------------------------------------------------------------- scale

LLAMAS = {
    "LLaMA-2-7B": llama_shape(32, 4096, 11_008, 4096, 32_000, tied=False),
    "LLaMA-2-13B": llama_shape(40, 5120, 13_824, 5120, 32_000, tied=False),
    "LLaMA-2-70B": llama_shape(80, 8192, 28_672, 1024, 32_000, tied=False),
    "Llama-3.1-405B": llama_shape(126, 16_384, 53_248, 1024, 128_256, tied=False),
}
"""Shapes by name."""


def scale_table() -> Table:
    """Return the modelled time and memory of a pruning and a perplexity of each Llama."""
    table = Table(title="modelled, not measured: bfloat16, 128 x 2,048 tokens, GPUs of 80 GB")
    for heading in ("model", "stage", "GPUs", "hours", "GPU GB", "host GB", "network GB"):
        table.add_column(heading, justify="left" if heading in ("model", "stage") else "right")
    for name, shape in LLAMAS.items():
        model = HubModel(name=name, dtype="bfloat16")
        calibration = WindowsSpec(
            source=HubCorpus(path="none"), model=model, nsamples=128, seqlen=2048
        )
        text = PerplexitySpec(name="text", corpus=HubCorpus(path="none"), max_windows=166)
        for pruner in (Wanda(), SparseGPT()):
            spec = PruneSpec(model=model, pruner=pruner, sparsity=0.5, calibration=calibration)
            for gpus in (1, 8, 64):
                table.add_row(name, pruner.name, str(gpus), *_figures(spec, shape, gpus))
        measured = EvaluateSpec(model=model, perplexity=(text,), tasks=())
        table.add_row(name, "perplexity", "1", *_figures(measured, shape, 1))
    return table


def _figures(spec: PruneSpec | EvaluateSpec, shape: Shape, gpus: int) -> list[str]:
    """Return hours, bytes of a GPU and its host process, and bytes over the network.

    Passes and matrices are spread over the GPUs; each of these reads the whole model.
    """
    resources = Resources(gpus=1)
    guess = estimate(spec, Cost(), {_name(spec): shape.size}, resources)
    found = footprint(spec, shape, resources, WIDE_GPU)
    assert guess is not None
    assert found is not None
    alone = STAGES[spec.kind].fixed_seconds + LOAD_SECONDS * shape.weights
    busiest = total = 0.0
    if gpus > 1 and isinstance(spec, PruneSpec):
        busiest, total = exchanged_bytes(spec, shape, gpus)
    seconds = alone + (guess.seconds - alone) / gpus + busiest / NETWORK_BYTES
    device, host, _ = found.peaks
    return [f"{seconds / 3600:,.2f}", *(f"{size / 1e9:,.1f}" for size in (device, host, total))]


def _name(spec: PruneSpec | EvaluateSpec) -> str:
    assert isinstance(spec.model, HubModel)
    return spec.model.name


def main(
    scale: Annotated[bool, typer.Option(help="Print what is modelled of Llamas.")] = False,
    nsamples: Annotated[int, typer.Option(min=1)] = 4,
    seqlen: Annotated[int, typer.Option(min=8)] = 512,
    layers: Annotated[int | None, typer.Option(help="In place of 30 and 24.")] = None,
) -> None:
    """Measure two shapes, or print the model's figures for large ones."""
    console = Console(width=110)
    if scale:
        console.print(scale_table())
        return
    import torch

    torch.set_num_threads(1)
    table = Table()
    for heading in (
        "shape",
        "stage",
        "peak MB",
        "libraries",
        "modelled",
        "ratio",
        "CPU s",
        "estimated",
    ):
        table.add_column(heading)
    shapes = {"real": (30, 576, 1536, (9, 3)), "wide": (24, 1024, 2816, (16, 16))}
    for name, (depth, *rest) in shapes.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            save_model(folder, layers or depth, *rest)  # type: ignore[arg-type]
            known = shape_of(tensor_shapes(LocalModel(path=scratch)) or {})
            assert known is not None
            rate = thread_rate(known, nsamples * seqlen)
            for each in measure(folder, nsamples, seqlen, rate):
                sizes = [
                    f"{size / 1e6:,.0f}" for size in (each.bytes, each.libraries, each.modelled)
                ]
                ratio = f"{each.bytes / each.modelled:.2f}"
                row = (
                    name,
                    each.what,
                    *sizes,
                    ratio,
                    f"{each.seconds:.1f}",
                    f"{each.estimated:.1f}",
                )
                table.add_row(*row)
                console.print(*row)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
