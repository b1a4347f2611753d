"""Running a graph of stages on Ray: tasks, actor pools, retries."""

import logging
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster import leases
from cluster.autoscaler import MAX_READY, RoomRequest
from cluster.graph import Graph, Stage, descendants, needed, readers
from cluster.helpers import Room, ray_options
from cluster.limits import TimeLimitError
from cluster.remedies import lacks_device_memory, one_line
from cluster.schedule import EndActor, HandOver, Schedule, StartActor
from cluster.session import alive_nodes
from cluster.store import CorruptArtifactError, Failure, Manifest, Store, StoreError
from cluster.watcher import UNWATCHED, Watcher
from cluster.worker import (
    NO_AIDS,
    Aids,
    Execute,
    Held,
    Maker,
    Replica,
    WorkerLostError,
    make_artifact,
)

logger = logging.getLogger(__name__)

MAX_REMAKES = 3
"""How often a damaged artifact is made again before its reader counts as failed."""

RESIZE_SECONDS = 5.0
"""Between two looks at the size of the cluster."""

POLL_SECONDS = 2.0
"""Between two checks whether another run is done with a stage."""

_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Outcome:
    """What became of a run."""

    made: set[str] = field(default_factory=set)
    """Stages that were made, by this run or meanwhile by another on the same store."""
    failed: dict[str, Failure] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    """Stages that were not tried, each with the failed stage that it waits for."""
    repeated: Counter[str] = field(default_factory=Counter)
    """How often a stage was tried again."""


def run_graph(
    graph: Graph,
    targets: list[str],
    execute: Execute,
    store: Store,
    versions: Mapping[str, str],
    *,
    aids: Aids = NO_AIDS,
    workers: int | None = None,
    watcher: Watcher = UNWATCHED,
) -> Outcome:
    """Make the targets, and all they need that the store does not hold.

    Args:
        versions: of packages; recorded with every artifact.
        workers: the largest number of stages at work at one time; None: as the cluster has room.
        watcher: what the run reports to.
    """
    inputs = {name for stage in graph.values() for name in stage.inputs}  # also copies from the hub
    with leases.Claim(store, graph.keys() | inputs) as claim:
        maker = Maker(execute, store.url, dict(versions), claim.run, aids, watcher.board)
        return _Run(graph, targets, maker, store, workers, watcher).to_the_end()


