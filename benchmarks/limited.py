"""Stages of a model in a memory cgroup that cannot hold it: `python -m benchmarks.limited`.

The model is that of `python -m jobs prepare`, stored in bfloat16 and used in float32, so that none
of its weights is a page of a mapped file, which the system may drop. Each stage runs in a process
of its own: without a limit, and in a cgroup that has the memory of the libraries and a share of the
model's bytes. What both made is compared. At last the whole model is loaded in the cgroup, where
the system must end the process. Needs Linux, root, and the memory controller of cgroups.
"""

import contextlib
import importlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.real_model import on_cpu
from cluster.heap import keep_freed_memory
from jobs.footprint import LIBRARY_BYTES
from jobs.stages import STAGES
from pipeline.real.prepare import REAL_FOLDER
from pipeline.specs import (
    DescribeSpec,
    EvaluateSpec,
    FileCorpus,
    LocalModel,
    PerplexitySpec,
    PruneSpec,
    SparseGPT,
    StageSpec,
    Wanda,
    WindowsSpec,
)

CGROUPS = Path("/sys/fs/cgroup")

AMPLE = 10**15
"""Bytes of memory in which every model fits."""


Start = Callable[[Any], None]
"""Starts a `multiprocessing` process."""


class Ran(NamedTuple):
    """A stage in a process of its own."""

    exit_code: int
    cpu: float
    wall: float


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Start]:
    """Make a cgroup with so many bytes of memory; yield a function that starts processes in it.

    It moves this process there and back: what a process starts is born in its group, and what it
    has already counts where it came from.
    """
    unified = (CGROUPS / "cgroup.controllers").exists()
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    (own,) = (line for line in lines if line.split(":")[1] == ("" if unified else "memory"))
    root = CGROUPS if unified else CGROUPS / "memory"
    group = root / "calprune-limited"
    group.mkdir()
    (group / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(limit))

    def start(process: Any) -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            process.start()
        finally:
            home = root / own.split(":")[2].lstrip("/") / "cgroup.procs"
            home.write_text(str(os.getpid()))

    try:
        yield start
    finally:
        group.rmdir()


def stages(
    model: LocalModel, texts: Path, nsamples: int, seqlen: int
) -> tuple[WindowsSpec, list[StageSpec]]:
    """Return a calibration set, and stages of all kinds that read a model by layer."""
    train, held_out = (
        FileCorpus(path=str(texts / f"wikipedia-{part}.jsonl")) for part in ("train", "heldout")
    )
    windows = WindowsSpec(source=train, model=model, nsamples=nsamples, seqlen=seqlen)
    entry = PerplexitySpec(name="text", corpus=held_out, seqlen=seqlen, max_windows=nsamples)
    found: list[StageSpec] = [
        PruneSpec(model=model, pruner=pruner, sparsity=0.5, calibration=windows)
        for pruner in (Wanda(), SparseGPT())
    ]
    found.append(DescribeSpec(model=model, calibration=windows))
    found.append(EvaluateSpec(model=model, perplexity=(entry,), tasks=()))
    return windows, found


def run(
    spec: StageSpec,
    inputs: dict[str, Path],
    output: Path,
    memory: int = AMPLE,
    start: Start = lambda process: process.start(),
) -> Ran:
    """Run a stage in a process.

    Args:
        memory: bytes in which the stage may load its model.
        start: of `memory_group` for a process with a limit.
    """
    context = multiprocessing.get_context("spawn")
    cpu = context.Value("d", float("nan"))
    process = context.Process(target=_stage, args=(spec, inputs, output, memory, cpu))
    began = time.perf_counter()
    start(process)
    process.join()
    assert process.exitcode is not None
    return Ran(process.exitcode, cpu.value, time.perf_counter() - began)


def _stage(spec: Any, inputs: dict[str, Path], output: Path, memory: int, cpu: Any) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    output.mkdir()
    options = {} if spec.kind in ("windows", "prune") else {"memory_bytes": memory}
    importlib.import_module(STAGES[spec.kind].module).run(spec, inputs, output, **options)
    cpu.value = time.process_time()


def difference(one: Path, other: Path) -> float | None:
    """Return the largest relative difference of numbers in two artifacts; None if all bytes are
    equal."""
    names, others = (
        sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
        for made in (one, other)
    )
    assert names == others
    if all((one / name).read_bytes() == (other / name).read_bytes() for name in names):
        return None
    largest = 0.0
    for name in (each for each in names if each.suffix == ".parquet"):
        tables = [pq.read_table(folder / name).to_pandas() for folder in (one, other)]
        for column in tables[0].select_dtypes("number"):
            ours, theirs = (table[column].to_numpy(np.float64) for table in tables)
            largest = max(largest, float(np.max(np.abs(ours / theirs - 1), where=theirs != 0)))
    return largest


def main(
    folder: Annotated[Path, typer.Option(help="What `jobs prepare` made.")] = Path(REAL_FOLDER),
    share: Annotated[float, typer.Option(help="Of the model's bytes.")] = 0.6,
    nsamples: Annotated[int, typer.Option(min=1)] = 64,
    seqlen: Annotated[int, typer.Option(min=2)] = 512,
) -> None:
    """Compare stages under a memory limit with those without one."""
    table = Table()
    for heading in ("stage", "CPU s", "limited", "wall s", "limited", "difference"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "model")
        loaded = on_cpu(folder / "model", "bfloat16")
        loaded.save_pretrained(copy)
        for path in (folder / "model").glob("tokenizer*"):
            shutil.copy(path, copy)
        size = 4 * sum(parameter.numel() for parameter in loaded.parameters())
        del loaded
        limit = int(LIBRARY_BYTES + share * size)
        model = LocalModel(path=str(copy), dtype="float32")
        windows, found = stages(model, folder / "text", nsamples, seqlen)
        inputs = {windows.key: Path(scratch, "windows")}
        assert run(windows, {}, inputs[windows.key]).exit_code == 0
        with memory_group(limit) as start:
            for number, spec in enumerate(found):
                free, held = (Path(scratch, f"{way}-{number}") for way in ("free", "limited"))
                ample = run(spec, inputs, free)
                limited = run(spec, inputs, held, int(share * size), start)
                assert ample.exit_code == 0
                name = spec.pruner.name if isinstance(spec, PruneSpec) else spec.kind
                if limited.exit_code:
                    table.add_row(name, f"{ample.cpu:.1f}", f"ended by {-limited.exit_code}")
                    continue
                apart = difference(free, held)
                table.add_row(
                    name,
                    f"{ample.cpu:.1f}",
                    f"{limited.cpu / ample.cpu:.2f} x",
                    f"{ample.wall:.1f}",
                    f"{limited.wall / ample.wall:.2f} x",
                    "equal bytes" if apart is None else f"{apart:.1e}",
                )
            whole = run(found[-1], inputs, Path(scratch, "whole"), AMPLE, start)
            table.add_row("evaluate, whole", "", f"ended by {-whole.exit_code}")
    console = Console(width=100)
    console.print(f"{limit / 1e6:,.0f} MB: libraries and {share:.0%} of {size / 1e6:,.0f} MB")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
