"""How long a run takes yet: the cost model's estimates, scaled by what was measured so far, laid
out on the cluster's room."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cluster.board import Position
from cluster.graph import Stage, descendants, readers

PRIOR = 0.1
"""Stages' worth of doubt that a kind differs from the others: between kinds the model's errors vary
by about three times as much (in logarithms) as between stages of one kind."""

LEAST_SHARE = 0.05
"""Of a stage's work must be done before its pace counts as measured."""

OVERDUE_SHARE = 0.1
"""Of what a stage is expected to take is still to come, once it has taken as long as that."""


MOST_PASSED = 8
"""Stages without room that are passed over for smaller ones behind them."""


@dataclass(frozen=True)
class Room:
    """Of a cluster, or of as much of it as a run may take."""

    cpus: float
    gpus: float = 0.0
    workers: int | None = None
    """At most so many stages at one time."""


@dataclass
class _Sums:
    """Seconds that stages took, and those that they were estimated to take."""

    measured: float = 0.0
    estimated: float = 0.0

    def add(self, measured: float, estimated: float) -> None:
        self.measured += measured
        self.estimated += estimated

    def scale(self, prior: float, doubt: float) -> float:
        """Measured over estimated seconds, drawn to a prior, in logarithms, by so many estimated
        seconds."""
        if not self.measured:
            return prior
        weight = self.estimated / (self.estimated + doubt)
        return float((self.measured / self.estimated) ** weight * prior ** (1 - weight))


