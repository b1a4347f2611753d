"""Measure the overhead of a grid of ten thousand cells: `python -m benchmarks.grid_scale`.

The grid is planned as any other and run with stages that do nothing. Ray's own cost of a task is
measured in the same process, with the same arguments and as many tasks in flight. The rest is ours:
the lease, the attempt, the manifest and the driver's book-keeping.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from cluster.graph import Resources, Stage
from cluster.helpers import Helpers
from cluster.run import run_graph
from cluster.store import Partial, Store
from jobs.grid import Grid
from jobs.plan import make_plan

_IN_FLIGHT = 64


def scale_grid(cells: int) -> Grid:
    """Return a grid of that many cells, each one pruning and one evaluation: sparsities x seeds."""
    seeds = 100
    sparsities = [(number + 1) / (cells // seeds + 1) for number in range(cells // seeds)]
    return Grid.model_validate(
        {
            "name": "scale",
            "models": {"testbed": "testbed-tiny"},
            "corpora": {"true": "testbed-pretraining"},
            "calibrations": {"true": {"corpus": "true"}},
            "cells": {
                "model": "testbed",
                "calibration": "true",
                "pruner": "wanda",
                "sparsity": sparsities,
                "seed": list(range(seeds)),
                "nsamples": 16,
                "seqlen": 64,
            },
            "evaluate": {"perplexity": [{"corpus": "true", "seqlen": 64}]},
        }
    )


def no_work(
    payload: str,
    artifacts: Mapping[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    """Make a stage of one byte."""
    (output / "n").write_bytes(b"1")
    return {}


def measure_grid(cells: int, run_cells: int) -> dict[str, float]:
    """Plan `cells` cells, run the first `run_cells` of them, and return the figures."""
    grid = scale_grid(cells)
    started = time.perf_counter()
    plan = make_plan(grid)
    planned = time.perf_counter() - started
    targets = list(plan.cells)[:run_cells]
    # All are tasks: benchmarks/schedule.py measures the cost of an actor.
    graph = {
        key: replace(stage, pool=None, resources=Resources()) for key, stage in plan.graph.items()
    }
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        run_graph(graph, targets[:1], no_work, store, {})  # starts the workers
        before = len(store.keys())
        started = time.perf_counter()
        run_graph(graph, targets, no_work, store, {})
        ran = time.perf_counter() - started
        stages = len(store.keys()) - before
        bare = _bare(list(graph.values())[:stages])
    ray.shutdown()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "cells": len(plan.cells),
        "stages_planned": len(graph),
        "seconds_to_plan": round(planned, 2),
        "stages_run": stages,
        "milliseconds_a_stage": round(ran / stages * 1e3, 2),
        "milliseconds_a_stage_of_ray": round(bare / stages * 1e3, 2),
        "milliseconds_a_stage_of_our_own": round((ran - bare) / stages * 1e3, 2),
        "driver_bytes_at_most": memory,
    }


def _nothing(stage: Stage, maker: object) -> int:
    return 1


def _bare(stages: list[Stage]) -> float:
    """Return the seconds that Ray takes for as many tasks with the same arguments."""
    nothing, maker = ray.remote(_nothing), ray.put(b"")
    waiting: list[ray.ObjectRef] = []
    started = time.perf_counter()
    for stage in stages:
        if len(waiting) == _IN_FLIGHT:
            done, waiting = ray.wait(waiting, num_returns=1)
            ray.get(done)
        waiting.append(nothing.remote(stage, maker))
    ray.get(waiting)
    return time.perf_counter() - started


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--run", type=int, default=10_000, help="how many of them to run")
    asked = parser.parse_args()
    print(json.dumps(measure_grid(asked.cells, asked.run), indent=1))


if __name__ == "__main__":
    main()
