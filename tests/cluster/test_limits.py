import errno
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from cluster import run
from cluster.graph import Resources, Stage
from cluster.helpers import Helpers
from cluster.limits import TimeLimitError, time_limit
from cluster.remedies import one_line
from cluster.store import Partial, Store

STUCK = """
import itertools
from cluster import limits
limits.GRACE_SECONDS = 0.5
with limits.time_limit(0.2):
    any(itertools.repeat(0))
"""


def stage(kind: str, payload: str, pool: str | None = None, **resources: Any) -> Stage:
    asked = Resources(**resources)
    return Stage(
        key=kind, kind=kind, label=kind, spec={}, payload=payload, inputs=(), pool=pool,
        resources=asked,
    )  # fmt: skip


def misbehave(
    payload: str,
    artifacts: dict[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    word, _, path = payload.partition(" ")
    with Path(path).open("a") as file:
        file.write("x")
    if word == "hang":
        time.sleep(600)
    if word == "device-memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if word == "memory":
        bytearray(1 << 60)
    return {}


def test_only_a_block_that_takes_too_long_is_ended() -> None:
    with time_limit(30.0), time_limit(None):
        pass
    message = r"longer than its time limit of 0\.1 s"
    with pytest.raises(TimeLimitError, match=message), time_limit(0.1):
        time.sleep(30)
    time.sleep(0.2)  # no timer is left


def test_a_process_that_never_returns_to_the_interpreter_is_ended() -> None:
    stuck = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60
    )
    assert stuck.returncode == 1
    assert "Timeout" in stuck.stderr
    assert "<string>" in stuck.stderr  # where it hung


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("pool", [None, "pool"])
def test_a_stage_that_hangs_is_ended_and_tried_again_and_then_fails(
    tmp_path: Path, pool: str | None
) -> None:
    store = Store(str(tmp_path / "store"))
    tries = tmp_path / "tries"
    hang = stage("prune", f"hang {tries}", pool, time_limit_seconds=0.5, retries=1)
    fine = stage("evaluate", f"fine {tmp_path / 'fine'}", pool, time_limit_seconds=30.0)
    graph = {each.key: each for each in (hang, fine)}
    outcome = run.run_graph(graph, list(graph), misbehave, store, {})
    assert outcome.made == {"evaluate"}
    assert tries.read_text() == "xx"
    assert outcome.failed["prune"].error == (
        "TimeLimitError: took longer than its time limit of 0.5 s; "
        "raise resources.prune.time_limit_seconds if it does need longer"
    )
    assert not list((tmp_path / "store/data/prune").iterdir())
    assert store.names("leases") == set()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("device-memory", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.; the"),
        ("memory", "MemoryError: ; the node's memory was full: set or raise resources.prune.mem"),
    ],
)
def test_lack_of_memory_is_a_failure_with_a_remedy_and_the_pool_goes_on(
    tmp_path: Path, word: str, message: str
) -> None:
    """The stage is not repeated in this run: it would need as much memory again."""
    store = Store(str(tmp_path / "store"))
    tries = tmp_path / "tries"
    graph = {
        "prune": stage("prune", f"{word} {tries}", "pool", max_replicas=1),
        "evaluate": stage("evaluate", f"fine {tmp_path / 'fine'}", "pool", max_replicas=1),
    }
    outcome = run.run_graph(graph, list(graph), misbehave, store, {})
    assert outcome.made == {"evaluate"}
    assert outcome.failed["prune"].error.startswith(message)
    failure = store.failure("prune")
    assert failure is not None
    assert "misbehave" in failure.traceback
    assert tries.read_text() == "x"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (WorkerCrashedError(), "resources.prune.retries"),
        (OutOfMemoryError("Task was killed due to the node running low"), "memory_bytes"),
        (OSError(errno.ENOSPC, "No space left on device"), "free some"),
        (OSError(errno.EROFS, "Read-only file system"), "can be read and written"),
    ],
)
def test_an_error_is_one_line_with_what_to_do(error: Exception, remedy: str) -> None:
    line = one_line(error, stage("prune", ""))
    assert line.startswith(f"{type(error).__name__}: ")
    assert remedy in line
    assert "\n" not in line


def test_an_error_without_a_known_remedy_is_its_first_line() -> None:
    assert (
        one_line(ValueError("no such layer\nmore"), stage("k", "")) == "ValueError: no such layer"
    )
