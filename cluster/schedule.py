"""What to hand to Ray next: the most urgent stages that the cluster has room for.

This is list scheduling by critical path (Graham 1969): when there is room, the ready stage with the
longest remaining path begins. One rule goes before: of two ready stages, one that others wait for
begins before one that nobody waits for. Nothing here uses Ray or the time of day, so the same code
schedules simulated clusters.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from sortedcontainers import SortedList

from cluster.graph import Graph, Resources, Stage, longest_paths, reader_counts

SURPLUS_SHARE = 0.02
"""Share of the cluster that is handed over beyond its room, so that no worker of a large cluster
waits for the driver. More of it would begin in Ray's order instead of by urgency."""

START_SECONDS = 10.0
"""About what a new actor costs: it imports libraries and loads a model. An idle actor gives
way to another stage only if that stage's path is longer than its pool's next one by more."""

IDLE_SECONDS = 60.0
"""How long an actor without work is kept if nothing else needs its place."""

RAY_DIGITS = 4
"""Decimal places of Ray's resource counts."""

Bundle = dict[str, float]
"""What a stage asks of a node, by Ray's names: `CPU`, `GPU`, `memory` in bytes."""

Rank = tuple[bool, float, int, int, str]
"""The smaller, the more urgent: whether nobody waits for the stage, minus the seconds of its
longest remaining path, minus the number of its readers, its place in the plan, its key."""


@dataclass(frozen=True)
class HandOver:
    """Hand a stage to Ray, or to an idle actor of its pool."""

    stage: Stage


@dataclass(frozen=True)
class StartActor:
    """Start an actor of this stage's pool."""

    stage: Stage


@dataclass(frozen=True)
class EndActor:
    """End an idle actor."""

    pool: str


def bundle(resources: Resources) -> Bundle:
    """Return what a stage or an actor holds on its node."""
    asked: Bundle = {"CPU": float(resources.cpus)}
    if resources.gpus:
        asked["GPU"] = resources.gpus
    if resources.memory_bytes is not None:
        asked["memory"] = float(resources.memory_bytes)
    return asked


def places(nodes: Sequence[Bundle], asked: Bundle) -> int:
    """Return how often the empty nodes hold a bundle."""
    each = [min(node.get(name, 0.0) / amount for name, amount in asked.items()) for node in nodes]
    return sum(math.floor(round(times, RAY_DIGITS)) for times in each)


@dataclass
class _Lane:
    """Stages that compete for the same places: those of one pool, or tasks of equal resources."""

    number: int
    pool: str | None
    resources: Resources
    fits: bool
    """Whether the empty nodes are enough for one of its places."""
    ready: SortedList = field(default_factory=SortedList)
    """`Rank`s, most urgent first."""
    handed_over: int = 0
    """Stages with Ray: at work, or waiting for room there."""
    idle: int = 0
    """Actors without a stage."""
    joining: int = 0
    """Actors that have not started yet, or must answer again."""
    idle_since: float = 0.0
    queued: tuple[SortedList, Rank] | None = None
    """Its queue in the schedule, and its entry there."""

    def __post_init__(self) -> None:
        """Add up what a place holds: a bundle for each actor that shares a stage."""
        actors = self.resources.actors
        self.bundle = {name: actors * each for name, each in bundle(self.resources).items()}

    @property
    def places(self) -> int:
        """Return how often its bundle is in use."""
        return self.handed_over + self.idle + self.joining

    @property
    def full(self) -> bool:
        """Return whether the pool has its maximum of actors."""
        most = self.resources.max_replicas
        return self.pool is not None and most is not None and self.places >= most

    @property
    def spare(self) -> int:
        """Return how many idle actors may be ended; while any is at work the minimum is kept."""
        kept = self.resources.min_replicas if self.handed_over else 0
        return max(0, min(self.idle, self.places - kept))

    @property
    def next(self) -> Rank | None:
        """Return the most urgent stage that an idle actor can take, or that has no place yet."""
        ready: Sequence[Rank] = self.ready
        if self.idle:
            return ready[0] if ready else None
        if self.joining < len(ready):
            return ready[self.joining]
        few = self.pool is not None and self.places < self.resources.min_replicas
        return ready[-1] if few and ready else None


