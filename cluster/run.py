"""Running a graph of stages on Ray: tasks, actor pools, retries, bounded work in flight."""

import logging
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.graph import Graph, Stage, descendants, needed
from cluster.memory import PeakMemory
from cluster.store import CorruptArtifactError, Failure, Manifest, Partial, Store

logger = logging.getLogger(__name__)

MAX_REMAKES = 3
"""How often one artifact that turns out damaged is made again before the stage counts as failed."""

MIN_IN_FLIGHT = 64
"""Stages handed to Ray at one time, at the least, so that an autoscaler sees work waiting."""

_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


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
) -> Progress:
    """Make the targets and all they need that the store does not hold.

    Args:
        workers: stages at work at one time, at the most; None leaves that to the cluster's size.
        observe: told of every stage that ends.
    """
    return _Run(graph, targets, execute, store, versions, workers, observe).to_the_end()


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
        self.workers = workers
        self.maker = ray.put((execute, store.url, dict(versions)))
        self.pools: dict[str, _Pool] = {}
        self.remakes: Counter[str] = Counter()
        self.progress = Progress()
        self.present = store.keys() & graph.keys()
        self.waiting = dict.fromkeys(needed(graph, targets, self.present))
        self.in_flight: dict[ray.ObjectRef, str] = {}
        self.bound = workers or max(MIN_IN_FLIGHT, 4 * int(ray.cluster_resources().get("CPU", 1)))

    def to_the_end(self) -> Progress:
        while self.waiting or self.in_flight:
            self._submit_ready()
            self._release_idle_pools()
            assert self.in_flight, "stages wait for inputs that nobody makes"
            done, _ = ray.wait(list(self.in_flight), num_returns=1)
            for reference in done:
                self._receive(reference)
        for pool in self.pools.values():
            pool.release()
        return self.progress

    def _submit_ready(self) -> None:
        for key in list(self.waiting):
            if len(self.in_flight) >= self.bound:
                return
            stage = self.graph[key]
            if self.present.issuperset(stage.inputs):
                reference = self._submit(stage)
                if reference is not None:
                    del self.waiting[key]
                    self.in_flight[reference] = key

    def _submit(self, stage: Stage) -> ray.ObjectRef | None:
        if stage.pool is None:
            options = _options(stage)
            retries = stage.resources.retries
            return _remote_make.options(**options, max_retries=retries).remote(stage, self.maker)
        if stage.pool not in self.pools:
            self.pools[stage.pool] = _Pool(stage, self.workers)
        return self.pools[stage.pool].submit(stage, self.maker)

    def _release_idle_pools(self) -> None:
        """Free the nodes of pools that nothing is ready for: others may be waiting for them."""
        for name, pool in list(self.pools.items()):
            ready = any(
                self.graph[key].pool == name and self.present.issuperset(self.graph[key].inputs)
                for key in self.waiting
            )
            if not pool.busy and not ready:
                self.pools.pop(name).release()

    def _receive(self, reference: ray.ObjectRef) -> None:
        key = self.in_flight.pop(reference)
        stage = self.graph[key]
        if stage.pool is not None:
            self.pools[stage.pool].free(reference)
        try:
            manifest: Manifest = ray.get(reference)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, CorruptArtifactError) and self._remake(cause, key):
                return
            self._fail(stage, error, cause)
            return
        self.present.add(key)
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
            self.progress.blocked[key] = stage.key
        self.observe(stage, failure)


class _Pool:
    """Actors that make the stages of one pool, one at a time each."""

    def __init__(self, first: Stage, workers: int | None) -> None:
        count = first.resources.replicas or _room_for(first)
        count = min(count, workers) if workers else count
        retries = first.resources.retries
        self.idle = [
            _remote_replica.options(
                **_options(first), max_restarts=retries, max_task_retries=retries
            ).remote()
            for _ in range(max(1, count))
        ]
        self.serving: dict[ray.ObjectRef, Any] = {}

    @property
    def busy(self) -> bool:
        return bool(self.serving)

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

    def release(self) -> None:
        for actor in (*self.idle, *self.serving.values()):
            ray.kill(actor)


def _room_for(stage: Stage) -> int:
    total = ray.cluster_resources()
    rooms = [int(total.get("CPU", 1)) // stage.resources.cpus]
    if stage.resources.gpus:
        rooms.append(int(total.get("GPU", 0) / stage.resources.gpus))
    return max(1, min(rooms))


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

    def make(self, stage: Stage, maker: tuple[Execute, str, dict[str, str]]) -> Manifest:
        """Make one stage."""
        return _make_artifact(stage, maker)


_remote_make = ray.remote(_make_artifact)
_remote_replica = ray.remote(Replica)
