"""Measure what a large grid costs besides its stages' work.

`python -m benchmarks.grid_scale run` plans a grid of ten thousand cells and runs it on Ray with
stages that do nothing. Ray's own cost of a task is measured in the same process, with the same
arguments and as many tasks in flight. The rest is ours: the lease, the attempt, the manifest and
the driver's book-keeping.

`python -m benchmarks.grid_scale simulate` plans grids of up to 100,000 stages, schedules them on a
thousand simulated workers by the code of real runs, and counts the requests of the real store on a
local S3 server. Seconds are CPU seconds of the process, which other work on the machine disturbs
less than wall time.
"""

import os
import resource
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, TypeVar

import ray
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_json
from benchmarks.simulated_schedule import GridCase, Simulation
from cluster import leases
from cluster.graph import Graph, Resources, Stage, needed, readers
from cluster.helpers import Helpers
from cluster.run import run_graph
from cluster.schedule import EndActor, HandOver, Schedule, StartActor
from cluster.store import Partial, Store
from cluster.worker import Maker, make_artifact
from jobs.forecast import Forecast, Room
from jobs.grid import Grid
from jobs.plan import make_plan
from jobs.progress import line_name
from tests.s3 import BUCKET, S3Server, s3_server

PLAN_TARGET_SECONDS = 30.0
"""To plan 100,000 stages."""

WORKERS = 1000

STAGES_A_SEED = 122
"""Of `simulated_grid`."""

