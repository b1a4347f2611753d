"""Compare the scheduler with list scheduling on simulated clusters:
`python -m benchmarks.simulated_schedule`.

Random grids of the usual stages run on random clusters in virtual time, scheduled by the code of
real runs. The yardstick is the makespan of textbook list scheduling by critical path (Graham 1969),
which knows every stage's true seconds; the scheduler knows estimates with errors.
"""

import heapq
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_json
from cluster.graph import Graph, Resources, Stage, needed, readers
from cluster.schedule import (
    START_SECONDS,
    Bundle,
    EndActor,
    HandOver,
    Schedule,
    StartActor,
    bundle,
)

MAKESPAN_TARGET = 1.10
"""The longest makespan of any grid, in makespans of list scheduling."""

_WITH_MODEL = ("generate", "score", "describe", "prune", "evaluate")
"""Stages that take a GPU if the cluster has any."""


@dataclass(frozen=True)
class GridCase:
    """A grid, its stages' true seconds, and a cluster."""

    graph: Graph
    seconds: Mapping[str, float]
    nodes: tuple[Bundle, ...]


@dataclass
class Times:
    """When one stage was ready, started and ended, in seconds of virtual time."""

    ready: float
    started: float = -1.0
    ended: float = -1.0


# ------------------------------------------------------------------------------------ random cases


def random_case(draw: random.Random) -> GridCase:
    """Draw a random grid and a random cluster."""
    graph: dict[str, Stage] = {}
    seconds: dict[str, float] = {}
    on_gpus = draw.random() < 0.3
    scale = 10 ** draw.uniform(-0.5, 1.5)  # models are small or large
    bias: defaultdict[str, float] = defaultdict(lambda: draw.lognormvariate(0.0, 0.3))

    def add(kind: str, mean: float, *inputs: str, pool: str | None = None) -> str:
        key = f"{kind}-{len(graph)}"
        true = mean * scale * draw.uniform(0.8, 1.25)
        estimate = true * bias[kind] * draw.lognormvariate(0.0, 0.3)
        joins = kind in ("generate", "score") and pool is None  # a join needs no device
        gpus = 1.0 if on_gpus and kind in _WITH_MODEL and not joins else 0.0
        graph[key] = Stage(
            key=key, kind=kind, label=key, spec={}, payload="", inputs=inputs, pool=pool,
            seconds=estimate, resources=Resources(gpus=gpus),
        )  # fmt: skip
        seconds[key] = true
        return key

    shards, prunings = draw.randint(2, 12), draw.randint(1, 12)
    per_token = 10 ** draw.uniform(-0.3, 0.7)
    for model in range(draw.randint(1, 2)):
        size = 10 ** draw.uniform(-0.3, 0.3)
        dense = add("pretrain", 10 * size)
        tasks = add("testbed-tasks", 0.5)
        add("evaluate", 6 * size, dense, tasks)
        for _ in range(draw.randint(1, 4)):
            source = [dense]
            if draw.random() < 0.5:
                of_model = f"{model}"
                samples = [
                    add("generate", 5 * size * per_token, dense, pool=f"generate {of_model}")
                    for _ in range(shards)
                ]
                joined = add("generate", 0.1, *samples)
                scored = [
                    add("score", 2 * size, dense, shard, pool=f"score {of_model}")
                    for shard in samples
                ]
                source = [add("filter", 0.1, joined, add("score", 0.1, *scored))]
            for _ in range(draw.randint(1, 2)):
                windows = add("windows", 0.3, *source)
                if draw.random() < 0.5:
                    add("describe", 3 * size, windows, dense)
                for _ in range(prunings):
                    work = draw.choice((0.5, 4.0, 8.0)) * size
                    pruned = add("prune", work, dense, windows, pool=f"prune {model}")
                    add("evaluate", 6 * size, pruned, tasks)
    return GridCase(graph, seconds, _random_nodes(draw, on_gpus))


