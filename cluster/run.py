"""Running a graph of stages on Ray: tasks, actor pools, retries, bounded work in flight."""

import heapq
import logging
import os
import platform
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from cluster import leases
from cluster.board import Board, Tell
from cluster.graph import Graph, Stage, descendants, needed, readers, unlocked
from cluster.limits import TimeLimitError, time_limit
from cluster.memory import PeakMemory
from cluster.remedies import lacks_device_memory, one_line
from cluster.store import CorruptArtifactError, Failure, Manifest, Partial, Store, StoreError

logger = logging.getLogger(__name__)

MAX_REMAKES = 3
"""How often one artifact that turns out damaged is made again before the stage counts as failed."""

MIN_IN_FLIGHT = 64
"""Tasks handed to Ray at one time, at the least, so that an autoscaler sees work waiting."""

POLL_SECONDS = 2.0
"""How often one looks whether another run is done with a stage."""

CALL_SECONDS = 20.0
"""How long an actor waits for its first call, which is sent as soon as it is asked for."""

_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class WorkerLostError(RuntimeError):
    """Raised by `execute` where its process can make no further stage, as with a dead engine."""


class Execute(Protocol):
    """Makes one stage: reads `artifacts`, writes `output`, returns a report; may keep in `partial`
    what another attempt need not do again."""

    def __call__(
        self,
        payload: str,
        artifacts: Mapping[str, Path],
        output: Path,
        cpus: int,
        partial: Partial,
    ) -> dict[str, Any]: ...


Prepare = Callable[[str], object]
Reporting = Callable[[Tell], AbstractContextManager[None]]
Observe = Callable[[Stage, Manifest | Failure], None]
Started = Callable[[Stage], None]
Replicas = Callable[[Mapping[str, int]], None]


@dataclass
class Progress:
    """What became of a run."""

    made: set[str] = field(default_factory=set)
    """Stages that were made, here or meanwhile by another run on the same store."""
    failed: dict[str, Failure] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    """Stages that were not tried, and the failed stage that each waits for."""
    repeated: Counter[str] = field(default_factory=Counter)
    """How often a stage was tried again."""


@dataclass(frozen=True)
class Held:
    """Says that another run is making the stage."""

    run: str


@dataclass(frozen=True)
class Maker:
    """What is the same for all stages of a run."""

    execute: Execute
    store: str
    versions: dict[str, str]
    run: str
    prepare: Prepare
    board: Board | None = None
    reporting: Reporting = lambda tell: nullcontext()


def run(
    graph: Graph,
    targets: list[str],
    execute: Execute,
    store: Store,
    versions: Mapping[str, str],
    *,
    prepare: Prepare = lambda kind: None,
    board: Board | None = None,
    reporting: Reporting = lambda tell: nullcontext(),
    workers: int | None = None,
    observe: Observe = lambda stage, result: None,
    started: Started = lambda stage: None,
    replicas: Replicas = lambda counts: None,
) -> Progress:
    """Make the targets and all they need that the store does not hold.

    Args:
        prepare: is told a stage's kind before its seconds are counted, for what takes a process
            long once and is no stage's own.
        board: where workers write what they do; None has them write nothing.
        reporting: in this context, given what writes on the board, a stage is prepared and made.
        workers: stages at work at one time, at the most; None leaves that to the cluster's size.
        observe: told of every stage that ends.
        started: told of every stage that is handed to Ray, again when it is tried again.
        replicas: told how many actors there are for each kind of stage, now and then.
    """
    with leases.Claim(store, graph.keys()) as claim:
        maker = Maker(execute, store.url, dict(versions), claim.run, prepare, board, reporting)
        begun = _Run(graph, targets, maker, store, workers, observe)
        begun.started, begun.replicas = started, replicas
        return begun.to_the_end()


