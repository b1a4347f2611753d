"""Running a graph of stages on Ray: tasks, actor pools, retries, bounded work in flight."""

import logging
import platform
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.graph import Graph, Stage, descendants, needed
from cluster.memory import PeakMemory
from cluster.store import CorruptArtifactError, Failure, Manifest, Partial, Store

logger = logging.getLogger(__name__)

MAX_REMAKES = 3
"""How often one artifact that turns out damaged is made again before the stage counts as failed."""

MIN_IN_FLIGHT = 64
"""Stages handed to Ray at one time, at the least, so that an autoscaler sees work waiting."""

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


Observe = Callable[[Stage, Manifest | Failure], None]
Started = Callable[[Stage], None]
Replicas = Callable[[Mapping[str, int]], None]


@dataclass
class Progress:
    """What became of a run."""

    made: dict[str, Manifest] = field(default_factory=dict)
    failed: dict[str, Failure] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    """Stages that were not tried, and the failed stage that each waits for."""


def run(
    graph: Graph,
    targets: list[str],
    execute: Execute,
    store: Store,
    versions: Mapping[str, str],
    *,
    workers: int | None = None,
    observe: Observe = lambda stage, result: None,
    started: Started = lambda stage: None,
    replicas: Replicas = lambda counts: None,
) -> Progress:
    """Make the targets and all they need that the store does not hold.

    Args:
        workers: stages at work at one time, at the most; None leaves that to the cluster's size.
        observe: told of every stage that ends.
        started: told of every stage that is handed to Ray, again when it is tried again.
        replicas: told how many actors there are for each kind of stage, now and then.
    """
    begun = _Run(graph, targets, execute, store, versions, workers, observe)
    begun.started, begun.replicas = started, replicas
    return begun.to_the_end()


