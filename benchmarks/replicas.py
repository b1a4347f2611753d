"""Measure how generation grows with replicas: `python -m benchmarks.replicas`.

One replica and then two generate the same number of shards each, on Ray as in any run, with one
thread a replica. Loading the model does not count: a replica's time goes from the end of its first
shard to the end of its last.
"""

import functools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.geometry import TESTBED
from benchmarks.record import machine, write_json
from cluster.graph import Resources, Stage
from cluster.helpers import Helpers
from cluster.run import run_graph
from cluster.session import session
from cluster.store import Partial, Store
from jobs.stages import StageWork, execute
from pipeline.generation.vllm_engine import vllm_version
from pipeline.specs import GenerateSpec, LocalModel, TestbedCorpus, Vllm
from pipeline.testbed.tokenizer import train_tokenizer


def execute_and_note(
    payload: str,
    artifacts: Mapping[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
    *,
    notes: Path,
) -> dict[str, Any]:
    """Make a stage, and note the process, its tokens and the time."""
    report = execute(payload, artifacts, output, cpus, partial, helpers)
    line = f"{os.getpid()} {report['tokens_generated']} {time.time()}\n"
    with (notes / str(os.getpid())).open("a") as file:
        file.write(line)
    return report


def tokens_per_second(spec: GenerateSpec, replicas: int, folder: Path) -> float:
    """Generate the spec's shards, and return the tokens per second of all replicas together."""
    folder.mkdir()
    resources = Resources(min_replicas=replicas, max_replicas=replicas)
    stages = {
        shard.key: Stage(
            key=shard.key,
            kind="generate",
            label=shard.key,
            spec={},
            payload=StageWork(spec=shard).model_dump_json(),
            inputs=(),
            resources=resources,
            pool="replicas",
        )
        for shard in spec.shards()
    }
    notes = folder / "notes"
    notes.mkdir()
    made = run_graph(
        stages,
        list(stages),
        functools.partial(execute_and_note, notes=notes),
        Store(str(folder / "store")),
        {},
    )
    assert not made.failed
    return total_rate([path.read_text() for path in notes.iterdir()], replicas)


def total_rate(notes: list[str], replicas: int) -> float:
    """Sum the replicas' tokens per second, each over its shards after the first.

    Args:
        notes: one text a replica with a line a shard: process, tokens, second at its end.
    """
    done: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for process, tokens, ended in (line.split() for text in notes for line in text.splitlines()):
        done[process].append((int(tokens), float(ended)))
    assert len(done) == replicas, f"{len(done)} of {replicas} replicas had work: take more shards"
    total = 0.0
    for shards in done.values():
        assert len(shards) > 1, "a replica had one shard only: take more"
        total += sum(tokens for tokens, _ in shards[1:]) / (shards[-1][1] - shards[0][1])
    return total


def main(
    backend: Annotated[
        Literal["auto", "vllm", "transformers"],
        typer.Option(help="auto is vLLM if it is installed."),
    ] = "auto",
    shards: Annotated[int, typer.Option(min=4, help="For each replica.")] = 8,
    shard_size: Annotated[int, typer.Option(min=1)] = 32,
    tokens: Annotated[int, typer.Option(min=8, help="In each sample.")] = 256,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Compare the tokens per second of one replica and two."""
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = backend
    if backend == "auto":
        chosen = "transformers" if vllm_version() is None else "vllm"
    rates: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name, session(None):
        folder = Path(name)
        model = replace(TESTBED, seqlen=tokens).model(torch.device("cpu"), torch.float32)
        model.save_pretrained(folder / "model")
        train_tokenizer(["text"], model.config.vocab_size).save_pretrained(folder / "model")
        for replicas in (1, 2):
            spec = GenerateSpec(
                model=LocalModel(path=str(folder / "model"), dtype="float32"),
                prefixes=TestbedCorpus(mixture={"facts": 1.0}),
                num_samples=shards * shard_size * replicas,
                seqlen=tokens,
                min_new_tokens=tokens - 2 - 1,
                shard_size=shard_size,
                backend=Vllm(enforce_eager=True) if chosen == "vllm" else "transformers",
            )
            rates[replicas] = tokens_per_second(spec, replicas, folder / str(replicas))
    efficiency = rates[2] / (2 * rates[1])
    table = Table("replicas", "tokens/s", "efficiency")
    table.add_row("1", f"{rates[1]:,.0f}", "")
    table.add_row("2", f"{rates[2]:,.0f}", f"{efficiency:.0%}")
    Console(width=100).print(f"{chosen}, {os.cpu_count()} CPUs", table)
    measured = {"backend": chosen, "tokens_per_second": rates, "efficiency": efficiency}
    write_json(output, {**machine(model.device, model.dtype), "cpus": os.cpu_count(), **measured})


if __name__ == "__main__":
    typer.run(main)
