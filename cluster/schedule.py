"""What to hand to Ray next: the most urgent stages that the cluster has room for.

This is list scheduling by critical path (Graham 1969): where there is room, the stage with the
longest remaining path begins. One rule comes first: no stage that nobody waits for begins before
one that others wait for, while both are ready. Nothing here knows Ray or the time of day, so that
a simulated cluster can be scheduled by the same code.
"""

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from cluster.graph import Graph, Resources, Stage, longest_paths, unlocked

SURPLUS_SHARE = 0.02
"""Of the cluster: handed over beyond its room, so that of many workers none waits for the driver.
More would begin in Ray's order instead of by urgency."""

START_SECONDS = 10.0
"""What a new actor costs, about: it imports libraries and loads a model. An idle actor is not ended
for a stage that is more urgent than the next one of its pool by less."""

IDLE_SECONDS = 60.0
"""How long an actor is kept that has no work, if nothing else needs its place."""

RAY_DIGITS = 4
"""Decimal places that Ray counts resources to."""

Bundle = dict[str, float]
"""What a stage asks of a node, by Ray's names: `CPU`, `GPU`, `memory` in bytes."""

Rank = tuple[bool, float, int, int, str]
"""The smaller, the more urgent: whether nobody waits for the stage, minus the seconds of its
longest remaining path, minus the number of stages that it leads to, its place in the plan; its key.
"""


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
    """What a stage or an actor holds while it is there."""
    asked: Bundle = {"CPU": float(resources.cpus)}
    if resources.gpus:
        asked["GPU"] = resources.gpus
    if resources.memory_bytes is not None:
        asked["memory"] = float(resources.memory_bytes)
    return asked


@dataclass
class _Lane:
    """Stages that take the same place: the actors of one pool, or tasks of equal resources."""

    pool: str | None
    resources: Resources
    ready: list[Rank] = field(default_factory=list)
    """The most urgent first."""
    handed_over: int = 0
    """Stages with Ray: at work, or waiting for room there."""
    idle: int = 0
    """Actors without a stage."""
    joining: int = 0
    """Actors that have not started yet."""
    idle_since: float = 0.0
    fits: bool = False
    """Whether a node, of those that there are, can hold it."""

    def __post_init__(self) -> None:
        self.bundle = bundle(self.resources)

    @property
    def places(self) -> int:
        """How often its bundle is in use."""
        return self.handed_over + self.idle + self.joining

    @property
    def full(self) -> bool:
        """Whether the pool has as many actors as it may have."""
        most = self.resources.max_replicas
        return self.pool is not None and most is not None and self.places >= most

    @property
    def spare(self) -> int:
        """Idle actors that may be ended: not those of the minimum while others are at work."""
        kept = self.resources.min_replicas if self.handed_over else 0
        return max(0, min(self.idle, self.places - kept))

    @property
    def next(self) -> Rank | None:
        """The most urgent stage that no place is there for yet, or an idle actor of its own."""
        if self.idle:
            return self.ready[0] if self.ready else None
        if self.joining < len(self.ready):
            return self.ready[self.joining]
        few = self.pool is not None and self.places < self.resources.min_replicas
        return self.ready[-1] if few and self.ready else None