class _Run:
    def __init__(
        self,
        graph: Graph,
        targets: list[str],
        maker: Maker,
        store: Store,
        workers: int | None,
        watcher: Watcher,
    ) -> None:
        self.graph = graph
        self.store = store
        self.watcher = watcher
        self.maker = ray.put(maker)
        self.pools: dict[str, _Pool] = {}
        self.remakes: Counter[str] = Counter()
        self.outcome = Outcome()
        self.observer = leases.Observer(store)
        self.held: dict[str, str] = {}
        """Stages that another run is making, and that run."""
        self.dead: frozenset[str] = frozenset()
        self.polled = time.monotonic()
        read = {name for stage in graph.values() for name in stage.inputs}
        self.present = store.keys() & (graph.keys() | read)
        ordered = needed(graph, graph, self.present - graph.keys())
        self.places = {key: place for place, key in enumerate(ordered)}
        self.read_by = readers(graph)
        self.waiting = dict.fromkeys(needed(graph, targets, self.present))
        self.in_flight: dict[ray.ObjectRef, str] = {}
        self.schedule = Schedule(graph, workers)
        self.request = RoomRequest()
        self.resized = -RESIZE_SECONDS
        self._sort_waiting()

    def _sort_waiting(self) -> None:
        """Count the inputs that each waiting stage lacks, and schedule those that lack none."""
        self.lacking: dict[str, int] = {}
        unmade = {*self.waiting, *self.in_flight.values(), *self.held}
        self.schedule.order(sorted(unmade, key=self.places.__getitem__))
        for key in self.waiting:
            self.lacking[key] = len(set(self.graph[key].inputs) - self.present)
            if not self.lacking[key]:
                self._make_ready(key)

    def _make_ready(self, key: str) -> None:
        self.waiting[key] = None
        self.schedule.add(key)

    def to_the_end(self) -> Outcome:
        try:
            while self.waiting or self.in_flight or self.held:
                self._resize()
                self._take_steps()
                self._report_replicas()
                self._wait()
        finally:
            for pool in self.pools.values():
                pool.release()
            self.request.withdraw()
        return self.outcome

    def _resize(self) -> None:
        """Every few seconds, look at the size of the cluster and ask for the room it lacks."""
        now = time.monotonic()
        if now - self.resized < RESIZE_SECONDS:
            return
        self.resized = now
        self.schedule.resize(alive_nodes())
        self.request.update(*self.schedule.demand(MAX_READY), now)

    def _wait(self) -> None:
        """Take what ends next, and check on what other runs are making."""
        joining = {reference: pool for pool in self.pools.values() for reference in pool.joining}
        timeout = POLL_SECONDS if self.held else RESIZE_SECONDS
        if self.in_flight or joining:
            done, _ = ray.wait([*self.in_flight, *joining], num_returns=1, timeout=timeout)
        else:  # wait for another run, or for a node that some stage fits
            done = []
            time.sleep(POLL_SECONDS)
        for reference in done:
            if reference in self.in_flight:
                self._receive(reference)
            else:
                self._admit(joining[reference], reference)
        if self.held and time.monotonic() - self.polled >= POLL_SECONDS:
            self._poll_held()
            self.polled = time.monotonic()

    def _poll_held(self) -> None:
        """Schedule the stages that another run has finished, given up or died over."""
        for key, run in list(self.held.items()):
            if not self.observer.alive(run):
                self.dead |= {run}
            elif leases.holder(self.store, key) == run:
                continue
            del self.held[key]
            self._make_ready(key)

    def _take_steps(self) -> None:
        while (step := self.schedule.step(time.monotonic())) is not None:
            match step:
                case HandOver(stage):
                    del self.waiting[stage.key]
                    self.in_flight[self._submit(stage)] = stage.key
                    self.watcher.started(stage)
                case StartActor(stage):
                    assert stage.pool is not None
                    self.pools.setdefault(stage.pool, _Pool(stage)).start()
                case EndActor(pool):
                    self.pools[pool].end()

    def _submit(self, stage: Stage) -> ray.ObjectRef:
        if stage.pool is not None:
            return self.pools[stage.pool].submit(stage, self.maker, self.dead)
        task = _remote_make.options(**ray_options(stage.resources), max_retries=0)
        return task.remote(stage, self.maker, self.dead)

    def _report_replicas(self) -> None:
        counts: Counter[str] = Counter()
        for pool in self.pools.values():
            counts[pool.kind] += len(pool.idle) + len(pool.serving)
        self.watcher.replicas(counts)

    def _admit(self, pool: "_Pool", reference: ray.ObjectRef) -> None:
        """Add a replica that answers. If replicas of the pool are lost before they answer, again
        and again, fail a stage."""
        try:
            pool.admit(reference)
            self.schedule.joined(pool.name, time.monotonic())
        except RayError as error:
            logger.warning("an actor for %s: lost: %s", pool.kind, _last_line(error))
            self.schedule.lost(pool.name)
            first = self.schedule.first(pool.name)
            if first is not None and pool.losses > self.graph[first].resources.retries:
                del self.waiting[first]
                self._fail(self.graph[first], error, error)

    def _ask_idle(self) -> None:
        """Let all idle actors answer before they get a stage: they may be lost too, as a whole
        node is, and one loss shall not cost a stage several of its tries."""
        for pool in self.pools.values():
            self.schedule.asked(pool.name, pool.ask())

    def _try_again(self, stage: Stage, error: BaseException) -> bool:
        """Count another try of a lost stage; return False if none is left."""
        if self.outcome.repeated[stage.key] >= stage.resources.retries:
            return False
        self.outcome.repeated[stage.key] += 1
        logger.warning("%s: lost: %s; trying again", stage.label, _last_line(error))
        return True

    def _receive(self, reference: ray.ObjectRef) -> None:
        key = self.in_flight.pop(reference)
        stage = self.graph[key]
        pool = None if stage.pool is None else self.pools[stage.pool]
        now = time.monotonic()
        if self.watcher.board is not None:
            self.watcher.board.end(key)
        try:
            result: Manifest | Held = ray.get(reference)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            # An error of Ray's own means that a process or a node was lost.
            lost = isinstance(cause, RayError | WorkerLostError)
            unfit = lost or lacks_device_memory(cause)
            if pool is not None:
                pool.take_back(reference, keep=not unfit)
            self.schedule.returned(key, now, actor_lost=unfit)
            if lost:
                self._ask_idle()
            if isinstance(cause, CorruptArtifactError) and self._remake(cause, key):
                return
            if (lost or isinstance(cause, TimeLimitError)) and self._try_again(stage, cause):
                self._make_ready(key)
                return
            self._fail(stage, error, cause)
            return
        if pool is not None:
            pool.take_back(reference)
        self.schedule.returned(key, now)
        if isinstance(result, Held):
            self.held[key] = result.run
            return
        self.present.add(key)
        self.schedule.discard(key)
        for reader in self.read_by[key]:
            if reader in self.waiting and self.lacking[reader]:
                self.lacking[reader] -= 1
                if not self.lacking[reader]:
                    self._make_ready(reader)
        self.outcome.made.add(key)
        self.watcher.ended(stage, result)

    def _remake(self, damage: CorruptArtifactError, reader: str) -> bool:
        """Schedule a damaged input again, and its reader after it; return False if that is over."""
        self.remakes[damage.key] += 1
        if damage.key not in self.graph:  # a copy from the hub, which no stage makes
            return False
        if damage.key in self.outcome.failed or self.remakes[damage.key] > MAX_REMAKES:
            return False
        self.waiting[reader] = None
        # Another reader may have found the damage first, and a new artifact may already be there.
        if damage.key in self.present and self.store.damaged([damage.key]):
            logger.warning("%s; it is made again", damage)
            self.store.discard(damage.key)
            self.present.discard(damage.key)
            under_way = {*self.in_flight.values(), *self.held}
            again = needed(self.graph, [damage.key], self.present)
            self.waiting |= dict.fromkeys(key for key in again if key not in under_way)
        self._sort_waiting()
        return True

    def _fail(self, stage: Stage, error: RayError, cause: BaseException) -> None:
        failure = Failure(
            key=stage.key,
            kind=stage.kind,
            error=one_line(cause, stage),
            traceback=_TERMINAL_COLOUR.sub("", str(error)),
            finished=time.time(),
        )
        try:
            self.store.record_failure(failure)
        except StoreError as unwritable:  # then it is only in the log
            logger.error("%s: cannot record its failure: %s", stage.label, unwritable)
        self.outcome.failed[stage.key] = failure
        self.schedule.discard(stage.key)
        for key in descendants(self.read_by, stage.key) & self.waiting.keys():
            del self.waiting[key]
            self.schedule.discard(key)
            self.outcome.blocked[key] = stage.key
        self.watcher.ended(stage, failure)


