"""Stages of a model in a memory cgroup that cannot hold it: `python -m benchmarks.limited`.

The model is that of `python -m jobs prepare`, stored in bfloat16 and used in float32, so that none
of its weights is a page of a mapped file, which the system may drop. Each stage runs in a process
of its own: without a limit, and in a cgroup that has little more than what `plan` says of the stage
with its model read by layer. What both made is compared. At last the whole model is loaded in the
largest of these cgroups, where the system must end the process. Needs Linux, root, and the memory
controller of cgroups.
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

from benchmarks.footprint import stages_of
from benchmarks.real_model import on_cpu
from cluster.graph import Resources
from jobs.footprint import LIBRARY_BYTES, footprint, shape_of
from jobs.sizes import tensor_shapes
from jobs.stages import STAGES
from pipeline.models.heap import keep_freed_memory
from pipeline.real.prepare import REAL_FOLDER
from pipeline.specs import FileCorpus, LocalModel, PruneSpec, StageSpec, WindowsSpec

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
            apart = np.abs(ours - theirs) / np.maximum(np.abs(theirs), np.finfo(np.float64).tiny)
            largest = max(largest, float(np.nanmax(apart, initial=0.0)))
    return largest


def main(
    folder: Annotated[Path, typer.Option(help="What `jobs prepare` made.")] = Path(REAL_FOLDER),
    margin: Annotated[float, typer.Option(help="The limit, in times what `plan` says.")] = 1.1,
    nsamples: Annotated[int, typer.Option(min=1)] = 64,
    seqlen: Annotated[int, typer.Option(min=2)] = 512,
    stage: Annotated[str, typer.Option(help="Only stages of this kind.")] = "",
) -> None:
    """Compare stages under a memory limit with those without one."""
    table = Table()
    for heading in ("stage", "limit MB", "of the model", "CPU s", "limited", "wall s", "limited"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    table.add_column("difference")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "model")
        loaded = on_cpu(folder / "model", "bfloat16")
        loaded.save_pretrained(copy)
        for path in (folder / "model").glob("tokenizer*"):
            shutil.copy(path, copy)
        size = 4 * sum(parameter.numel() for parameter in loaded.parameters())
        del loaded
        model = LocalModel(path=str(copy), dtype="float32")
        shape = shape_of(tensor_shapes(model) or {})
        assert shape is not None
        train, held_out = (
            folder / "text" / f"wikipedia-{part}.jsonl" for part in ("train", "heldout")
        )
        windows = WindowsSpec(
            source=FileCorpus(path=str(train)), model=model, nsamples=nsamples, seqlen=seqlen
        )
        found = [spec for spec in stages_of(windows, held_out) if stage in (spec.kind, "")]
        inputs = {windows.key: Path(scratch, "windows")}
        assert run(windows, {}, inputs[windows.key]).exit_code == 0
        limits = []
        for number, spec in enumerate(found):
            little = 1  # a byte: read by layer
            planned = footprint(spec, shape, Resources(), little)
            assert planned is not None
            limits.append(int(margin * planned.peaks[1]))
            free, held = (Path(scratch, f"{way}-{number}") for way in ("free", "limited"))
            ample = run(spec, inputs, free)
            assert ample.exit_code == 0
            with memory_group(limits[-1]) as start:
                limited = run(spec, inputs, held, little, start)
            beyond = (limits[-1] - LIBRARY_BYTES) / size
            table.add_row(
                spec.pruner.name if isinstance(spec, PruneSpec) else spec.kind,
                f"{limits[-1] / 1e6:,.0f}",
                f"{beyond:.0%}",
                *(
                    [f"ended by signal {-limited.exit_code}"]
                    if limited.exit_code
                    else _figures(ample, limited, difference(free, held))
                ),
            )
        with memory_group(max(limits)) as start:
            whole = run(found[-1], inputs, Path(scratch, "whole"), AMPLE, start)
        ended = f"ended by signal {-whole.exit_code}" if whole.exit_code else "not ended"
        table.add_row("evaluate, whole", f"{max(limits) / 1e6:,.0f}", "", ended)
    Console(width=120).print(table)


def _figures(ample: Ran, limited: Ran, apart: float | None) -> list[str]:
    return [
        f"{ample.cpu:.1f}",
        f"{limited.cpu / ample.cpu:.2f} x",
        f"{ample.wall:.1f}",
        f"{limited.wall / ample.wall:.2f} x",
        "equal bytes" if apart is None else f"{apart:.0e}",
    ]


if __name__ == "__main__":
    typer.run(main)
