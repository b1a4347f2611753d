"""Makes the stages of a plan in the test's own process."""

import time
from collections.abc import Iterable

from cluster.graph import Graph, Stage, needed
from cluster.remedies import one_line
from cluster.store import Failure, Store
from jobs.stages import execute
from pipeline.errors import InputError


def make_here(
    graph: Graph, targets: Iterable[str], store: Store, *, may_fail: bool = False
) -> None:
    """Make the targets and what they need, one after another, as a worker does.

    For tests of what stages give together: on a Ray each kind of stage starts a process, which
    takes longer than small stages do.

    Args:
        may_fail: record a stage that its inputs do not fit, as a run does, and go on without it.
    """
    lost: set[str] = set()
    for key in needed(graph, targets, store.keys()):
        stage = graph[key]
        if lost.intersection(stage.inputs):
            lost.add(key)
            continue
        try:
            _make(stage, store)
        except InputError as error:
            if not may_fail:
                raise
            lost.add(key)
            fields = {"key": key, "kind": stage.kind, "error": one_line(error, stage)}
            store.record_failure(Failure(**fields, traceback="", finished=time.time()))


def _make(stage: Stage, store: Store) -> None:
    artifacts = {name: store.fetch(name) for name in stage.inputs}
    started = time.monotonic()
    with store.attempt(stage.key) as attempt:
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