def _random_nodes(draw: random.Random, on_gpus: bool) -> tuple[Bundle, ...]:
    cpus = round(2 ** draw.uniform(0.0, 6.0))
    if not on_gpus:
        return ({"CPU": float(cpus)},)
    gpus = draw.choice((1, 2, 4, 8))
    return tuple({"CPU": 8.0, "GPU": float(gpus)} for _ in range(max(1, cpus // 8)))


# -------------------------------------------------------------------------------------- the measure


def list_schedule(case: GridCase) -> float:
    """Return the makespan of list scheduling: whenever a stage ends, all that fit begin, those with
    the longest remaining path by true seconds first."""
    follow: dict[str, list[str]] = {key: [] for key in case.graph}
    for stage in case.graph.values():
        for name in stage.inputs:
            follow[name].append(stage.key)

    @cache
    def path(key: str) -> float:
        return case.seconds[key] + max(map(path, follow[key]), default=0.0)

    free = [dict(node) for node in case.nodes]
    left = {key: len(stage.inputs) for key, stage in case.graph.items()}
    ready = sorted((key for key in left if not left[key]), key=path, reverse=True)
    running: list[tuple[float, str, int]] = []
    now = 0.0
    while ready or running:
        for key in list(ready):
            asked = bundle(case.graph[key].resources)
            place = _first_fit(asked, free)
            if place is not None:
                _take(free[place], asked)
                ready.remove(key)
                heapq.heappush(running, (now + case.seconds[key], key, place))
        now, ended, at = heapq.heappop(running)
        _give(free[at], bundle(case.graph[ended].resources))
        for reader in follow[ended]:
            left[reader] -= 1
            if not left[reader]:
                ready.append(reader)
        ready.sort(key=path, reverse=True)
    return now


def lower_bound(case: GridCase) -> float:
    """Return a bound that no schedule beats: the longest path, or the work over the resources."""
    longest: dict[str, float] = {}
    read_by = readers(case.graph)
    for key in reversed(needed(case.graph, case.graph, ())):
        after = max((longest[reader] for reader in read_by[key]), default=0.0)
        longest[key] = case.seconds[key] + after
    bounds = [max(longest.values())]
    for name in case.nodes[0]:
        work = sum(
            case.seconds[key] * bundle(stage.resources).get(name, 0.0)
            for key, stage in case.graph.items()
        )
        bounds.append(work / sum(node[name] for node in case.nodes))
    return max(bounds)


def _first_fit(asked: Bundle, free: list[Bundle]) -> int | None:
    for place, node in enumerate(free):
        if all(amount <= node.get(name, 0.0) for name, amount in asked.items()):
            return place
    return None


def _take(node: Bundle, asked: Bundle) -> None:
    for name, amount in asked.items():
        node[name] -= amount


def _give(node: Bundle, asked: Bundle) -> None:
    for name, amount in asked.items():
        node[name] += amount


# ----------------------------------------------------------------------------------- the simulation


@dataclass
class _Waiting:
    """A task, or an actor to start, in Ray's queue."""

    stage: Stage
    actor: bool
    place: int | None = None


@dataclass
class Simulation:
    """A cluster in virtual time, working like Ray: stages begin where they fit, in the order in
    which they were handed over."""

    case: GridCase
    start_seconds: float = 0.0
    """Seconds of a new actor before its first stage."""
    workers: int | None = None
    make_schedule: Callable[[Graph, int | None], Schedule] = Schedule
    times: dict[str, Times] = field(default_factory=dict)

    def run(self) -> float:
        """Run the grid, and return the makespan."""
        graph = self.case.graph
        self.now = 0.0
        self.free = [dict(node) for node in self.case.nodes]
        self.queue: list[_Waiting] = []
        self.idle: defaultdict[str, list[_Waiting]] = defaultdict(list)
        self.events: list[tuple[float, int, str | None, _Waiting]] = []
        self.count = iter(range(10**9))
        self.schedule = self.make_schedule(graph, self.workers)
        self.schedule.resize(self.case.nodes)
        self.schedule.order(needed(graph, graph, ()))
        left = {key: len(set(stage.inputs)) for key, stage in graph.items()}
        read_by = readers(graph)
        for key in graph:
            if not left[key]:
                self._make_ready(key)
        while True:
            self._take_steps()
            if not self.events:
                break
            self.now, _, ended, served = heapq.heappop(self.events)
            if ended is None:
                assert served.stage.pool is not None
                self.idle[served.stage.pool].append(served)
                self.schedule.joined(served.stage.pool, self.now)
                continue
            self.times[ended].ended = self.now
            pool = graph[ended].pool
            if pool is None:
                self._leave(served)
            else:
                self.idle[pool].append(served)
            self.schedule.returned(ended, self.now)
            self.schedule.discard(ended)
            for reader in read_by[ended]:
                left[reader] -= 1
                if not left[reader]:
                    self._make_ready(reader)
        assert all(each.ended >= 0 for each in self.times.values())
        assert len(self.times) == len(graph)
        return max(each.ended for each in self.times.values())

    def _make_ready(self, key: str) -> None:
        self.times[key] = Times(ready=self.now)
        self.schedule.add(key)

    def _take_steps(self) -> None:
        while (step := self.schedule.step(self.now)) is not None:
            match step:
                case HandOver(stage) if stage.pool is not None:
                    self._begin(stage, self.idle[stage.pool].pop())
                case HandOver(stage):
                    self.queue.append(_Waiting(stage, actor=False))
                case StartActor(stage):
                    self.queue.append(_Waiting(stage, actor=True))
                case EndActor(pool):
                    self._leave(self.idle[pool].pop())
            self._place()

    def _place(self) -> None:
        too_large: set[Resources] = set()
        for asked in list(self.queue):
            if asked.stage.resources in too_large:
                continue
            place = _first_fit(bundle(asked.stage.resources), self.free)
            if place is None:
                too_large.add(asked.stage.resources)
                continue
            self.queue.remove(asked)
            asked.place = place
            _take(self.free[place], bundle(asked.stage.resources))
            if asked.actor:
                self._at(self.now + self.start_seconds, None, asked)
            else:
                self._begin(asked.stage, asked)

    def _begin(self, stage: Stage, served: _Waiting) -> None:
        self.times[stage.key].started = self.now
        self._at(self.now + self.case.seconds[stage.key], stage.key, served)

    def _at(self, when: float, key: str | None, served: _Waiting) -> None:
        heapq.heappush(self.events, (when, next(self.count), key, served))

    def _leave(self, served: _Waiting) -> None:
        assert served.place is not None
        _give(self.free[served.place], bundle(served.stage.resources))
        self._place()


def overtaken(graph: Graph, times: Mapping[str, Times]) -> Iterator[tuple[str, str]]:
    """Yield pairs of ready stages with the same resources where the second began first although
    other stages wait only for the first."""
    read = {name for stage in graph.values() for name in stage.inputs}
    for late in read:
        for early in graph.keys() - read:
            same = graph[late].resources == graph[early].resources
            if same and times[late].ready < times[early].started < times[late].started:
                yield late, early


def main(
    grids: Annotated[int, typer.Option(min=1)] = 500,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Print the makespan over that of list scheduling, with quick and slow starts of actors."""
    draw = random.Random(seed)
    cases = [random_case(draw) for _ in range(grids)]
    measures = [list_schedule(case) for case in cases]
    bounds = [lower_bound(case) for case in cases]
    table = Table("an actor starts in", "mean", "99 of 100", "most", "over the lower bound", "")
    figures: dict[str, dict[str, float]] = {}
    for start in (0.0, START_SECONDS):
        made = [Simulation(case, start).run() for case in cases]
        ratios = sorted(each / least for each, least in zip(made, measures, strict=True))
        over = statistics.fmean(each / least for each, least in zip(made, bounds, strict=True))
        mean, most = statistics.fmean(ratios), ratios[-1]
        high = ratios[int(0.99 * (len(ratios) - 1))]
        figures[f"{start:g}"] = {"mean": mean, "percentile_99": high, "most": most, "bound": over}
        met = "" if start else "met" if most <= MAKESPAN_TARGET else "missed"
        table.add_row(f"{start:g} s", *(f"{each:.3f}" for each in (mean, high, most, over)), met)
    Console(width=100).print(f"{grids} grids, target {MAKESPAN_TARGET:g}", table)
    write_json(output, {"grids": grids, "seed": seed, **figures})


if __name__ == "__main__":
    typer.run(main)