class Schedule:
    """Decides what to do next; its caller carries out the steps and reports their results.

    A step must not cost more in a large grid, which may have thousands of pools. So it counts no
    lane again that has not changed, and looks at one lane of each queue only.
    """

    def __init__(self, graph: Graph, workers: int | None = None) -> None:
        """
        Args:
            workers: the most stages handed over at one time; None: as many as there is room for.
        """
        self.graph = graph
        self.workers = workers
        self._nodes: list[Bundle] = []
        self._total: Bundle = {}
        self._lanes: dict[object, _Lane] = {}
        self._at_work = 0
        """Stages with Ray."""
        self._joining = 0
        """Actors that have not started yet and fit a node."""
        self._used: defaultdict[str, float] = defaultdict(float)
        self._idle: dict[int, _Lane] = {}
        """Lanes with idle actors, by number."""
        self._queues: defaultdict[object, SortedList] = defaultdict(SortedList)
        """Ranks of what is next in the other lanes. In one queue all need the same: if the first
        cannot begin, none can."""
        self._ranks: dict[str, Rank] = {}
        self._awaited: set[str] = set()

    def resize(self, nodes: Sequence[Bundle]) -> None:
        """Set the resources of each node of the cluster."""
        self._nodes = list(nodes)
        names = {name for node in nodes for name in node}
        self._total = {name: sum(node.get(name, 0.0) for node in nodes) for name in names}
        lanes = self._lanes.values()
        fits = {asked: self._fits(asked) for asked in {lane.resources for lane in lanes}}
        self._joining, self._used = 0, defaultdict(float)
        for lane in lanes:
            lane.fits = fits[lane.resources]
            self._count(lane, lane.joining, lane.places)

    def order(self, keys: Sequence[str]) -> None:
        """Rank the stages that are to be made. None is ready before `add`.

        Args:
            keys: each after its inputs.
        """
        paths, read = longest_paths(self.graph, keys), reader_counts(self.graph, keys)
        self._ranks = {
            key: (not read[key], -paths[key], -read[key], place, key)
            for place, key in enumerate(keys)
        }
        self._awaited = {key for key in keys if read[key]}
        for lane in self._lanes.values():
            lane.ready.clear()
            self._queue(lane)

    def add(self, key: str) -> None:
        """Make a stage ready."""
        lane = self._lane(key)
        lane.ready.add(self._ranks[key])
        self._queue(lane)

    def discard(self, key: str) -> None:
        """Forget a stage that is made, or will not be."""
        self._awaited.discard(key)
        lane = self._lane(key)
        lane.ready.discard(self._ranks[key])
        self._queue(lane)

    def returned(self, key: str, now: float, *, actor_lost: bool = False) -> None:
        """Record that Ray has returned a stage, made or not."""
        lane = self._lane(key)
        if lane.pool is not None and not actor_lost:
            lane.idle_since = now
            self._change(lane, handed_over=-1, idle=1)
        else:
            self._change(lane, handed_over=-1)

    def joined(self, pool: str, now: float) -> None:
        """Record that an actor has started or answered."""
        lane = self._lanes[pool]
        lane.idle_since = now
        self._change(lane, joining=-1, idle=1)

    def asked(self, pool: str, count: int) -> None:
        """Record that so many idle actors must answer before they get a stage."""
        self._change(self._lanes[pool], idle=-count, joining=count)

    def lost(self, pool: str) -> None:
        """Record that an actor was lost before it had started or answered."""
        self._change(self._lanes[pool], joining=-1)

    def first(self, pool: str) -> str | None:
        """Return the key of a pool's most urgent ready stage, or None."""
        ready = self._lanes[pool].ready
        return ready[0][-1] if ready else None

    def step(self, now: float) -> HandOver | StartActor | EndActor | None:
        """Return the next step and count it as done; None means: wait until something changes.

        Args:
            now: seconds of a monotonic clock.
        """
        soon = self._at_work + self._joining
        most = math.inf if self.workers is None else self.workers
        if self._at_work >= most:
            return self._end_idle(now)
        free, lacking = self._free(), set[str]()
        for lane in self._in_turn():
            nobody_waits = lane.next is not None and lane.next[0]
            if lane.idle and not (nobody_waits and soon >= most):
                return self._hand_over(lane)
            if lane.idle or soon >= most:
                continue
            if nobody_waits and lacking & lane.bundle.keys():
                continue
            early = not nobody_waits or not self._awaited  # no stage that must go first can come
            if not lane.fits:
                if early and not lane.places:  # an autoscaler also sees what waits
                    return self._begin(lane)
                continue
            short = {name for name, amount in lane.bundle.items() if amount > free[name]}
            if not short:
                return self._begin(lane)
            victim = self._victim(lane, short, free)
            if victim is not None:
                return self._end(victim)
            if early and self._within_surplus(lane, free):
                return self._begin(lane)
            if not nobody_waits:
                lacking |= short
        return self._end_idle(now)

    def demand(self, most: int) -> tuple[list[Bundle], list[Bundle]]:
        """Return what is in use or waits with Ray, and what else is ready, most urgent first.

        Args:
            most: the most ready stages to return.
        """
        lanes = self._lanes.values()
        taken = [each for lane in lanes for each in lane.places * _bundles(lane.resources)]
        if self.workers is not None:
            most = max(0, min(most, self.workers - sum(lane.places for lane in lanes)))
        ready = heapq.merge(*(_without_place(lane) for lane in lanes))
        stages = [self.graph[key] for *_, key in islice(ready, most)]
        return taken, [each for stage in stages for each in _bundles(stage.resources)]

    def _lane(self, key: str) -> _Lane:
        stage = self.graph[key]
        name = stage.pool or tuple(bundle(stage.resources).items())
        if name not in self._lanes:
            lane = _Lane(len(self._lanes), stage.pool, stage.resources, self._fits(stage.resources))
            self._lanes[name] = lane
            self._count(lane, 0, 0)
        return self._lanes[name]

    def _fits(self, resources: Resources) -> bool:
        return places(self._nodes, bundle(resources)) >= resources.actors

    def _change(
        self, lane: _Lane, *, handed_over: int = 0, idle: int = 0, joining: int = 0
    ) -> None:
        """Add to the numbers of a lane."""
        lane.handed_over += handed_over
        lane.idle += idle
        lane.joining += joining
        self._at_work += handed_over
        self._count(lane, joining, handed_over + idle + joining)
        self._queue(lane)

    def _count(self, lane: _Lane, joining: int, places: int) -> None:
        """Add actors that join, and places, to those of the cluster."""
        held = places if lane.fits else 0  # what is with Ray and fits no node holds nothing
        self._joining += joining if lane.fits else 0
        for name, amount in lane.bundle.items():
            self._used[name] += held * amount

    def _queue(self, lane: _Lane) -> None:
        """Find the lane's place among those that may begin something."""
        if lane.queued is not None:
            queue, entry = lane.queued
            queue.remove(entry)
            lane.queued = None
        self._idle.pop(lane.number, None)
        following = lane.next
        if lane.idle:
            self._idle[lane.number] = lane
        elif following is not None and not lane.full:
            queue = self._queues[lane.resources, lane.pool is None, lane.places > 0]
            queue.add(following)
            lane.queued = queue, following

    def _in_turn(self) -> list[_Lane]:
        """Return the lanes that may begin something, the most urgent first."""
        first = [self._lane(queue[0][-1]) for queue in self._queues.values() if queue]
        return sorted([*first, *(lane for lane in self._idle.values() if lane.ready)], key=_turn)

    def _with_idle(self) -> Iterator[_Lane]:
        """Yield the lanes with idle actors, the oldest first."""
        for number in sorted(self._idle):
            yield self._idle[number]

    def _free(self) -> Bundle:
        """Return the cluster's resources less those in use by this run; below zero, something waits
        with Ray."""
        return {
            name: round(self._total.get(name, 0.0) - used, RAY_DIGITS)
            for name, used in self._used.items()
        }

    def _within_surplus(self, lane: _Lane, free: Bundle) -> bool:
        """Return whether a stage may wait with Ray. A further actor of a pool may not: it would
        wait as long as the pool's other actors are at work."""
        if lane.pool is not None and lane.places:
            return False
        return all(
            amount - free[name] <= SURPLUS_SHARE * self._total[name]
            for name, amount in lane.bundle.items()
        )

    def _begin(self, lane: _Lane) -> HandOver | StartActor:
        if lane.pool is None:
            return self._hand_over(lane)
        self._change(lane, joining=1)
        return StartActor(self.graph[lane.ready[0][-1]])

    def _hand_over(self, lane: _Lane) -> HandOver:
        key = lane.ready.pop(0)[-1]
        self._change(lane, handed_over=1, idle=0 if lane.pool is None else -1)
        return HandOver(self.graph[key])

    def _victim(self, lane: _Lane, short: set[str], free: Bundle) -> _Lane | None:
        """Return a pool whose idle actors can make room for the lane's next stage: one without
        work, or else the least urgent; None if ending all idle actors would not be enough."""
        others = [other for other in self._with_idle() if other.spare and short & {*other.bundle}]
        enough = all(
            lane.bundle[name]
            <= free[name] + sum(other.spare * other.bundle.get(name, 0.0) for other in others)
            for name in short
        )
        if not enough:
            return None
        return max(others, key=lambda other: (not other.ready, other.ready[:1]))

    def _end(self, lane: _Lane) -> EndActor:
        assert lane.pool is not None
        self._change(lane, idle=-1)
        return EndActor(lane.pool)

    def _end_idle(self, now: float) -> EndActor | None:
        """End an idle actor that has no work for long, or whose place something with Ray needs."""
        free = self._free()
        for lane in self._with_idle():
            waited_for = any(free[name] < 0 for name in lane.bundle)
            if lane.spare and (
                waited_for or (not lane.ready and now - lane.idle_since > IDLE_SECONDS)
            ):
                return self._end(lane)
        return None


def _turn(lane: _Lane) -> tuple[object, ...]:
    """Return the rank of the lane's next stage, raised by an actor's start if one is idle."""
    rank = lane.next
    assert rank is not None
    nobody_waits, path, *rest = rank
    return (nobody_waits, path - (START_SECONDS if lane.idle else 0.0), *rest)


def _bundles(resources: Resources) -> list[Bundle]:
    """Return what a stage holds, one bundle for each of its actors."""
    return resources.actors * [bundle(resources)]


def _without_place(lane: _Lane) -> Iterator[Rank]:
    """Yield the ready stages that need another place."""
    first, last = 0, None
    if lane.pool is not None:
        most, first = lane.resources.max_replicas, lane.idle + lane.joining
        last = None if most is None else first + max(0, most - lane.places)
    yield from lane.ready.islice(first, last)
