"""Measure how well a finished run filled its CPUs, from the manifests of its store."""

import os

from benchmarks.targets import Target
from cluster.store import Store

_MAKESPAN = 1.1
"""The longest run, in sums of its stages' seconds over its CPUs."""


def measure_makespan(url: str) -> Target:
    """Compare a run on all CPUs of this machine with an even spread of its stages.

    Raises:
        ValueError: see `makespan_ratio`.
    """
    ratio = makespan_ratio(url, os.cpu_count() or 1)
    return Target("makespan: times the stages' seconds over CPUs", _MAKESPAN, ratio, at_most=True)


def makespan_ratio(url: str, cpus: int) -> float:
    """Return a run's seconds over those of an even spread of its stages over the CPUs.

    The run goes from the first stage's start to the last one's end. 1 is a run without a gap. Less
    than 1 means that more than `cpus` stages ran at one time.

    Args:
        url: a store that was empty before the one run that filled it, on one machine.

    Raises:
        ValueError: if the store holds nothing.
    """
    store = Store(url)
    found = [store.manifest(key) for key in sorted(store.keys())]
    manifests = [each for each in found if each is not None]
    if not manifests:
        raise ValueError(f"--makespan: {url!r} holds no artifact: name the store of a finished run")
    start = min(each.finished - each.seconds for each in manifests)
    end = max(each.finished for each in manifests)
    return (end - start) / (sum(each.seconds for each in manifests) / cpus)
