"""A Ray of several nodes on this machine, drivers that use it, and ways to kill both."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

PROJECT = Path(__file__).parents[2]
CPUS = 2


class Nodes:
    """A head without CPUs, and nodes that make the stages."""

    def __init__(self, count: int) -> None:
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.address: str = self.cluster.address
        self.workers = [self._add() for _ in range(count)]

    def _add(self) -> Any:
        return self.cluster.add_node(num_cpus=CPUS, object_store_memory=100 << 20)

    def raylet(self, node: Any) -> int:
        """Return the process of a node that starts all others on it."""
        process: int = node.all_processes["raylet"][0].process.pid
        return process

    def kill(self, node: Any) -> None:
        """Kill all processes of a node."""
        raylet = psutil.Process(self.raylet(node))
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def replace(self, node: Any) -> None:
        """Add a node in place of one that was killed."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.workers[self.workers.index(node)] = self._add()

    def join(self) -> None:
        """Add a node."""
        self.workers.append(self._add())

    def remove(self, node: Any, *, by_plan: bool) -> None:
        """End a node, with a signal first if it is by plan."""
        self.workers.remove(node)
        if not by_plan:
            self.kill(node)
        self.cluster.remove_node(node, allow_graceful=by_plan)

    def at_work(self, what: str) -> list[int]:
        """Return the processes that make stages: tasks `make_artifact`, actors `Replica`."""
        return [process for node in self.workers for process in self.at_work_on(node, what)]

    def at_work_on(self, node: Any, what: str) -> list[int]:
        """Return those of one node."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.raylet(node)).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if what in " ".join(process.cmdline()[:1]):
                        found.append(process.pid)
        return found


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """Run a head and so many nodes for the duration of the block."""
    made = Nodes(count)
    try:
        yield made
    finally:
        made.cluster.shutdown()


@dataclass(frozen=True)
class Job:
    """Where a stand-in grid runs and what it writes."""

    address: str
    store: Path
    log: Path
    seconds: float

    def start(self) -> subprocess.Popen[str]:
        """Start a driver of the grid."""
        words = ["--address", self.address, "--store", self.store, "--log", self.log]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.soak.drive", *words, "--seconds", str(self.seconds)],
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def finish(driver: subprocess.Popen[str], timeout: float = 180.0) -> dict[str, Any]:
    """Wait for a driver and return what it printed; fail if it failed."""
    output, errors = driver.communicate(timeout=timeout)
    assert driver.returncode == 0, errors
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def harm(nodes: Nodes, driver: subprocess.Popen[str], kind: str, draw: random.Random) -> bool:
    """Kill a victim of a kind; return whether there was one."""
    if kind == "driver":
        driver.kill()
        driver.wait()
        return True
    if kind == "node":
        victim = draw.choice(nodes.workers)
        nodes.kill(victim)
        nodes.replace(victim)
        return True
    victims = nodes.at_work({"worker": "make_artifact", "actor": "Replica"}[kind])
    if not victims:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(draw.choice(victims), signal.SIGKILL)
        return True
    return False


def wait_until(true: Any, timeout: float = 90.0) -> Any:
    """Call a function until its value is true, and return that."""
    deadline = time.monotonic() + timeout
    while not (value := true()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)
    return value