class Forecast:
    """Time left of a run. Each kind's estimates are scaled by what its own stages took, and kinds
    of which none has begun yet by what the others did.

    Args:
        stages: those that are to be made, each after its inputs.
        kind: of a stage; all of a kind are scaled alike.
        computes: whether a stage's time depends on the device's rate, as that of kinds with a
            forward pass does.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        kind: Callable[[Stage], str],
        computes: Callable[[Stage], bool] = lambda stage: True,
    ) -> None:
        self.stages = stages
        self.kind = kind
        self._left = dict.fromkeys(stages, True)
        self._sums: defaultdict[str, _Sums] = defaultdict(_Sums)
        self._computing = {kind(stage) for stage in stages.values() if computes(stage)}
        estimates: defaultdict[str, list[float]] = defaultdict(list)
        for stage in stages.values():
            estimates[kind(stage)].append(stage.seconds)
        self._mean = {name: sum(each) / len(each) for name, each in estimates.items()}
        self._read_by = readers(stages)

    def measured(self, stage: Stage, seconds: float) -> None:
        """Take up what a stage took, in this run or an earlier one."""
        self._sums[self.kind(stage)].add(seconds, stage.seconds)

    def made(self, stage: Stage, seconds: float) -> None:
        """Take up a stage that is made."""
        if self._left.pop(stage.key, False):
            self.measured(stage, seconds)

    def failed(self, key: str) -> None:
        """Neither the stage nor what waits for it takes time any more."""
        if key in self._left:  # an artifact that was damaged and made again is not
            for name in (key, *descendants(self._read_by, key)):
                self._left.pop(name, None)

    def waiting(self, at_work: Collection[str]) -> tuple[Counter[str], Counter[str]]:
        """By kind, how many stages could begin if there was room, and how many wait for others."""
        ready: Counter[str] = Counter()
        lacking: Counter[str] = Counter()
        left = set(self._left)  # the run goes on meanwhile, in another thread
        for key in left.difference(at_work):
            lacks = not left.isdisjoint(self.stages[key].inputs)
            (lacking if lacks else ready)[self.kind(self.stages[key])] += 1
        return ready, lacking

    def seconds_left(self, at_work: Mapping[str, Position], room: Room) -> float | None:
        """None as long as nothing was measured.

        Args:
            at_work: of stages on workers, how far they are.
        """
        left = list(self._left)  # the run goes on meanwhile, in another thread
        running = {key: at_work[key] for key in left if key in at_work}
        scales = self._scales(running)
        if scales is None:
            return None
        expected = {
            key: self.stages[key].seconds * scales[self.kind(self.stages[key])] for key in left
        }
        for key, position in running.items():
            expected[key] = remaining(position, expected[key])
        return makespan(self.stages, expected, self._read_by, running, room)

    def _scales(self, running: Mapping[str, Position]) -> dict[str, float] | None:
        """By kind, what estimates are to be multiplied with."""
        sums = {
            name: _Sums(each.measured, each.estimated) for name, each in list(self._sums.items())
        }
        for key, position in running.items():
            if not position.phase and position.share >= LEAST_SHARE:
                done = position.share * self.stages[key].seconds
                name = self.kind(self.stages[key])
                sums.setdefault(name, _Sums()).add(position.phase_seconds, done)
        if not sums:
            return None
        common = self._common(sums)
        scales: dict[str, float] = {}
        for name, mean in self._mean.items():
            prior = common if name in self._computing else 1.0
            scales[name] = sums.get(name, _Sums()).scale(prior, PRIOR * mean)
        for key, position in running.items():  # a stage of a new kind may be long overdue
            name = self.kind(self.stages[key])
            if name not in sums:
                scales[name] = max(scales[name], position.seconds / self.stages[key].seconds)
        return scales

    def _common(self, sums: Mapping[str, _Sums]) -> float:
        """How far the device's rate is off: the geometric mean over kinds that depend on it, each
        weighed by how much of it was measured."""
        logs = weights = 0.0
        for name in self._computing & sums.keys():
            measured, estimated = sums[name].measured, sums[name].estimated
            if measured > 0:
                weight = estimated / (estimated + PRIOR * self._mean.get(name, estimated))
                logs += weight * math.log(measured / estimated)
                weights += weight
        return math.exp(logs / weights) if weights else 1.0


def remaining(position: Position, expected: float) -> float:
    """Seconds that a stage at work takes yet.

    By its own pace as far as it is done, and for the rest by what it was expected to take.
    """
    by_estimate = max(expected - position.seconds, OVERDUE_SHARE * expected)
    if not position.share:
        return by_estimate
    own = position.phase_seconds * (1 - position.share) / position.share
    if position.phase:  # a part of the stage: others may follow
        return max(own, by_estimate)
    return position.share * own + (1 - position.share) * max(0.0, expected * (1 - position.share))


def makespan(
    stages: Mapping[str, Stage],
    seconds: Mapping[str, float],
    read_by: Mapping[str, Collection[str]],
    running: Collection[str],
    room: Room,
) -> float:
    """When the last stage ends if those with the longest remaining paths begin first, and those
    that nobody waits for last (list scheduling, Graham 1969).

    Args:
        seconds: of every stage that is left, each after its inputs.
        read_by: keys of the stages that read each stage.
        running: stages that are at work already.
    """
    paths: dict[str, float] = {}
    lacking = {key: sum(name in seconds for name in set(stages[key].inputs)) for key in seconds}
    for key in reversed(list(seconds)):
        after = (paths[name] for name in read_by[key] if name in paths)
        paths[key] = seconds[key] + max(after, default=0.0)

    def rank(key: str) -> tuple[bool, bool, float, str]:
        awaited = any(name in seconds for name in read_by[key])
        return key not in running, not awaited, -paths[key], key

    ready = [rank(key) for key, count in lacking.items() if not count or key in running]
    heapq.heapify(ready)
    free_cpus, free_gpus = room.cpus, room.gpus
    places = len(seconds) if room.workers is None else room.workers
    ends: list[tuple[float, str]] = []
    now = 0.0
    while ready or ends:
        passed: list[tuple[bool, bool, float, str]] = []
        while ready and len(ends) < places and len(passed) < MOST_PASSED:
            entry = heapq.heappop(ready)
            key = entry[-1]
            asked = stages[key].resources
            fits = asked.cpus <= free_cpus and asked.gpus <= free_gpus
            if fits or key in running or not ends:  # what no room fits waits for a larger cluster
                free_cpus, free_gpus = free_cpus - asked.cpus, free_gpus - asked.gpus
                heapq.heappush(ends, (now + seconds[key], key))
            else:
                passed.append(entry)
        for entry in passed:
            heapq.heappush(ready, entry)
        now, key = heapq.heappop(ends)
        asked = stages[key].resources
        free_cpus, free_gpus = free_cpus + asked.cpus, free_gpus + asked.gpus
        for name in read_by[key]:
            if name in lacking:
                lacking[name] -= 1
                if not lacking[name] and name not in running:
                    heapq.heappush(ready, rank(name))
    return now
