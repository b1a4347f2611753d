"""The deduplicated graph of stages that a grid comes down to."""

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
    """Host memory that is kept free for it."""
    min_replicas: int = 1
    """Actors of a pooled stage that are started at once, and kept while there is work for any."""
    max_replicas: int | None = None
    """Actors of a pooled stage at the most; None takes as many as the cluster has room for."""
    retries: int = 2
    """How often a stage is tried again after its worker or node was lost, or its time was over."""
    time_limit_seconds: float | None = None
    """How long one try may take; None never ends it."""


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
    seconds: float = 1.0
    """An estimate of what it takes on its own resources. Only the order of work rests on it."""
    pool: str | None = None
    """Stages of one pool run on the same actors, which keep their model loaded. An actor holds all
    its GPUs on one node."""


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


def readers(graph: Graph) -> dict[str, list[str]]:
    """Of each stage, the stages that read it. What they read besides stages is not in it."""
    found: dict[str, list[str]] = {key: [] for key in graph}
    for stage in graph.values():
        for name in dict.fromkeys(stage.inputs):
            if name in found:
                found[name].append(stage.key)
    return found


def descendants(read_by: Mapping[str, Iterable[str]], key: str) -> set[str]:
    """Every stage that cannot be made without this one.

    Args:
        read_by: what `readers` returns.
    """
    found: set[str] = set()
    waiting = [key]
    while waiting:
        fresh = set(read_by[waiting.pop()]) - found
        found |= fresh
        waiting.extend(fresh)
    return found


def longest_paths(graph: Graph, keys: Sequence[str]) -> dict[str, float]:
    """Seconds of the longest way from the beginning of each of these stages to the end of the last
    one on it.

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


def unlocked(graph: Graph, keys: Iterable[str]) -> dict[str, int]:
    """How many of these stages each of them leads to, over however many others.

    Args:
        keys: each after its inputs.
    """
    order = list(keys)
    below = dict.fromkeys(order, 0)  # sets of positions, as the bits of an integer
    counts: dict[str, int] = {}
    for position in reversed(range(len(order))):
        key = order[position]
        reached = below.pop(key)
        counts[key] = reached.bit_count()
        for name in set(graph[key].inputs) & below.keys():
            below[name] |= reached | 1 << position
    return counts