class _Run:
    def __init__(
        self,
        graph: Graph,
        targets: list[str],
        maker: Maker,
        store: Store,
        workers: int | None,
        observe: Observe,
    ) -> None:
        self.graph = graph
        self.store = store
        self.observe = observe
        self.started: Started = lambda stage: None
        self.replicas: Replicas = lambda counts: None
        self.workers = workers
        self.maker = ray.put(maker)
        self.board = maker.board
        self.pools: dict[str | None, _Pool] = {}
        self.remakes: Counter[str] = Counter()
        self.progress = Progress()
        self.others = leases.Observer(store)
        self.held: dict[str, str] = {}
        self.dead: frozenset[str] = frozenset()
        self.polled = time.monotonic()
        read = {name for stage in graph.values() for name in stage.inputs}
        self.present = store.keys() & (graph.keys() | read)
        ordered = needed(graph, graph, self.present - graph.keys())
        self.places = {key: place for place, key in enumerate(ordered)}
        self.read_by = readers(graph)
        self.waiting = dict.fromkeys(needed(graph, targets, self.present))
        self._sort_waiting()
        self.in_flight: dict[ray.ObjectRef, str] = {}
        self.tasks = 0
        self.bound = max(MIN_IN_FLIGHT, 4 * int(ray.cluster_resources().get("CPU", 1)))

    def _sort_waiting(self) -> None:
        """Find what is ready among the waiting, and how many inputs each of the others lacks."""
        self.ready: dict[str | None, _Queue] = defaultdict(_Queue)
        self.lacking: dict[str, int] = {}
        order = sorted(self.waiting, key=self.places.__getitem__)
        ahead = unlocked(self.graph, order)
        self.urgency = {key: (-ahead[key], self.places[key]) for key in order}
        for key in order:
            self.lacking[key] = len(set(self.graph[key].inputs) - self.present)
            if not self.lacking[key]:
                self._make_ready(key)

    def _make_ready(self, key: str) -> None:
        self.waiting[key] = None
        self.ready[self.graph[key].pool].push(key, self.urgency[key])

    def to_the_end(self) -> Progress:
        try:
            while self.waiting or self.in_flight or self.held:
                self._submit_ready()
                self._release_idle_replicas()
                self._tell_replicas()
                self._wait()
        finally:
            for pool in self.pools.values():
                pool.release()
        return self.progress

    def _wait(self) -> None:
        """Take up what ends next, or look again for what other runs are making."""
        joining = {reference: pool for pool in self.pools.values() for reference in pool.joining}
        assert self.in_flight or joining or self.held, "stages wait for inputs that nobody makes"
        if self.in_flight or joining:
            timeout = POLL_SECONDS if self.held else None
            done, _ = ray.wait([*self.in_flight, *joining], num_returns=1, timeout=timeout)
        else:
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
        """Take up the stages that the run which had them is done with, or died over."""
        for key, run in list(self.held.items()):
            if not self.others.alive(run):
                self.dead |= {run}
            elif leases.holding(self.store, key) == run:
                continue
            del self.held[key]
            self._make_ready(key)

    def _submit_ready(self) -> None:
        # Pools first: where few stages may be at work, their actors would be ended and made again.
        for name, queue in sorted(self.ready.items(), key=lambda pool: pool[0] is None):
            while not self._full() and (name is not None or self.tasks < self.bound):
                key = queue.first(self.waiting)
                if key is None:
                    break
                reference = self._submit(self.graph[key])
                if reference is None:
                    self.pools[name].grow(len(queue))
                    break
                queue.pop()
                del self.waiting[key]
                self.in_flight[reference] = key
                self.tasks += name is None
                self.started(self.graph[key])

    def _full(self) -> bool:
        return self.workers is not None and len(self.in_flight) >= self.workers

    def _submit(self, stage: Stage) -> ray.ObjectRef | None:
        if stage.pool is None:
            task = _remote_make.options(**_options(stage), max_retries=0)
            return task.remote(stage, self.maker, self.dead)
        if stage.pool not in self.pools:
            self.pools[stage.pool] = _Pool(stage, self.workers)
        return self.pools[stage.pool].submit(stage, self.maker, self.dead)

    def _tell_replicas(self) -> None:
        counts: Counter[str] = Counter()
        for pool in self.pools.values():
            counts[pool.first.kind] += len(pool.idle) + len(pool.serving)
        self.replicas(counts)

    def _release_idle_replicas(self) -> None:
        """Free what nothing is ready for, or may be given to it: other stages may be waiting for
        its place."""
        for name, pool in list(self.pools.items()):
            if self._full() or self.ready[name].first(self.waiting) is None:
                pool.shrink()
            if not pool.size:
                del self.pools[name]

    def _admit(self, pool: "_Pool", reference: ray.ObjectRef) -> None:
        """Take up a replica that has started, or learn that it died before."""
        try:
            pool.admit(reference)
        except RayError as error:
            first = self.ready[pool.name].first(self.waiting)
            if first is not None and not self._tried_again(self.graph[first], error):
                del self.waiting[first]
                self._fail(self.graph[first], error, error)

    def _tried_again(self, stage: Stage, error: BaseException) -> bool:
        """Whether a stage that was lost has a try left."""
        if self.progress.repeated[stage.key] >= stage.resources.retries:
            return False
        self.progress.repeated[stage.key] += 1
        reason = str(error).strip().rpartition("\n")[-1]
        logger.warning("%s: lost: %s; it is tried again", stage.label, reason)
        return True

    def _receive(self, reference: ray.ObjectRef) -> None:
        key = self.in_flight.pop(reference)
        stage = self.graph[key]
        pool = None if stage.pool is None else self.pools[stage.pool]
        self.tasks -= pool is None
        if self.board is not None:
            self.board.end(key)
        try:
            result: Manifest | Held = ray.get(reference)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            # What Ray itself raises is the loss of a process or a node.
            lost = isinstance(cause, RayError | WorkerLostError)
            if pool is not None and (lost or lacks_device_memory(cause)):
                pool.drop(reference)
            elif pool is not None:
                pool.free(reference)
            if isinstance(cause, CorruptArtifactError) and self._remake(cause, key):
                return
            if (lost or isinstance(cause, TimeLimitError)) and self._tried_again(stage, cause):
                self._make_ready(key)
                return
            self._fail(stage, error, cause)
            return
        if pool is not None:
            pool.free(reference)
        if isinstance(result, Held):
            self.held[key] = result.run
            return
        self.present.add(key)
        for reader in self.read_by[key]:
            if reader in self.waiting and self.lacking[reader]:
                self.lacking[reader] -= 1
                if not self.lacking[reader]:
                    self._make_ready(reader)
        self.progress.made.add(key)
        self.observe(stage, result)

    def _remake(self, damage: CorruptArtifactError, reader: str) -> bool:
        self.remakes[damage.key] += 1
        if damage.key not in self.graph:  # a copy of what the hub holds
            return False
        if damage.key in self.progress.failed or self.remakes[damage.key] > MAX_REMAKES:
            return False
        self.waiting[reader] = None
        # Another reader may have found the damage first, and a new artifact may be there by now.
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
        except StoreError as unwritable:  # the log tells it
            logger.error("%s: its failure cannot be kept: %s", stage.label, unwritable)
        self.progress.failed[stage.key] = failure
        for key in descendants(self.read_by, stage.key) & self.waiting.keys():
            del self.waiting[key]
            self.progress.blocked[key] = stage.key
        self.observe(stage, failure)


