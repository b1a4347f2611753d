"""How far a run has come: what is made of each stage, how fast, and how long it will take yet."""

import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.graph import Stage
from cluster.store import Failure, Manifest
from jobs.cost import UTILISATION
from jobs.plan import ORDER, POOLED, Plan
from pipeline.specs import GenerateSpec, ShardSpec

LAST_ERRORS = 5

COMPUTING = {f"{kind} shard" if kind in POOLED else kind for kind in UTILISATION}
"""Lines whose stages pass tokens through a model."""


@dataclass
class Line:
    """One kind of stage."""

    total: int = 0
    done: int = 0
    failed: int = 0
    at_work: int = 0
    """Handed to Ray: running, or waiting for room on the cluster."""
    seconds: float = 0.0
    """What those that are done took together."""

    @property
    def left(self) -> int:
        """Those that have not ended."""
        return max(0, self.total - self.done - self.failed)


@dataclass(frozen=True)
class Busy:
    """What of the cluster is in use."""

    cpus: float
    all_cpus: float
    gpus: float
    all_gpus: float

    def __str__(self) -> str:
        cpus = f"CPUs {self.cpus:g}/{self.all_cpus:g}"
        return f"{cpus}, GPUs {self.gpus:g}/{self.all_gpus:g}" if self.all_gpus else cpus


class Progress:
    """The figures of a run; each stage that ends costs the same, however many there are."""

    def __init__(self, totals: Mapping[str, int], samples: int = 0) -> None:
        """
        Args:
            totals: stages to make, by line.
            samples: to be generated.
        """
        self.lines = {name: Line(totals[name]) for name in ORDER if totals.get(name)}
        self.samples_to_make = samples
        self.samples = self.tokens = 0
        self.replicas: Mapping[str, int] = {}
        self.errors: deque[str] = deque(maxlen=LAST_ERRORS)
        self.began = time.monotonic()
        self.generating_since: float | None = None
        self._at_work: set[str] = set()

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
        """Count a stage that is handed to Ray, maybe once more."""
        if stage.key not in self._at_work:
            self._at_work.add(stage.key)
            self._line(stage).at_work += 1

    def end(self, stage: Stage, result: Manifest | Failure) -> None:
        """Count a stage that has ended."""
        line = self._line(stage)
        if stage.key in self._at_work:
            self._at_work.remove(stage.key)
            line.at_work -= 1
        if isinstance(result, Failure):
            line.failed += 1
            self.errors.append(f"{stage.label}: {result.error} ({stage.key})")
            return
        line.done += 1
        line.total = max(line.total, line.done + line.failed)  # a damaged one is made again
        line.seconds += result.seconds
        if line_name(stage) == "generate shard":
            if self.generating_since is None:
                self.generating_since = time.monotonic() - result.seconds
            self.samples += result.report["samples"]
            self.tokens += result.report["tokens_generated"]

    def tokens_a_second(self) -> float:
        """Generated tokens a second, since the first shard that is done began."""
        if self.generating_since is None:
            return 0.0
        return self.tokens / max(time.monotonic() - self.generating_since, 1e-9)

    def seconds_left(self) -> float | None:
        """What is left of each kind at its mean so far, as many at a time as so far on average.

        Kinds of which none is done yet count with the mean of all: then it is no more than a hint.
        None before the first is done.
        """
        done = sum(line.done for line in self.lines.values())
        spent = sum(line.seconds for line in self.lines.values())
        if not spent or not self.seconds:
            return None
        mean = spent / done
        lines = self.lines.values()
        left = sum(line.left * (line.seconds / line.done if line.done else mean) for line in lines)
        return left / max(spent / self.seconds, 1e-9)

    def summary(self, busy: Busy | None) -> str:
        """All figures in a line of a log."""
        return "; ".join(
            [
                f"{self.ended}/{self.total} stages in {duration(self.seconds)}",
                *([f"{self.failed} failed"] if self.failed else []),
                *(
                    f"{name} {line.done}/{line.total}"
                    for name, line in self.lines.items()
                    if line.at_work
                ),
                *self._figures(busy),
            ]
        )

    def view(self, busy: Busy | None) -> Group:
        """All figures for a terminal."""
        table = Table(title=None)
        table.add_column("stage")
        for heading in ("done", "failed", "in flight", "left", "seconds each", "replicas"):
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
        return Group(table, Text(figures), *errors)

    def _figures(self, busy: Busy | None) -> Iterator[str]:
        if self.samples_to_make and self.samples < self.samples_to_make:
            yield f"{self.samples:,} of {self.samples_to_make:,} samples"
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
        """Actors of a line; the stages that join shards have none."""
        kind = name.removesuffix(" shard")
        return self.replicas.get(kind) if name != kind or kind not in POOLED else None


def computes(stage: Stage) -> bool:
    """Whether a stage's time depends on the device's rate."""
    return line_name(stage) in COMPUTING


def line_name(stage: Stage) -> str:
    """The line of `jobs.plan.ORDER` that a stage belongs to."""
    shard = stage.kind in POOLED and stage.pool is not None
    return f"{stage.kind} shard" if shard else stage.kind


def progress_of(plan: Plan, missing: Collection[str]) -> Progress:
    """The figures of a run that is to make what is missing."""
    totals = Counter(line_name(plan.graph[key]) for key in missing)
    samples = 0
    for key in missing:
        match plan.specs[key]:
            case ShardSpec(of=GenerateSpec() as spec, index=index):
                samples += min(spec.shard_size, spec.num_samples - index * spec.shard_size)
    return Progress(totals, samples)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
