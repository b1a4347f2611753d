"""In which order the stages of a real grid begin, noted by workers that only take time for them."""

import contextlib
import functools
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.board import WritePosition
from cluster.graph import Stage
from cluster.helpers import Helpers
from cluster.run import run_graph
from cluster.store import Partial, Store
from cluster.watcher import Watcher
from cluster.worker import Aids
from jobs.grid import Grid
from jobs.plan import make_plan

Content = dict[str, Any]


@contextlib.contextmanager
def preparing(kind: str, write: WritePosition, *, notes: Path) -> Iterator[None]:
    """Note when the process turned to its next stage."""
    with (notes / str(os.getpid())).open("a") as file:
        file.write(f"{time.time()} ")
    yield


def executing(
    payload: str,
    artifacts: Mapping[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
    *,
    notes: Path,
) -> dict[str, Any]:
    """Note which stage it is, and take a time of its own for it."""
    with (notes / str(os.getpid())).open("a") as file:
        file.write(f"{payload}\n")
    time.sleep(random.Random(payload).uniform(0.2, 1.0))
    (output / "made").touch()
    return {}


@pytest.mark.usefixtures("local_ray")
def test_nothing_that_others_wait_for_begins_after_what_nobody_waits_for(
    content: Content, load: Callable[[Content], Grid], tmp_path: Path
) -> None:
    content["calibrations"]["own"] |= {"num_samples": 32, "shard_size": 8}
    content["cells"] |= {"seed": 0}
    del content["evaluate"]["tasks"], content["evaluate"]["task_folder"]  # else evaluations wait
    plan = make_plan(load(content))
    graph, notes = plan.graph, tmp_path / "notes"
    notes.mkdir()
    handed: dict[str, float] = {}
    ended: dict[str, float] = {}

    class Timer(Watcher):
        def started(self, stage: Stage) -> None:
            handed[stage.key] = time.time()

        def ended(self, stage: Stage, result: object) -> None:
            ended[stage.key] = time.time()

    outcome = run_graph(
        graph,
        plan.targets,
        functools.partial(executing, notes=notes),
        Store(str(tmp_path / "store")),
        {},
        aids=Aids(functools.partial(preparing, notes=notes)),
        watcher=Timer(),
    )
    assert outcome.failed == {}

    key_of = {stage.payload: key for key, stage in graph.items()}
    began: dict[str, float] = {}
    first: set[str] = set()  # of a process, which was given the stage's place before it was there
    for path in notes.iterdir():
        for number, line in enumerate(path.read_text().splitlines()):
            when, _, payload = line.partition(" ")
            began[key_of[payload]] = float(when)
            first |= {key_of[payload]} if number == 0 else set()
    assert began.keys() == outcome.made
    ready = {key: max((ended[name] for name in graph[key].inputs), default=0.0) for key in began}
    awaited = {name for key in began for name in graph[key].inputs}
    late = [
        (graph[key].label, graph[leaf].label)
        for key in awaited - first
        for leaf in began.keys() - awaited
        if ready[key] < handed[leaf] and began[leaf] < began[key]
    ]
    assert late == []
    contested = [
        key
        for key in awaited
        for leaf in began.keys() - awaited
        if ready[leaf] < began[key] and ready[key] < began[leaf]
    ]
    assert len(contested) > 10  # else nothing was to be decided
