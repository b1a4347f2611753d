"""The progress of a run: what is made of each kind of stage, how fast, and the time left."""

import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from textwrap import shorten

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.board import Position
from cluster.graph import Graph, Stage
from cluster.store import Failure, Manifest, Store
from jobs.forecast import Forecast, Room
from jobs.plan import Plan
from jobs.stages import LINES, STAGES
from pipeline.generation.shards import shard_samples
from pipeline.specs import GenerateSpec, ShardSpec

LAST_ERRORS = 5

MOST_SHOWN = 8
"""The most stages at work to name; of more, the number is given."""

MOST_RECALLED = 3
"""Artifacts of each kind whose seconds a resumed run reads."""

LONGEST_PHASE = 60
"""The most characters of a phase to show: an evaluation's phase names all its tasks."""


@dataclass
class Line:
    """One kind of stage."""

    total: int = 0
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    """Handed to Ray: at work, or waiting for room on the cluster."""
    at_work: int = 0
    """On a worker at the last look."""
    seconds: float = 0.0
    """Sum over the stages that are done."""

    @property
    def left(self) -> int:
        """Stages that have not ended."""
        return max(0, self.total - self.done - self.failed)


@dataclass(frozen=True)
class Busy:
    """How much of the cluster is in use."""

    cpus: float
    all_cpus: float
    gpus: float
    all_gpus: float

    def __str__(self) -> str:
        cpus = f"CPUs {self.cpus:g}/{self.all_cpus:g}"
        return f"{cpus}, GPUs {self.gpus:g}/{self.all_gpus:g}" if self.all_gpus else cpus


class Progress:
    """The figures of a run. The cost of an update does not grow with the number of stages."""

    def __init__(
        self, totals: Mapping[str, int], samples: int = 0, stages: Graph | None = None
    ) -> None:
        """
        Args:
            totals: stages to make, by line.
            samples: number to generate.
            stages: the stages to make, each after its inputs; needed for the time left.
        """
        self.lines = {name: Line(totals[name]) for name in LINES if totals.get(name)}
        self.samples_to_make = samples
        self.samples = self.tokens = 0
        self.forecast = Forecast(stages or {}, line_name, computes)
        self.replicas: Mapping[str, int] = {}
        self.errors: deque[str] = deque(maxlen=LAST_ERRORS)
        self.began = time.monotonic()
        self.generating_since: float | None = None
        self.at_work: dict[str, Position] = {}
        """By key, the positions of the stages on workers, the oldest first."""
        self.in_flight: dict[str, Stage] = {}
        """Stages handed to Ray, by key."""
        self._end: float | None = None
        """Expected end, in seconds since the run began."""
        self._waits: list[str] = []

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.began

    @property
    def total(self) -> int:
        """Stages to make."""
        return sum(line.total for line in self.lines.values())

    @property
    def ended(self) -> int:
        """Stages that are made or have failed."""
        return sum(line.done + line.failed for line in self.lines.values())

    @property
    def failed(self) -> int:
        """Stages that have failed."""
        return sum(line.failed for line in self.lines.values())

    def start(self, stage: Stage) -> None:
        """Count a stage that is handed to Ray, for the first time or again."""
        if stage.key not in self.in_flight:
            self.in_flight[stage.key] = stage
            self._line(stage).in_flight += 1
        self.at_work.pop(stage.key, None)

    def look(self, positions: Mapping[str, Position], room: Room) -> None:
        """Record the positions of the stages on workers, and the room that a run has."""
        here = {key: at for key, at in positions.items() if key in self.in_flight}
        self.at_work = dict(sorted(here.items(), key=lambda each: -each[1].seconds))
        counts = Counter(line_name(self.in_flight[key]) for key in here)
        for name, line in self.lines.items():
            line.at_work = counts[name]
        left = self.forecast.seconds_left(here, room)
        self._end = None if left is None else self.seconds + left
        ready, lacking = self.forecast.waiting(here)
        self._waits = [
            f"{reason}: {', '.join(f'{name} {count}' for name, count in sorted(counts.items()))}"
            for reason, counts in (("room or a worker", ready), ("other stages", lacking))
            if counts
        ]

    def end(self, stage: Stage, result: Manifest | Failure) -> None:
        """Count a stage that has ended."""
        line = self._line(stage)
        if self.in_flight.pop(stage.key, None):
            line.in_flight -= 1
        self.at_work.pop(stage.key, None)
        if isinstance(result, Failure):
            line.failed += 1
            self.errors.append(f"{stage.label}: {result.error} ({stage.key})")
            self.forecast.failed(stage.key)
            return
        self.forecast.made(stage, result.seconds)
        line.done += 1
        line.total = max(line.total, line.done + line.failed)  # a damaged artifact is made again
        line.seconds += result.seconds
        if line_name(stage) == "generate shard":
            if self.generating_since is None:
                self.generating_since = time.monotonic() - result.seconds
            self.samples += result.report["samples"]
            self.tokens += result.report["tokens_generated"]

    def tokens_a_second(self) -> float:
        """Return generated tokens a second since the first finished shard began."""
        if self.generating_since is None:
            return 0.0
        return self.tokens / max(time.monotonic() - self.generating_since, 1e-9)

    def seconds_left(self) -> float | None:
        """Return the estimate of the last look; None before anything was measured."""
        return None if self._end is None else max(0.0, self._end - self.seconds)

    def summary(self, busy: Busy | None) -> Iterator[str]:
        """Yield lines for a log: what is made, what workers do, what waits."""
        yield "; ".join(
            [
                f"{self.ended}/{self.total} stages in {duration(self.seconds)}",
                *([f"{self.failed} failed"] if self.failed else []),
                *(
                    f"{name} {line.done}/{line.total}"
                    for name, line in self.lines.items()
                    if line.in_flight
                ),
                *self._figures(busy),
            ]
        )
        yield from self.doing()

    def doing(self) -> Iterator[str]:
        """Yield what every worker does, the oldest stage first, and what waits for what."""
        for key, position in list(self.at_work.items())[:MOST_SHOWN]:
            stage = self.in_flight.get(key)
            if stage is not None:
                yield f"at work: {stage.label}: {how_far(position)}"
        if len(self.at_work) > MOST_SHOWN:
            yield f"at work: and {len(self.at_work) - MOST_SHOWN} more"
        if self._waits:
            yield f"waiting for {'; for '.join(self._waits)}"

    def view(self, busy: Busy | None) -> Group:
        """Return all figures for a terminal."""
        table = Table(title=None)
        table.add_column("stage")
        for heading in ("done", "failed", "at work", "left", "seconds each", "replicas"):
            table.add_column(heading, justify="right")
        for name, line in self.lines.items():
            each = f"{line.seconds / line.done:.1f}" if line.done else "-"
            replicas = self._replicas(name)
            counts = (line.done, line.failed, line.at_work, line.left)
            style = "red" if line.failed else "green" if not line.left else None
            shown = "-" if replicas is None else str(replicas)
            table.add_row(name, *map(str, counts), each, shown, style=style)
        begun = f"{self.ended}/{self.total} stages in {duration(self.seconds)}"
        figures = "; ".join([begun, *self._figures(busy)])
        errors = [Text(error, style="red", no_wrap=True) for error in self.errors]
        doing = [Text(line, no_wrap=True, overflow="ellipsis") for line in self.doing()]
        return Group(table, Text(figures), *doing, *errors)

    def _figures(self, busy: Busy | None) -> Iterator[str]:
        if self.samples_to_make and self.samples < self.samples_to_make:
            yield f"{self.samples:,} of {self.samples_to_make:,} samples"
            if self.tokens:
                yield f"{self.tokens_a_second():,.0f} tokens/s"
        present = [f"{name} {count}" for name, count in self.replicas.items() if count]
        if present:
            yield f"replicas: {', '.join(present)}"
        if busy is not None:
            yield f"busy: {busy}"
        left = self.seconds_left()
        if left is not None:
            yield f"about {duration(left)} left"

    def _line(self, stage: Stage) -> Line:
        return self.lines.setdefault(line_name(stage), Line())

    def _replicas(self, name: str) -> int | None:
        """Return the actors of a line; stages that join shards have none."""
        kind = name.removesuffix(" shard")
        joins = name == kind and STAGES[kind].sharded
        return None if joins else self.replicas.get(kind)