class _Pool:
    """Actors that make the stages of one pool, one at a time each.

    Only actors that have answered get a stage, so an actor that waits for room holds nothing up. A
    lost actor is replaced as long as there is work for it.
    """

    def __init__(self, first: Stage) -> None:
        assert first.pool is not None
        self.name = first.pool
        self.kind = first.kind
        self.resources = first.resources
        self.rooms: dict[Any, Room] = {}
        self.idle: list[Any] = []
        self.serving: dict[ray.ObjectRef, Any] = {}
        self.joining: dict[ray.ObjectRef, Any] = {}
        self.losses = 0
        """Since an actor last answered: how often actors were lost instead. Those that were called
        before a loss was seen belong to that loss."""
        self._losses_seen: dict[ray.ObjectRef, int] = {}

    def start(self) -> None:
        """Start one more actor."""
        room = Room(self.resources)
        actor = _remote_replica.options(**room.options).remote()
        self.rooms[actor] = room
        self._call(actor)

    def ask(self) -> int:
        """Make the idle actors join again; return how many."""
        asked, self.idle = self.idle, []
        for actor in asked:
            self._call(actor)
        return len(asked)

    def _call(self, actor: Any) -> None:
        reference = actor.start.remote()
        self.joining[reference] = actor
        self._losses_seen[reference] = self.losses

    def admit(self, reference: ray.ObjectRef) -> None:
        """Add an actor that has answered."""
        actor = self.joining.pop(reference)
        seen = self._losses_seen.pop(reference)
        try:
            ray.get(reference)
        except RayError:
            self._end(actor)
            if seen == self.losses:
                self.losses += 1
            raise
        self.losses = 0
        self.idle.append(actor)

    def submit(self, stage: Stage, maker: ray.ObjectRef, dead: frozenset[str]) -> ray.ObjectRef:
        """Hand the stage to an idle actor."""
        actor = self.idle.pop()  # the last one that worked: its memory is warm
        reference = actor.make.remote(stage, maker, dead)
        self.serving[reference] = actor
        return reference

    def take_back(self, reference: ray.ObjectRef, *, keep: bool = True) -> None:
        """Make an actor idle again, or end it if its process is lost or unfit."""
        actor = self.serving.pop(reference)
        if keep:
            self.idle.append(actor)
        else:
            self._end(actor)

    def end(self) -> None:
        """End the actor that has been idle longest."""
        self._end(self.idle.pop(0))

    def release(self) -> None:
        """End all actors."""
        for actor in (*self.idle, *self.serving.values(), *self.joining.values()):
            self._end(actor)

    def _end(self, actor: Any) -> None:
        ray.kill(actor)
        self.rooms.pop(actor).release()


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[-1]


_remote_make = ray.remote(make_artifact)
_remote_replica = ray.remote(Replica)
