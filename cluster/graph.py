"""The deduplicated graph of stages that a grid comes down to."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one stage asks of a node, and how it is retried."""

    cpus: int = 1
    """CPU cores, and threads of its tensor library."""
    gpus: float = 0.0
    """GPUs; a fraction shares one."""
    memory_bytes: int | None = None
    """Host memory that is kept free for it."""
    min_replicas: int = 1
    """Actors of a pooled stage that are started at once, and kept while there is work for any."""
    max_replicas: int | None = None
    """Actors of a pooled stage at the most; None takes as many as the cluster has room for."""
    retries: int = 2
    """How often a stage is tried again after its worker or node was lost."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One node of the graph."""

    key: str
    kind: str
    label: str
    """What a person is told that it is."""
    spec: Mapping[str, Any]
    """The spec as plain JSON values, which is recorded with the artifact."""
    payload: str
    """The spec as the executor takes it."""
    inputs: tuple[str, ...]
    """Keys of the stages that it reads."""
    resources: Resources = field(default_factory=Resources)
    pool: str | None = None
    """Stages of one pool run on the same actors, which keep their model loaded. An actor holds all
    its GPUs on one node."""
    pool_share: float = 1.0
    """How much of the cluster's room a pool without a maximum takes."""


Graph = Mapping[str, Stage]


def needed(graph: Graph, targets: Iterable[str], present: Collection[str]) -> list[str]:
    """Keys to make so that the targets are there, each after its inputs."""
    wanted: dict[str, set[str]] = {}
    waiting = [key for key in targets if key not in present]
    while waiting:
        key = waiting.pop()
        if key not in wanted:
            missing = {name for name in graph[key].inputs if name not in present}
            wanted[key] = missing
            waiting.extend(missing)
    order = {key: position for position, key in enumerate(graph)}
    ordered = {key: wanted[key] for key in sorted(wanted, key=order.__getitem__)}
    return list(TopologicalSorter(ordered).static_order())


def descendants(graph: Graph, key: str) -> set[str]:
    """Every stage that cannot be made without this one."""
    readers: dict[str, list[str]] = {}
    for stage in graph.values():
        for name in stage.inputs:
            readers.setdefault(name, []).append(stage.key)
    return _reachable(key, lambda name: readers.get(name, []))


def _reachable(start: str, following: Callable[[str], Iterable[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = set(following(waiting.pop())) - found
        found |= fresh
        waiting.extend(fresh)
    return found
