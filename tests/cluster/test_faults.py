"""What is lost, repeated and produced when parts of a real cluster are killed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.store import Store
from tests.soak import stand_in
from tests.soak.nodes import PROJECT, Job, Nodes, finish, nodes, wait_until


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes(2) as started:
        yield started


@pytest.fixture
def job(cluster: Nodes, tmp_path: Path) -> Job:
    return Job(cluster.address, tmp_path / "store", tmp_path / "log", seconds=1.0)


EXPECTED = stand_in.expected_table()


def began(job: Job) -> Counter[str]:
    return Counter(each.key for each in stand_in.executions(job.log))


def workers_of(job: Job) -> set[int]:
    return {each.process for each in stand_in.executions(job.log)}


def unfinished(job: Job, kind: str) -> list[stand_in.AtWork]:
    """Return the executions of a kind that are still at work."""
    keys = Store(str(job.store)).keys()
    return [
        each
        for each in stand_in.executions(job.log)
        if each.key.startswith(kind) and each.key not in keys and psutil.pid_exists(each.process)
    ]


def test_a_lost_node_costs_only_what_was_at_work_there_in_every_phase(
    cluster: Nodes, job: Job
) -> None:
    driver = job.start()
    lost: Counter[str] = Counter()
    for kind in ("generate", "prune", "evaluate"):
        victim = wait_until(lambda kind=kind: unfinished(job, kind))[0]
        node = next(each for each in cluster.workers if cluster.raylet(each) == victim.raylet)
        cluster.kill(node)
        done = Store(str(job.store)).keys()
        there = {each.key for each in stand_in.executions(job.log) if each.raylet == victim.raylet}
        lost.update(there - done)
        cluster.replace(node)
    result = finish(driver)
    repeated = began(job) - Counter(dict.fromkeys(began(job), 1))
    assert result["failed"] == []
    assert repeated == lost  # nothing else is made again
    # the driver also counts stages that the node was given and had not begun
    assert repeated <= Counter(result["repeated"])
    assert stand_in.table(Store(str(job.store))) == EXPECTED


def test_a_killed_worker_a_killed_actor_and_a_spot_notice_cost_one_stage_each(
    cluster: Nodes, job: Job
) -> None:
    driver = job.start()
    lost: Counter[str] = Counter()
    for kind, how in (
        ("pretrain", signal.SIGTERM),
        ("generate", signal.SIGKILL),
        ("windows", signal.SIGKILL),
        ("prune", signal.SIGTERM),
    ):
        victim = wait_until(lambda kind=kind: unfinished(job, kind))[0]
        noticed = time.monotonic()
        os.kill(victim.process, how)
        wait_until(lambda victim=victim: not psutil.pid_exists(victim.process), timeout=30.0)
        if how == signal.SIGTERM:
            assert time.monotonic() - noticed < 30
        lost[victim.key] += 1
    finish(driver)
    assert began(job) - Counter(dict.fromkeys(began(job), 1)) == lost
    assert stand_in.table(Store(str(job.store))) == EXPECTED
    store = Store(str(job.store))
    assert store.names("leases") == store.names("runs") == set()
    for key in lost:  # a notice leaves nothing, a kill leaves what the sweep removes
        attempts = [path for path in store.attempts() if f"/{key}/" in path]
        assert len(attempts) == (1 if key.startswith(("pretrain", "prune")) else 2)


def test_a_killed_driver_costs_only_what_was_at_work(cluster: Nodes, job: Job) -> None:
    first = job.start()
    wait_until(lambda: unfinished(job, "prune"))
    first.kill()
    first.communicate()
    # Its workers end, or finish their stage.
    wait_until(lambda: not any(map(psutil.pid_exists, workers_of(job))))
    done = Store(str(job.store)).keys()
    before = began(job)
    finish(job.start())
    after = began(job) - before
    assert not set(after) & done
    assert set(after) | done == set(stand_in.grid(job.log, 0.0))
    assert stand_in.table(Store(str(job.store))) == EXPECTED


def test_a_lost_head_ends_the_job_and_a_rerun_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # a minute otherwise
    log, store = tmp_path / "log", tmp_path / "store"
    with nodes(1) as lost:
        job = Job(lost.address, store, log, seconds=0.5)
        driver = job.start()
        wait_until(lambda: unfinished(job, "prune"))
        lost.cluster.head_node.kill_gcs_server(check_alive=False)
        driver.communicate(timeout=120)
        assert driver.returncode != 0
    done, before = Store(str(store)).keys(), began(job)
    assert done
    with nodes(1) as fresh:
        finish(Job(fresh.address, store, log, seconds=0.5).start())
    assert not set(began(job) - before) & done
    assert stand_in.table(Store(str(store))) == EXPECTED


def test_a_node_low_on_memory_fails_a_stage_with_a_remedy(tmp_path: Path) -> None:
    """Ray's own monitor kills, as on a full node: its threshold is a millionth of the memory."""
    settings = {
        "RAY_memory_usage_threshold": "0.000001",
        "RAY_memory_monitor_refresh_ms": "100",
    }
    run = subprocess.run(
        [sys.executable, "-c", _LOW_ON_MEMORY, str(tmp_path / "store")],
        env={**os.environ, **settings, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.startswith("OutOfMemoryError: "), run.stdout + run.stderr
    assert "set or raise resources.prune.memory_bytes" in run.stdout


_LOW_ON_MEMORY = """
import sys
from dataclasses import replace
from pathlib import Path
import ray
from cluster.graph import Resources
from cluster.run import run_graph
from cluster.store import Store
from tests.soak import stand_in
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
stage = stand_in.grid(Path(sys.argv[1] + ".log"), 60.0)["prune-0"]
graph = {stage.key: replace(stage, inputs=(), pool=None, resources=Resources(retries=1))}
outcome = run_graph(graph, list(graph), stand_in.execute, Store(sys.argv[1]), {})
print(outcome.failed["prune-0"].error)
"""