class Schedule:
    """Decides; whoever carries its steps out tells it what came of them."""

    def __init__(self, graph: Graph, workers: int | None = None) -> None:
        """
        Args:
            workers: stages handed over at one time, at the most; None leaves that to the room.
        """
        self.graph = graph
        self.workers = workers
        self._nodes: list[Bundle] = []
        self._total: Bundle = {}
        self._lanes: dict[object, _Lane] = {}
        self._ranks: dict[str, Rank] = {}
        self._awaited: set[str] = set()

    def resize(self, nodes: Sequence[Bundle]) -> None:
        """Say what each node of the cluster has."""
        self._nodes = list(nodes)
        names = {name for node in nodes for name in node}
        self._total = {name: sum(node.get(name, 0.0) for node in nodes) for name in names}
        for lane in self._lanes.values():
            lane.fits = self._fits_a_node(lane.bundle)

    def order(self, keys: Sequence[str]) -> None:
        """Rank the stages that are to be made; none of them is ready until that is said.

        Args:
            keys: each after its inputs.
        """
        paths, ahead = longest_paths(self.graph, keys), unlocked(self.graph, keys)
        self._ranks = {
            key: (not ahead[key], -paths[key], -ahead[key], place, key)
            for place, key in enumerate(keys)
        }
        self._awaited = {key for key in keys if ahead[key]}
        for lane in self._lanes.values():
            lane.ready.clear()

    def add(self, key: str) -> None:
        """Say that a stage can be made now."""
        bisect.insort(self._lane(key).ready, self._ranks[key])

    def discard(self, key: str) -> None:
        """Say that a stage is made, or will not be."""
        self._awaited.discard(key)
        ready, rank = self._lane(key).ready, self._ranks[key]
        place = bisect.bisect_left(ready, rank)
        if place < len(ready) and ready[place] == rank:
            del ready[place]

    def returned(self, key: str, now: float, *, actor_lost: bool = False) -> None:
        """Say that a stage is with Ray no more, made or not."""
        lane = self._lane(key)
        lane.handed_over -= 1
        if lane.pool is not None and not actor_lost:
            lane.idle += 1
            lane.idle_since = now

    def joined(self, pool: str, now: float) -> None:
        """Say that an actor has started."""
        lane = self._lanes[pool]
        lane.joining -= 1
        lane.idle += 1
        lane.idle_since = now

    def lost(self, pool: str) -> None:
        """Say that an actor ended before it had started."""
        self._lanes[pool].joining -= 1

    def first(self, pool: str) -> str | None:
        """The most urgent stage of a pool that is ready."""
        ready = self._lanes[pool].ready
        return ready[0][-1] if ready else None

    def step(self, now: float) -> HandOver | StartActor | EndActor | None:
        """The next thing to do, which counts as done; None: wait until something changes.

        Args:
            now: seconds, of any clock that goes forward.
        """
        at_work = sum(lane.handed_over for lane in self._lanes.values())
        soon = at_work + sum(lane.joining for lane in self._lanes.values() if lane.fits)
        most = math.inf if self.workers is None else self.workers
        if at_work >= most:
            return self._end_idle(now)
        free, lacking = self._free(), set[str]()
        open_lanes = [lane for lane in self._lanes.values() if lane.next is not None]
        for lane in sorted(open_lanes, key=_turn):
            nobody_waits = lane.next is not None and lane.next[0]
            if lane.idle and not (nobody_waits and soon >= most):
                return self._hand_over(lane)
            if lane.idle or lane.full or soon >= most:
                continue
            if nobody_waits and lacking & lane.bundle.keys():
                continue
            early = not nobody_waits or not self._awaited  # none may come that must go first
            if not lane.fits:
                if early and not lane.places:  # an autoscaler sees what waits, too
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
        """What is in use or waits with Ray, and what more is ready, the most urgent first.

        Args:
            most: of those that are ready.
        """
        taken = [lane.bundle for lane in self._lanes.values() for _ in range(lane.places)]
        if self.workers is not None:
            most = max(0, min(most, self.workers - len(taken)))
        ready = heapq.merge(*(_without_place(lane) for lane in self._lanes.values()))
        return taken, [bundle(self.graph[key].resources) for *_, key in islice(ready, most)]

    def _lane(self, key: str) -> _Lane:
        stage = self.graph[key]
        name = stage.pool or tuple(bundle(stage.resources).items())
        if name not in self._lanes:
            lane = self._lanes[name] = _Lane(stage.pool, stage.resources)
            lane.fits = self._fits_a_node(lane.bundle)
        return self._lanes[name]

    def _fits_a_node(self, asked: Bundle) -> bool:
        return any(
            all(amount <= node.get(name, 0.0) for name, amount in asked.items())
            for node in self._nodes
        )

    def _free(self) -> Bundle:
        """What of the cluster is not in use by us; below zero, something waits with Ray."""
        lanes = self._lanes.values()
        free = {name: self._total.get(name, 0.0) for lane in lanes for name in lane.bundle}
        for lane in lanes:
            if lane.fits:  # else what is with Ray holds nothing
                for name, amount in lane.bundle.items():
                    free[name] -= lane.places * amount
        return {name: round(amount, RAY_DIGITS) for name, amount in free.items()}

    def _within_surplus(self, lane: _Lane, free: Bundle) -> bool:
        """Whether a stage may wait with Ray; a further actor of a pool may not, since it would wait
        as long as the others of its pool are at work."""
        if lane.pool is not None and lane.places:
            return False
        return all(
            amount - free[name] <= SURPLUS_SHARE * self._total[name]
            for name, amount in lane.bundle.items()
        )

    def _begin(self, lane: _Lane) -> HandOver | StartActor:
        if lane.pool is None:
            return self._hand_over(lane)
        lane.joining += 1
        return StartActor(self.graph[lane.ready[0][-1]])

    def _hand_over(self, lane: _Lane) -> HandOver:
        key = lane.ready.pop(0)[-1]
        lane.handed_over += 1
        lane.idle -= lane.pool is not None
        return HandOver(self.graph[key])

    def _victim(self, lane: _Lane, short: set[str], free: Bundle) -> _Lane | None:
        """A pool whose idle actors can make room for the lane's next stage: one that has no work,
        or else the least urgent."""
        others = [
            other for other in self._lanes.values() if other.spare and short & {*other.bundle}
        ]
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
        lane.idle -= 1
        return EndActor(lane.pool)

    def _end_idle(self, now: float) -> EndActor | None:
        """End an actor whose place something that is with Ray waits for, or that was idle long."""
        free = self._free()
        for lane in self._lanes.values():
            waited_for = any(free[name] < 0 for name in lane.bundle)
            if lane.spare and (
                waited_for or (not lane.ready and now - lane.idle_since > IDLE_SECONDS)
            ):
                return self._end(lane)
        return None


def _turn(lane: _Lane) -> tuple[object, ...]:
    """The rank of the lane's next stage; sooner by the start of an actor if one is there."""
    rank = lane.next
    assert rank is not None
    nobody_waits, path, *rest = rank
    return (nobody_waits, path - (START_SECONDS if lane.idle else 0.0), *rest)


def _without_place(lane: _Lane) -> list[Rank]:
    """What is ready and would take a further place."""
    if lane.pool is None:
        return lane.ready
    most = lane.resources.max_replicas
    beyond = lane.ready[lane.idle + lane.joining :]
    return beyond if most is None else beyond[: max(0, most - lane.places)]
