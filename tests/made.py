"""Makes the stages of a plan in the test's own process."""

import time
from collections.abc import Iterable

from cluster.graph import Graph, needed
from cluster.store import Store
from jobs.stages import execute


def make_here(graph: Graph, targets: Iterable[str], store: Store) -> None:
    """Make the targets and what they need, one after another, as a worker does.

    For tests of what stages give together: on a Ray each kind of stage starts a process, which
    takes longer than small stages do.
    """
    for key in needed(graph, targets, store.keys()):
        stage = graph[key]
        artifacts = {name: store.fetch(name) for name in stage.inputs}
        started = time.monotonic()
        with store.attempt(key) as attempt:
            report = execute(stage.payload, artifacts, attempt.folder, 1, attempt.partial)
            attempt.commit(
                kind=stage.kind,
                spec=dict(stage.spec),
                report=report,
                seconds=time.monotonic() - started,
                peak_memory_bytes=None,
                versions={},
                host="here",
            )