class _Run:
    def __init__(
        self,
        graph: Graph,
        targets: list[str],
        execute: Execute,
        store: Store,
        versions: Mapping[str, str],
        workers: int | None,
        observe: Observe,
    ) -> None:
        self.graph = graph
        self.store = store
        self.observe = observe
        self.started: Started = lambda stage: None
        self.replicas: Replicas = lambda counts: None
        self.workers = workers
        self.maker = ray.put((execute, store.url, dict(versions)))
        self.pools: dict[str | None, _Pool] = {}
        self.remakes: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        self.progress = Progress()
        self.present = store.keys() & graph.keys()
        self.waiting = dict.fromkeys(needed(graph, targets, self.present))
        self._sort_waiting()
        self.in_flight: dict[ray.ObjectRef, str] = {}
        self.bound = workers or max(MIN_IN_FLIGHT, 4 * int(ray.cluster_resources().get("CPU", 1)))

    def _sort_waiting(self) -> None:
        """Find what is ready among the waiting, and how many inputs each of the others lacks."""
        self.ready: dict[str | None, dict[str, None]] = defaultdict(dict)
        self.lacking: dict[str, int] = {}
        self.readers: dict[str, list[str]] = defaultdict(list)
        for key in self.waiting:
            missing = set(self.graph[key].inputs) - self.present
            self.lacking[key] = len(missing)
            for name in missing:
                self.readers[name].append(key)
            if not missing:
                self.ready[self.graph[key].pool][key] = None

    def to_the_end(self) -> Progress:
        while self.waiting or self.in_flight:
            self._submit_ready()
            self._release_idle_replicas()
            self._tell_replicas()
            joining = {
                reference: pool for pool in self.pools.values() for reference in pool.joining
            }
            assert self.in_flight or joining, "stages wait for inputs that nobody makes"
            done, _ = ray.wait([*self.in_flight, *joining], num_returns=1)
            for reference in done:
                if reference in self.in_flight:
                    self._receive(reference)
                else:
                    self._admit(joining[reference], reference)
        for pool in self.pools.values():
            pool.release()
        return self.progress

    def _submit_ready(self) -> None:
        # Pools first: where few stages may be at work, their actors would be ended and made again.
        for name, keys in sorted(self.ready.items(), key=lambda pool: pool[0] is None):
            for key in list(keys)[: self.bound - len(self.in_flight)]:
                reference = self._submit(self.graph[key])
                if reference is None:
                    self.pools[name].grow(len(keys))
                    break
                del keys[key], self.waiting[key]
                self.in_flight[reference] = key
                self.started(self.graph[key])

    def _submit(self, stage: Stage) -> ray.ObjectRef | None:
        if stage.pool is None:
            options = _options(stage)
            retries = stage.resources.retries
            return _remote_make.options(**options, max_retries=retries).remote(stage, self.maker)
        if stage.pool not in self.pools:
            self.pools[stage.pool] = _Pool(stage, self.workers)
        return self.pools[stage.pool].submit(stage, self.maker)

    def _tell_replicas(self) -> None:
        counts: Counter[str] = Counter()
        for pool in self.pools.values():
            counts[pool.first.kind] += len(pool.idle) + len(pool.serving)
        self.replicas(counts)

    def _release_idle_replicas(self) -> None:
        """Free what nothing is ready for, or may be given to it: other stages may be waiting for
        its place."""
        full = len(self.in_flight) >= self.bound
        for name, pool in list(self.pools.items()):
            if full or not self.ready[name]:
                pool.shrink()
            if not pool.size:
                del self.pools[name]

    def _admit(self, pool: "_Pool", reference: ray.ObjectRef) -> None:
        """Take up a replica that has started, or learn that it died before."""
        try:
            pool.admit(reference)
        except RayError as error:
            first = next(iter(self.ready[pool.name]), None)
            if first is not None and not self._tried_again(self.graph[first], error):
                del self.ready[pool.name][first], self.waiting[first]
                self._fail(self.graph[first], error, error)

    def _tried_again(self, stage: Stage, error: BaseException) -> bool:
        """Whether a stage whose replica was lost has a try left."""
        self.losses[stage.key] += 1
        if self.losses[stage.key] > stage.resources.retries:
            return False
        reason = str(error).strip().splitlines()[-1]
        logger.warning("%s: a replica was lost: %s; it is tried again", stage.label, reason)
        return True

    def _receive(self, reference: ray.ObjectRef) -> None:
        key = self.in_flight.pop(reference)
        stage = self.graph[key]
        pool = None if stage.pool is None else self.pools[stage.pool]
        try:
            manifest: Manifest = ray.get(reference)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if pool is not None and isinstance(cause, RayActorError | WorkerLostError):
                pool.drop(reference)
                if self._tried_again(stage, cause):
                    self.waiting[key] = None
                    self.ready[stage.pool] = {key: None, **self.ready[stage.pool]}
                    return
            elif pool is not None:
                pool.free(reference)
            if isinstance(cause, CorruptArtifactError) and self._remake(cause, key):
                return
            self._fail(stage, error, cause)
            return
        if pool is not None:
            pool.free(reference)
        self.present.add(key)
        for reader in self.readers.pop(key, ()):
            self.lacking[reader] -= 1
            if not self.lacking[reader] and reader in self.waiting:
                self.ready[self.graph[reader].pool][reader] = None
        self.progress.made[key] = manifest
        self.observe(stage, manifest)

    def _remake(self, damage: CorruptArtifactError, reader: str) -> bool:
        self.remakes[damage.key] += 1
        if damage.key in self.progress.failed or self.remakes[damage.key] > MAX_REMAKES:
            return False
        again: list[str] = []
        # Another reader may have found the damage first, and a new artifact may be there by now.
        if damage.key in self.present and self.store.damaged([damage.key]):
            logger.warning("%s; it is made again", damage)
            self.store.discard(damage.key)
            self.present.discard(damage.key)
            again = needed(self.graph, [damage.key], self.present)
        self.waiting = dict.fromkeys([*again, reader, *self.waiting])
        self._sort_waiting()
        return True

    def _fail(self, stage: Stage, error: RayError, cause: BaseException) -> None:
        trace = _TERMINAL_COLOUR.sub("", str(error))
        lines = [line for line in str(cause).splitlines() if line.strip()]
        summary = f"{type(cause).__name__}: {lines[0] if lines else ''}"
        failure = Failure(
            key=stage.key, kind=stage.kind, error=summary, traceback=trace, finished=time.time()
        )
        self.store.record_failure(failure)
        self.progress.failed[stage.key] = failure
        for key in descendants(self.graph, stage.key) & self.waiting.keys():
            del self.waiting[key]
            self.ready[self.graph[key].pool].pop(key, None)
            self.progress.blocked[key] = stage.key
        self.observe(stage, failure)


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

    def submit(self, stage: Stage, maker: ray.ObjectRef) -> ray.ObjectRef | None:
        """Hand the stage to an idle actor; None if there is none."""
        if not self.idle:
            return None
        actor = self.idle.pop(0)
        reference = actor.make.remote(stage, maker)
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


def _make_artifact(stage: Stage, maker: tuple[Execute, str, dict[str, str]]) -> Manifest:
    execute, url, versions = maker
    store = Store(url)
    started = time.monotonic()
    artifacts = {key: store.fetch(key) for key in stage.inputs}
    with store.attempt(stage.key) as attempt, PeakMemory() as memory:
        report = execute(
            stage.payload, artifacts, attempt.folder, stage.resources.cpus, attempt.partial
        )
        return attempt.commit(
            kind=stage.kind,
            spec=dict(stage.spec),
            report=report,
            seconds=time.monotonic() - started,
            peak_memory_bytes=memory.peak(),
            versions=versions,
            host=platform.node(),
        )


class Replica:
    """An actor that makes one stage after another, and keeps what its process has loaded."""

    def start(self) -> None:
        """Answer, once the process is there."""

    def make(self, stage: Stage, maker: tuple[Execute, str, dict[str, str]]) -> Manifest:
        """Make one stage."""
        return _make_artifact(stage, maker)


_remote_make = ray.remote(_make_artifact)
_remote_replica = ray.remote(Replica)
