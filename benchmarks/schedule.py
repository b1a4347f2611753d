"""Measure what scheduling costs: `python -m benchmarks.schedule`.

A generate stage of many shards that do nothing shows the overhead of a shard: planning, handing it
to a replica, storing its artifact, the join. A whole grid with 5,000 prefixes, run by the command
line, shows the memory of its driver.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_json
from cluster.helpers import Helpers
from cluster.run import run_graph
from cluster.session import session
from cluster.store import Partial, Store
from jobs.grid import load_grid
from jobs.plan import make_plan
from pipeline.specs import GenerateSpec

_TARGET_MILLISECONDS = 10.0
"""For a shard that does nothing."""

_TARGET_GIBIBYTES = 2.0
"""For the driver's memory."""

_POLL_SECONDS = 0.1


def grid(folder: Path, num_samples: int, shard_size: int) -> Path:
    """Write a grid file with one generated calibration of the testbed's smallest model."""
    content = {
        "name": "schedule",
        "models": {"testbed": "testbed-tiny"},
        "corpora": {"text": "testbed-pretraining"},
        "calibrations": {
            "own": {"prefixes": "text", "num_samples": num_samples, "shard_size": shard_size}
        },
        "cells": {
            "model": "testbed",
            "calibration": "own",
            "pruner": "wanda",
            "sparsity": 0.5,
            "nsamples": 16,
            "seqlen": 32,
        },
        "evaluate": {"perplexity": [{"corpus": "text", "seqlen": 32, "max_windows": 8}]},
    }
    path = folder / "schedule.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def do_nothing(
    payload: str,
    artifacts: Mapping[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    """Make an empty stage."""
    return {}


def milliseconds_per_shard(shards: int) -> float:
    """Return the overhead of a shard in a stage of so many, with its share of the join."""
    with tempfile.TemporaryDirectory() as folder, session(None):
        started = time.perf_counter()
        plan = make_plan(load_grid(grid(Path(folder), shards, 1)))
        targets = [key for key, spec in plan.specs.items() if isinstance(spec, GenerateSpec)]
        outcome = run_graph(plan.graph, targets, do_nothing, Store(f"{folder}/store"), {})
        seconds = time.perf_counter() - started
    assert not outcome.failed
    assert len(outcome.made) == shards + 2  # the model, the shards, the join
    return seconds / shards * 1000


def driver_bytes(prefixes: int) -> int:
    """Run a grid with so many prefixes, and return the peak memory of its driver; Linux only."""
    with tempfile.TemporaryDirectory() as folder:
        path = grid(Path(folder), prefixes, 64)
        command = [sys.executable, "-m", "jobs", "run", str(path), "--store", f"{folder}/store"]
        environment = {**os.environ, "RAY_AUTH_MODE": "token"}
        with (Path(folder) / "log").open("w+") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            peak = 0
            while driver.poll() is None:
                status = Path(f"/proc/{driver.pid}/status").read_text()
                found = re.search(r"VmHWM:\s+(\d+) kB", status)  # gone once the process ends
                peak = max(peak, int(found[1]) * 1024 if found else 0)
                time.sleep(_POLL_SECONDS)
            if driver.returncode:
                log.seek(0)
                raise RuntimeError(f"the grid failed:\n{log.read()}")
    return peak


def main(
    shards: Annotated[int, typer.Option(min=1, help="Shards that do nothing.")] = 10_000,
    prefixes: Annotated[int, typer.Option(min=1, help="Prefixes of the whole grid.")] = 5000,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Measure the overhead of a shard, and the memory of a grid's driver."""
    cost = milliseconds_per_shard(shards)
    memory = driver_bytes(prefixes)
    table = Table("what", "measured", "target", "")
    for what, value, target, unit in (
        (f"each of {shards:,} shards that do nothing", cost, _TARGET_MILLISECONDS, "ms"),
        (f"driver of {prefixes:,} prefixes", memory / 2**30, _TARGET_GIBIBYTES, "GiB"),
    ):
        met = "met" if value < target else "missed"
        table.add_row(what, f"{value:.2f} {unit}", f"{target:g} {unit}", met)
    Console(width=100).print(table)
    measured = {
        "cpus": os.cpu_count(),
        "shards": shards,
        "milliseconds_per_shard": cost,
        "prefixes": prefixes,
        "driver_bytes": memory,
    }
    write_json(output, measured)


if __name__ == "__main__":
    typer.run(main)
