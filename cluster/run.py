"""Running a graph of stages on Ray: tasks, actor pools, retries."""

import logging
import os
import platform
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from cluster import leases
from cluster.autoscaler import MOST_MORE, Request
from cluster.board import Board, Tell
from cluster.graph import Graph, Stage, descendants, needed, readers
from cluster.limits import TimeLimitError, time_limit
from cluster.memory import PeakMemory
from cluster.remedies import lacks_device_memory, one_line
from cluster.schedule import EndActor, HandOver, Schedule, StartActor, bundle
from cluster.store import CorruptArtifactError, Failure, Manifest, Partial, Store, StoreError

logger = logging.getLogger(__name__)

MAX_REMAKES = 3
"""How often one artifact that turns out damaged is made again before the stage counts as failed."""

LOOK_SECONDS = 5.0
"""How often one looks how large the cluster is."""

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
    inputs = {name for stage in graph.values() for name in stage.inputs}  # copies from the hub too
    with leases.Claim(store, graph.keys() | inputs) as claim:
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
        self.maker = ray.put(maker)
        self.board = maker.board
        self.pools: dict[str, _Pool] = {}
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
        self.in_flight: dict[ray.ObjectRef, str] = {}
        self.schedule = Schedule(graph, workers)
        self.request = Request()
        self.looked = -LOOK_SECONDS
        self._sort_waiting()

    def _sort_waiting(self) -> None:
        """Find what is ready among the waiting, and how many inputs each of the others lacks."""
        self.lacking: dict[str, int] = {}
        to_come = {*self.waiting, *self.in_flight.values(), *self.held}
        self.schedule.order(sorted(to_come, key=self.places.__getitem__))
        for key in self.waiting:
            self.lacking[key] = len(set(self.graph[key].inputs) - self.present)
            if not self.lacking[key]:
                self._make_ready(key)

    def _make_ready(self, key: str) -> None:
        self.waiting[key] = None
        self.schedule.add(key)

    def to_the_end(self) -> Progress:
        try:
            while self.waiting or self.in_flight or self.held:
                self._look()
                self._take_steps()
                self._tell_replicas()
                self._wait()
        finally:
            for pool in self.pools.values():
                pool.release()
            self.request.take_back()
        return self.progress

    def _look(self) -> None:
        """See now and then how large the cluster is, and ask for what it has no room for."""
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        self.schedule.resize([node["Resources"] for node in ray.nodes() if node["Alive"]])
        self.request.update(*self.schedule.demand(MOST_MORE), now)

    def _wait(self) -> None:
        """Take up what ends next, or look again for what other runs are making."""
        joining = {reference: pool for pool in self.pools.values() for reference in pool.joining}
        timeout = POLL_SECONDS if self.held else LOOK_SECONDS
        if self.in_flight or joining:
            done, _ = ray.wait([*self.in_flight, *joining], num_returns=1, timeout=timeout)
        else:  # for another run, or for a node that some stage fits
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

    def _take_steps(self) -> None:
        while (step := self.schedule.step(time.monotonic())) is not None:
            match step:
                case HandOver(stage):
                    del self.waiting[stage.key]
                    self.in_flight[self._submit(stage)] = stage.key
                    self.started(stage)
                case StartActor(stage):
                    assert stage.pool is not None
                    self.pools.setdefault(stage.pool, _Pool(stage)).start()
                case EndActor(pool):
                    self.pools[pool].end()

    def _submit(self, stage: Stage) -> ray.ObjectRef:
        if stage.pool is not None:
            return self.pools[stage.pool].submit(stage, self.maker, self.dead)
        task = _remote_make.options(**_options(stage), max_retries=0)
        return task.remote(stage, self.maker, self.dead)

    def _tell_replicas(self) -> None:
        counts: Counter[str] = Counter()
        for pool in self.pools.values():
            counts[pool.kind] += len(pool.idle) + len(pool.serving)
        self.replicas(counts)

    def _admit(self, pool: "_Pool", reference: ray.ObjectRef) -> None:
        """Take up a replica that has started, or learn that it died before."""
        try:
            pool.admit(reference)
            self.schedule.joined(pool.name, time.monotonic())
        except RayError as error:
            self.schedule.lost(pool.name)
            first = self.schedule.first(pool.name)
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
        now = time.monotonic()
        if self.board is not None:
            self.board.end(key)
        try:
            result: Manifest | Held = ray.get(reference)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            # What Ray itself raises is the loss of a process or a node.
            lost = isinstance(cause, RayError | WorkerLostError)
            unfit = lost or lacks_device_memory(cause)
            if pool is not None:
                pool.take_back(reference, keep=not unfit)
            self.schedule.returned(key, now, actor_lost=unfit)
            if isinstance(cause, CorruptArtifactError) and self._remake(cause, key):
                return
            if (lost or isinstance(cause, TimeLimitError)) and self._tried_again(stage, cause):
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
        self.schedule.discard(stage.key)
        for key in descendants(self.read_by, stage.key) & self.waiting.keys():
            del self.waiting[key]
            self.schedule.discard(key)
            self.progress.blocked[key] = stage.key
        self.observe(stage, failure)


class _Pool:
    """Actors that make the stages of one pool, one at a time each; they join and leave.

    A stage is given to actors that have started only: one that waits for room on the cluster holds
    nothing up. An actor that is lost is replaced, wherever there is room, as long as there is work.
    """

    def __init__(self, first: Stage) -> None:
        assert first.pool is not None
        self.name = first.pool
        self.kind = first.kind
        self.options = _options(first)
        self.idle: list[Any] = []
        self.serving: dict[ray.ObjectRef, Any] = {}
        self.joining: dict[ray.ObjectRef, Any] = {}

    def start(self) -> None:
        """Ask for one more actor."""
        actor = _remote_replica.options(**self.options).remote()
        self.joining[actor.start.remote()] = actor

    def admit(self, reference: ray.ObjectRef) -> None:
        """Count in an actor that has started."""
        actor = self.joining.pop(reference)
        ray.get(reference)
        self.idle.append(actor)

    def submit(self, stage: Stage, maker: ray.ObjectRef, dead: frozenset[str]) -> ray.ObjectRef:
        """Hand the stage to an idle actor."""
        actor = self.idle.pop()  # the last one at work, whose memory is warm
        reference = actor.make.remote(stage, maker, dead)
        self.serving[reference] = actor
        return reference

    def take_back(self, reference: ray.ObjectRef, *, keep: bool = True) -> None:
        """Have an actor idle again, or end it if its process is lost, or as good as lost."""
        actor = self.serving.pop(reference)
        if keep:
            self.idle.append(actor)
        else:
            ray.kill(actor)

    def end(self) -> None:
        """End the actor that is idle longest."""
        ray.kill(self.idle.pop(0))

    def release(self) -> None:
        """End all."""
        for actor in (*self.idle, *self.serving.values(), *self.joining.values()):
            ray.kill(actor)


def _options(stage: Stage) -> dict[str, Any]:
    """What Ray is asked for, in its words for tasks and actors."""
    asked = bundle(stage.resources)
    options = {"num_cpus": asked["CPU"], "num_gpus": asked.get("GPU", 0.0)}
    return options | ({"memory": asked["memory"]} if "memory" in asked else {})


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