DOLLARS_A_THOUSAND = {"PUT": 0.005, "LIST": 0.005, "GET": 0.0004, "HEAD": 0.0004, "DELETE": 0.0}
"""Amazon's public list prices of S3 Standard in us-east-1 (aws.amazon.com/s3/pricing)."""

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
    return {
        "cells": len(plan.cells),
        "stages_planned": len(graph),
        "seconds_to_plan": round(planned, 2),
        "stages_run": stages,
        "milliseconds_a_stage": round(ran / stages * 1e3, 2),
        "milliseconds_a_stage_of_ray": round(bare / stages * 1e3, 2),
        "milliseconds_a_stage_of_our_own": round((ran - bare) / stages * 1e3, 2),
        "driver_bytes_at_most": _peak_bytes(),
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


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------- simulated workers


def simulated_grid(seeds: int) -> Grid:
    """Return a grid that grows with its seeds: real texts, those of the dense model, and those of a
    pruned model, which is another one for every seed and has pools of its own."""
    generated = {"prefixes": "text", "num_samples": 128, "shard_size": 8}
    pruned = {"pruner": "wanda", "sparsity": 0.5, "calibration": "real"}
    return Grid.model_validate(
        {
            "name": "scale",
            "models": {"testbed": "testbed-tiny"},
            "corpora": {"text": "testbed-pretraining"},
            "calibrations": {
                "real": {"corpus": "text"},
                "own": generated,
                "pruned": {**generated, "generator": pruned},
            },
            "cells": {
                "model": "testbed",
                "calibration": ["real", "own", "pruned"],
                "pruner": "wanda",
                "sparsity": [number / 9 for number in range(1, 9)],
                "seed": list(range(seeds)),
                "nsamples": 16,
                "seqlen": 64,
            },
            "evaluate": {"perplexity": [{"corpus": "text", "seqlen": 64}]},
        }
    )


@dataclass(frozen=True)
class ScaleRow:
    """The driver's costs for one grid. Seconds are CPU seconds."""

    stages: int
    pools: int
    plan_seconds: float
    graph_seconds: float
    """What a run does with the graph before its first stage: needed stages, readers, ranks."""
    schedule_seconds: float
    """All other calls of the schedule."""
    forecast_seconds: float
    """One look at the time left, before any stage is made."""
    peak_bytes: int

    @property
    def plan_microseconds(self) -> float:
        """Return the time to plan a stage."""
        return self.plan_seconds / self.stages * 1e6

    @property
    def schedule_microseconds(self) -> float:
        """Return the schedule's time for a stage."""
        return self.schedule_seconds / self.stages * 1e6


Value = TypeVar("Value")


class TimedSchedule(Schedule):
    """A schedule that adds up the CPU seconds of its calls."""

    seconds = 0.0

    def add(self, key: str) -> None:
        """Make a stage ready."""
        self._timed(lambda: super(TimedSchedule, self).add(key))

    def discard(self, key: str) -> None:
        """Forget a stage."""
        self._timed(lambda: super(TimedSchedule, self).discard(key))

    def returned(self, key: str, now: float, *, actor_lost: bool = False) -> None:
        """Record that a stage has returned."""
        self._timed(lambda: super(TimedSchedule, self).returned(key, now, actor_lost=actor_lost))

    def joined(self, pool: str, now: float) -> None:
        """Record that an actor has started."""
        self._timed(lambda: super(TimedSchedule, self).joined(pool, now))

    def step(self, now: float) -> HandOver | StartActor | EndActor | None:
        """Return the next step."""
        return self._timed(lambda: super(TimedSchedule, self).step(now))

    def _timed(self, call: Callable[[], Value]) -> Value:
        started = time.process_time()
        value = call()
        self.seconds += time.process_time() - started
        return value


def measure_scale(seeds: int) -> ScaleRow:
    """Plan a grid and run it on simulated workers of one CPU each."""
    started = time.process_time()
    plan = make_plan(simulated_grid(seeds))
    planned = time.process_time()
    graph = plan.graph
    order = needed(graph, plan.targets, ())
    readers(graph)
    Schedule(graph).order(order)
    ranked = time.process_time()
    forecast = _forecast_seconds(graph)
    seconds = {key: stage.seconds for key, stage in graph.items()}
    case = GridCase(graph, seconds, ({"CPU": float(WORKERS)},))
    simulation = Simulation(case, make_schedule=TimedSchedule)
    simulation.run()
    assert isinstance(simulation.schedule, TimedSchedule)
    return ScaleRow(
        stages=len(graph),
        pools=len({stage.pool for stage in graph.values()} - {None}),
        plan_seconds=planned - started,
        graph_seconds=ranked - planned,
        schedule_seconds=simulation.schedule.seconds,
        forecast_seconds=forecast,
        peak_bytes=_peak_bytes(),
    )


def _forecast_seconds(graph: Graph) -> float:
    forecast = Forecast(graph, line_name)
    forecast.measured(next(iter(graph.values())), 1.0)
    started = time.process_time()
    assert forecast.seconds_left({}, Room(WORKERS)) is not None
    return time.process_time() - started


# ------------------------------------------------------------------------------------ the requests


def count_requests(server: S3Server, stages: int) -> tuple[Counter[str], Counter[str]]:
    """Make a chain of stages in this process, as workers do, and then begin a run that finds them
    made; return the requests of all stages, and those of the run, by kind."""
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    maker = Maker(no_work, store.url, {}, "run")
    for number in range(stages):
        inputs = (f"k-{number - 1}",) if number else ()
        stage = Stage(key=f"k-{number}", kind="k", label="", spec={}, payload="", inputs=inputs)
        make_artifact(stage, maker, frozenset())
    of_stages = _taken(server)
    leases.sweep(store, leases.Observer(store))
    store.sweep()
    with leases.Claim(store, store.keys()):
        pass
    return of_stages, _taken(server)


def _taken(server: S3Server) -> Counter[str]:
    """Return the requests so far by kind, and forget them."""
    kinds: Counter[str] = Counter()
    for request in server.requests:
        method, path = request.split(" ", 1)
        lists = method == "GET" and path.strip("/") == BUCKET
        kinds["LIST" if lists else method] += 1
    server.requests.clear()
    return kinds


def dollars(requests: Mapping[str, float]) -> float:
    """Return what requests cost, by kind."""
    return sum(count / 1000 * DOLLARS_A_THOUSAND[kind] for kind, count in requests.items())


# ---------------------------------------------------------------------------------- the commands

app = typer.Typer(help=__doc__)
Output = Annotated[Path | None, typer.Option(help="JSON file of what was measured.")]


@app.command()
def run(
    cells: Annotated[int, typer.Option(min=200)] = 10_000,
    run_cells: Annotated[int, typer.Option("--run", help="How many of them to run.")] = 10_000,
    output: Output = None,
) -> None:
    """Measure the overhead of a stage on Ray."""
    figures = measure_grid(cells, run_cells)
    Console().print_json(data=figures)
    write_json(output, figures)


@app.command()
def simulate(
    stages: Annotated[list[int] | None, typer.Option(help="Sizes, about.")] = None,
    requests: Annotated[list[int] | None, typer.Option(help="Stages on the S3 server.")] = None,
    output: Output = None,
) -> None:
    """Measure what a stage costs the driver and the object store at several sizes."""
    console, rows = Console(width=110), []
    table = Table(
        "stages", "pools", "plan", "a stage", "ranks", "schedule a stage", "forecast", "peak memory"
    )
    for size in stages or [10_000, 30_000, 100_000]:
        # Each in a process of its own, whose peak is the grid's.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            row = process.submit(measure_scale, max(1, round(size / STAGES_A_SEED))).result()
        rows.append(row)
        table.add_row(
            f"{row.stages:,}",
            f"{row.pools:,}",
            f"{row.plan_seconds:.1f} s",
            f"{row.plan_microseconds:.0f} µs",
            f"{row.graph_seconds:.2f} s",
            f"{row.schedule_microseconds:.0f} µs",
            f"{row.forecast_seconds:.2f} s",
            f"{row.peak_bytes / 2**20:.0f} MiB",
        )
    console.print(table)
    last = rows[-1]
    met = "met" if last.plan_seconds <= PLAN_TARGET_SECONDS else "missed"
    console.print(f"planning {last.stages:,} stages: target {PLAN_TARGET_SECONDS:g} s, {met}")
    counted = {}
    table = Table("stages", *DOLLARS_A_THOUSAND, "dollars for 100,000 stages", "a run's start")
    with s3_server() as server:  # one: s3fs keeps its connections
        requested = [(size, *count_requests(server, size)) for size in requests or [100, 300]]
    for size, of_stages, of_run in requested:
        counted[size] = {"stages": dict(of_stages), "run": dict(of_run)}
        each = {kind: of_stages[kind] / size for kind in DOLLARS_A_THOUSAND}
        table.add_row(
            f"{size:,}",
            *(f"{count:.2f}" for count in each.values()),
            f"{100_000 * dollars(each):.2f}",
            ", ".join(f"{kind} {count}" for kind, count in sorted(of_run.items())),
        )
    console.print("requests a stage with one input and one file of its own", table)
    write_json(output, {"cpus": os.cpu_count(), "grids": rows, "requests": counted})


if __name__ == "__main__":
    app()
