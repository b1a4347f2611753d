"""The graph of stages that a grid needs, each stage once."""

from collections.abc import Collection, Iterable, Mapping, Sequence
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
    """Host memory that is reserved for it."""
    actors: int = 1
    """Actors that share one stage of a pool; each has these cpus, gpus and memory."""
    min_replicas: int = 1
    """Actors of a pooled stage that start together, and stay as long as any has work."""
    max_replicas: int | None = None
    """The most actors of a pooled stage; None takes as many as the cluster has room for."""
    retries: int = 2
    """How often a stage is tried again after its worker or node was lost or its time ran out."""
    time_limit_seconds: float | None = None
    """How long one try may take; None sets no limit."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One node of the graph."""

    key: str
    kind: str
    label: str
    """The stage's name for people."""
    spec: Mapping[str, Any]
    """The spec as plain JSON values; recorded with the artifact."""
    payload: str
    """The spec as `execute` takes it."""
    inputs: tuple[str, ...]
    """Keys of the stages that it reads."""
    resources: Resources = field(default_factory=Resources)
    seconds: float = 1.0
    """Estimated time on its own resources. Used only to order the work."""
    pool: str | None = None
    """Stages of one pool run on the same actors, which keep their model loaded. All GPUs of an
    actor are on one node."""


Graph = Mapping[str, Stage]


def needed(graph: Graph, targets: Iterable[str], present: Collection[str]) -> list[str]:
    """Return the keys to make so that all targets are present, each after its inputs."""
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


def readers(graph: Graph) -> dict[str, list[str]]:
    """Return for each stage the stages that read it; inputs that are no stages are left out."""
    found: dict[str, list[str]] = {key: [] for key in graph}
    for stage in graph.values():
        for name in dict.fromkeys(stage.inputs):
            if name in found:
                found[name].append(stage.key)
    return found


def descendants(read_by: Mapping[str, Iterable[str]], key: str) -> set[str]:
    """Return every stage that cannot be made without this one.

    Args:
        read_by: the result of `readers`.
    """
    found: set[str] = set()
    waiting = [key]
    while waiting:
        fresh = set(read_by[waiting.pop()]) - found
        found |= fresh
        waiting.extend(fresh)
    return found


def longest_paths(graph: Graph, keys: Sequence[str]) -> dict[str, float]:
    """Return for each of these stages the seconds of the longest path that begins with it.

    Args:
        keys: each after its inputs.
    """
    after = dict.fromkeys(keys, 0.0)
    paths: dict[str, float] = {}
    for key in reversed(keys):
        paths[key] = graph[key].seconds + after[key]
        for name in graph[key].inputs:
            if name in after:
                after[name] = max(after[name], paths[key])
    return paths


def reader_counts(graph: Graph, keys: Sequence[str]) -> dict[str, int]:
    """Return for each of these stages how many of the others read it."""
    counts = dict.fromkeys(keys, 0)
    for key in keys:
        for name in set(graph[key].inputs):
            if name in counts:
                counts[name] += 1
    return counts