class _Queue:
    """Stages that are ready, the most urgent first; what is no longer waiting is passed over."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, key: str, urgency: tuple[int, int]) -> None:
        heapq.heappush(self._heap, (urgency, key))

    def first(self, waiting: Container[str]) -> str | None:
        while self._heap and self._heap[0][1] not in waiting:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        heapq.heappop(self._heap)


class _Pool:
    """Actors that make the stages of one pool, one at a time each; they join and leave.

    A stage is given to actors that have started only: one that waits for room on the cluster holds
    nothing up. An actor that is lost is replaced, wherever there is room, as long as there is work.
    """

    def __init__(self, first: Stage, workers: int | None) -> None:
        assert first.pool is not None
        self.name = first.pool
        self.first = first
        self.workers = workers
        self.idle: list[Any] = []
        self.serving: dict[ray.ObjectRef, Any] = {}
        self.joining: dict[ray.ObjectRef, Any] = {}

    @property
    def size(self) -> int:
        return len(self.idle) + len(self.serving) + len(self.joining)

    def grow(self, ready: int) -> None:
        """Start actors for so many stages that no actor was there for, within the bounds."""
        resources = self.first.resources
        most = resources.max_replicas or _room_for(self.first)
        wanted = max(resources.min_replicas, min(most, len(self.serving) + ready))
        while self.size < min(wanted, self.workers or wanted):
            actor = _remote_replica.options(**_options(self.first)).remote()
            self.joining[actor.start.remote()] = actor

    def admit(self, reference: ray.ObjectRef) -> None:
        """Count in an actor that has started."""
        actor = self.joining.pop(reference)
        ray.get(reference)
        self.idle.append(actor)

    def submit(
        self, stage: Stage, maker: ray.ObjectRef, dead: frozenset[str]
    ) -> ray.ObjectRef | None:
        """Hand the stage to an idle actor; None if there is none."""
        if not self.idle:
            return None
        actor = self.idle.pop(0)
        reference = actor.make.remote(stage, maker, dead)
        self.serving[reference] = actor
        return reference

    def free(self, reference: ray.ObjectRef) -> None:
        self.idle.append(self.serving.pop(reference))

    def drop(self, reference: ray.ObjectRef) -> None:
        """End an actor whose process is lost, or as good as lost."""
        ray.kill(self.serving.pop(reference))

    def shrink(self) -> None:
        """End what has no work, beyond the minimum while others are at work."""
        while self.joining:
            ray.kill(self.joining.popitem()[1])
        kept = self.first.resources.min_replicas if self.serving else 0
        while self.idle and self.size > kept:
            ray.kill(self.idle.pop())

    def release(self) -> None:
        for actor in (*self.idle, *self.serving.values(), *self.joining.values()):
            ray.kill(actor)


def _room_for(stage: Stage) -> int:
    total = ray.cluster_resources()
    rooms = [int(total.get("CPU", 1)) // stage.resources.cpus]
    if stage.resources.gpus:
        rooms.append(int(total.get("GPU", 0) / stage.resources.gpus))
    return max(1, int(min(rooms) * stage.pool_share))


def _options(stage: Stage) -> dict[str, Any]:
    resources = stage.resources
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    if resources.memory_bytes is not None:
        options["memory"] = resources.memory_bytes
    return options


def _make_artifact(stage: Stage, maker: Maker, dead: frozenset[str]) -> Manifest | Held:
    """Make a stage, unless another run is making it or has made it meanwhile."""
    store = Store(maker.store)
    holder = leases.take(store, stage.key, maker.run, dead)
    if holder is not None:
        return Held(holder)
    try:
        with time_limit(stage.resources.time_limit_seconds):
            return store.manifest(stage.key) or _made(stage, maker, store)
    finally:
        leases.give_back(store, stage.key, maker.run)


def _made(stage: Stage, maker: Maker, store: Store) -> Manifest:
    tell: Tell = _nobody if maker.board is None else maker.board.start(stage.key)
    with maker.reporting(tell):
        maker.prepare(stage.kind)
        started = time.monotonic()
        tell("reading inputs", 0, 0, "")
        artifacts = {key: store.fetch(key) for key in stage.inputs}
        tell("", 0, 0, "")
        with store.attempt(stage.key) as attempt, PeakMemory() as memory:
            report = maker.execute(
                stage.payload, artifacts, attempt.folder, stage.resources.cpus, attempt.partial
            )
            tell("storing", 0, 0, "")
            return attempt.commit(
                kind=stage.kind,
                spec=dict(stage.spec),
                report=report,
                seconds=time.monotonic() - started,
                peak_memory_bytes=memory.peak(),
                versions=maker.versions,
                host=platform.node(),
            )


def _nobody(phase: str, done: float, total: float, unit: str) -> None:
    """Writes nowhere what a stage tells."""


class Replica:
    """An actor that makes one stage after another, and keeps what its process has loaded.

    Its process ends if it is not called soon. Ray passes over a kill that comes while an actor is
    being made: without that the process would be nobody's, and hold its place for good.
    """

    def __init__(self) -> None:
        self._forgotten = threading.Timer(CALL_SECONDS, os._exit, (1,))
        self._forgotten.daemon = True
        self._forgotten.start()

    def start(self) -> None:
        """Answer, once the process is there."""
        self._forgotten.cancel()

    def make(self, stage: Stage, maker: Maker, dead: frozenset[str]) -> Manifest | Held:
        """Make one stage."""
        self._forgotten.cancel()
        return _make_artifact(stage, maker, dead)


_remote_make = ray.remote(_make_artifact)
_remote_replica = ray.remote(Replica)