def computes(stage: Stage) -> bool:
    """Return whether a stage's time depends on the device's rate."""
    kind = STAGES[stage.kind]
    return kind.utilisation is not None and kind.sharded == _is_shard(stage)


def line_name(stage: Stage) -> str:
    """Return the line of `jobs.stages.LINES` that a stage of the graph is counted in."""
    return f"{stage.kind} shard" if _is_shard(stage) else stage.kind


def _is_shard(stage: Stage) -> bool:
    return STAGES[stage.kind].sharded and stage.pool is not None


def progress_of(plan: Plan, missing: Collection[str]) -> Progress:
    """Return the figures of a run that makes the missing artifacts."""
    totals = Counter(line_name(plan.graph[key]) for key in missing)
    samples = 0
    for key in missing:
        match plan.specs[key]:
            case ShardSpec(of=GenerateSpec() as spec, index=index):
                samples += len(shard_samples(spec, index))
    wanted = set(missing)
    stages = {key: stage for key, stage in plan.graph.items() if key in wanted}
    return Progress(totals, samples, stages)


def recall(progress: Progress, plan: Plan, store: Store, present: Iterable[str]) -> None:
    """Feed the forecast with the seconds of a few artifacts of each kind from earlier runs."""
    recalled: Counter[str] = Counter()
    for key in present:
        stage = plan.graph[key]
        name = line_name(stage)
        manifest = store.manifest(key) if recalled[name] < MOST_RECALLED else None
        if manifest is not None:
            recalled[name] += 1
            progress.forecast.measured(stage, manifest.seconds)


def how_far(position: Position) -> str:
    """Return a position in words: `12 of 30 layers, 45 s`, `loading the model, 3 s`."""
    unit = position.unit
    if position.total:
        counted = f"{position.done:,.0f} of {position.total:,.0f} {unit}"
    else:
        counted = f"{position.done:,.0f} {unit}" if position.done else ""
    phase = shorten(position.phase, LONGEST_PHASE, placeholder=" ...")
    words = ": ".join(word for word in (phase, counted) if word)
    return ", ".join(word for word in (words, duration(position.seconds)) if word)


def duration(seconds: float) -> str:
    """Return seconds in words: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
