"""Forecast the time left of a run: the cost model's estimates, scaled by the measurements so far,
scheduled on the cluster's resources."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cluster.board import Position
from cluster.graph import Stage, descendants, readers

PRIOR_STAGES = 0.1
"""Weight of the prior in stages, before a kind's own measurements: the model's errors vary about
three times as much between kinds (in logarithms) as between stages of one kind."""

LEAST_SHARE = 0.05
"""Share of a stage's work to be done before its pace counts as measured."""

OVERDUE_SHARE = 0.1
"""Time left of an overdue stage, as a share of its expected time."""

MOST_PASSED = 8
"""The most stages that do not fit and let smaller ones behind them go first."""


@dataclass(frozen=True)
class Room:
    """The resources that a run may take of a cluster."""

    cpus: float
    gpus: float = 0.0
    workers: int | None = None
    """The most stages at one time."""


@dataclass
class _Sums:
    """Measured and estimated seconds of some stages."""

    measured: float = 0.0
    estimated: float = 0.0

    def add(self, measured: float, estimated: float) -> None:
        self.measured += measured
        self.estimated += estimated

    def scale(self, prior: float, prior_seconds: float) -> float:
        """Return measured over estimated seconds, shrunk in logarithms towards a prior with the
        weight of so many estimated seconds."""
        if not self.measured:
            return prior
        weight = self.estimated / (self.estimated + prior_seconds)
        return float((self.measured / self.estimated) ** weight * prior ** (1 - weight))


class Forecast:
    """Time left of a run. Each kind's estimates are scaled by the measured seconds of its stages,
    or of the other kinds if none of its stages has begun.

    Args:
        stages: the stages to make, each after its inputs.
        kind: returns a stage's kind; all stages of a kind are scaled alike.
        computes: returns whether a stage's time depends on the device's rate, as with forward
            passes.
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
        """Record the seconds of a stage, in this run or an earlier one."""
        self._sums[self.kind(stage)].add(seconds, stage.seconds)

    def made(self, stage: Stage, seconds: float) -> None:
        """Record that a stage is made."""
        if self._left.pop(stage.key, False):
            self.measured(stage, seconds)

    def failed(self, key: str) -> None:
        """Drop a failed stage and all that wait for it."""
        if key in self._left:  # an artifact that was damaged and made again is not
            for name in (key, *descendants(self._read_by, key)):
                self._left.pop(name, None)

    def waiting(self, at_work: Collection[str]) -> tuple[Counter[str], Counter[str]]:
        """Count by kind the stages that wait for room, and those that wait for other stages."""
        ready: Counter[str] = Counter()
        lacking: Counter[str] = Counter()
        left = set(self._left)  # the run goes on meanwhile, in another thread
        for key in left.difference(at_work):
            lacks = not left.isdisjoint(self.stages[key].inputs)
            (lacking if lacks else ready)[self.kind(self.stages[key])] += 1
        return ready, lacking

    def seconds_left(self, at_work: Mapping[str, Position], room: Room) -> float | None:
        """Return the seconds until the last stage ends; None before anything was measured.

        Args:
            at_work: positions of the stages on workers, by key.
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
        """Return the factor for each kind's estimates; None before anything was measured."""
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
            scales[name] = sums.get(name, _Sums()).scale(prior, PRIOR_STAGES * mean)
        for key, position in running.items():  # a stage of a new kind may be long overdue
            name = self.kind(self.stages[key])
            if name not in sums:
                scales[name] = max(scales[name], position.seconds / self.stages[key].seconds)
        return scales

    def _common(self, sums: Mapping[str, _Sums]) -> float:
        """Return the factor of the device's rate: the geometric mean over kinds that depend on it,
        weighted by how much of each was measured."""
        logs = weights = 0.0
        for name in self._computing & sums.keys():
            measured, estimated = sums[name].measured, sums[name].estimated
            if measured > 0:
                weight = estimated / (estimated + PRIOR_STAGES * self._mean.get(name, estimated))
                logs += weight * math.log(measured / estimated)
                weights += weight
        return math.exp(logs / weights) if weights else 1.0


def remaining(position: Position, expected: float) -> float:
    """Return the seconds left of a stage at work.

    Its own pace weighs as much as the share that is done, the expected seconds as much as the rest.
    """
    by_estimate = max(expected - position.seconds, OVERDUE_SHARE * expected)
    if not position.share:
        return by_estimate
    own = position.phase_seconds * (1 - position.share) / position.share
    if position.phase:  # only a part of the stage
        return max(own, by_estimate)
    return position.share * own + (1 - position.share) * max(0.0, expected * (1 - position.share))


def makespan(
    stages: Mapping[str, Stage],
    seconds: Mapping[str, float],
    read_by: Mapping[str, Collection[str]],
    running: Collection[str],
    room: Room,
) -> float:
    """Return the seconds until the last stage ends, by list scheduling (Graham 1969): the longest
    remaining paths begin first, and stages that nothing waits for last.

    Args:
        seconds: of every stage that is left, each after its inputs.
        read_by: keys of the stages that read each stage.
        running: stages already at work.
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
            if fits or key in running or not ends:  # or nothing else could run
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
