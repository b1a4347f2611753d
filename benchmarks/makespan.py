"""How well a finished run filled its CPUs, from the manifests of its store."""

import os

from benchmarks.targets import Target
from cluster.store import Store

MAKESPAN = 1.1
"""Times the sum of the stages' seconds over the CPUs that a run may take."""


def measure_makespan(url: str) -> Target:
    """What the last run took, on this machine and all of its CPUs, against an even spread.

    Raises:
        ValueError: see `makespan_ratio`.
    """
    ratio = makespan_ratio(url, os.cpu_count() or 1)
    return Target("makespan: times the stages' seconds over CPUs", MAKESPAN, ratio, at_most=True)


def makespan_ratio(url: str, cpus: int) -> float:
    """The time from the first stage's start to the last one's end, over what their seconds would
    take if they were spread evenly over so many CPUs.

    1 is a run without a gap. Below 1 is possible only where more ran at one time.

    Args:
        url: a store that one run on one machine has filled, from empty.

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
