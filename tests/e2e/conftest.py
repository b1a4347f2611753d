"""Whole runs of a small grid from the command line, as a user starts them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.__main__ import main
from tests.once import once

GRID = """
name: tiny
models: {testbed: testbed-tiny}
corpora:
  pretraining: testbed-pretraining
  mismatched: testbed-mismatched
  heldout: {preset: testbed-pretraining, split: evaluation}
calibrations:
  pretraining: {corpus: pretraining}
  self-generated: {prefixes: mismatched, num_samples: 48, shard_size: 16, drop_fraction: 0.2}
cells:
  model: testbed
  calibration: [pretraining, self-generated]
  pruner: [magnitude, sparsegpt]
  sparsity: [0.6, "2:4"]
  seed: 0
  nsamples: 16
  seqlen: 64
evaluate:
  perplexity: [{corpus: heldout, seqlen: 64, max_windows: 32}]
  tasks: [{name: testbed_facts, limit: 40}]
  task_folder: {kind: testbed-tasks}
resources: {score: {replicas: {max: 1}}, prune: {replicas: {max: 1}}}
"""

Finished = subprocess.CompletedProcess[str]


def calprune(*words: str | Path) -> Finished:
    """Run `python -m jobs` to its end."""
    return subprocess.run(command(*words), capture_output=True, text=True, env=environment())


@pytest.fixture
def calprune_inside(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., Finished]:
    """Run `python -m jobs` within this process, as an import costs seconds."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str | Path) -> Finished:
        arguments = ["calprune", *map(str, words)]
        monkeypatch.setattr(sys, "argv", arguments)
        capfd.readouterr()
        caplog.clear()
        with caplog.at_level("INFO"), pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return Finished(arguments, int(ended.value.code or 0), out, caplog.text + err)

    return run


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "jobs", *map(str, words)]


def environment() -> dict[str, str]:
    """As with the environment activated; without what would send a run to the Ray of another test,
    and with the token that a Ray head asks for once there is one on the machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "COLUMNS": "200", "RAY_AUTH_MODE": "token"}


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "tiny.yaml"
    path.write_text(GRID)
    return path


@pytest.fixture(scope="session")
def finished(
    grid: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> tuple[Path, Finished]:
    """A store in which the grid has run, and what the run printed."""

    def make(folder: Path) -> None:
        run = calprune("run", grid, "--store", folder / "store")
        (folder / "run.json").write_text(json.dumps(vars(run), default=str))

    folder = once(tmp_path_factory, worker_id, "finished", make)
    return folder / "store", Finished(**json.loads((folder / "run.json").read_text()))


@pytest.fixture
def begun(finished: tuple[Path, Finished], tmp_path: Path) -> Path:
    """A store in which only the model and the tasks' files have been made, which takes long."""
    return begin(finished[0], tmp_path / "begun")


def begin(finished: Path, store: Path, *kinds: str) -> Path:
    """Copy the model, the tasks' files and artifacts of further kinds into a new store."""
    copied = tuple(f"{kind}-" for kind in ("pretrain", "testbed-tasks", *kinds))
    for manifest in (finished / "manifests").iterdir():
        if manifest.name.startswith(copied):
            data = f"data/{manifest.stem}"
            shutil.copytree(finished / data, store / data)
            (store / "manifests").mkdir(exist_ok=True)
            shutil.copy(manifest, store / "manifests")
    return store


@pytest.fixture
def edited(grid: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """The grid with one piece of text replaced."""

    def edit(old: str, new: str) -> Path:
        text = grid.read_text()
        assert old in text
        path = tmp_path / "edited.yaml"
        path.write_text(text.replace(old, new))
        return path

    return edit


@dataclass(frozen=True)
class Head:
    """A cluster of one node, as `ray start --head` makes it."""

    address: str
    """Of its job server."""
    join: str
    """What further nodes join."""
    folder: Path
    """Where its nodes keep their logs and the jobs' files."""
    log: Path
    """What `ray start` says."""


RAY = Path(sys.executable).with_name("ray")


HEAD_TRIES = 3
"""Another process may take a port between the look for a free one and the head's start."""


@pytest.fixture(scope="session")
def ray_head() -> Iterator[Head]:
    for _ in range(HEAD_TRIES):
        process, head = _start_head()
        try:
            if _takes_jobs_soon(process, head):
                yield head
                return
            log = head.log.read_text()
        finally:
            process.terminate()
            process.wait(timeout=60)
            shutil.rmtree(head.folder, ignore_errors=True)
    pytest.fail(f"the cluster did not start: {log[-2000:]}")


def _start_head() -> tuple[subprocess.Popen[bytes], Head]:
    # Each of its own: where another cluster of the machine has a default one, nothing here starts.
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = {name: str(free_port()) for name in names}
    options = [f"--{name}={port}" for name, port in ports.items()]
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # pytest's own are too long for its sockets
    options += [f"--temp-dir={folder}", "--include-dashboard=true", "--num-cpus=2"]
    head = Head(
        address=f"http://127.0.0.1:{ports['dashboard-port']}",
        join=f"127.0.0.1:{ports['port']}",
        folder=folder,
        log=folder / "start.log",
    )
    with head.log.open("wb") as log:
        # In the foreground, so that its end takes this cluster down and no other of the machine.
        command = [RAY, "start", "--head", "--block", *options]
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    return process, head


def _takes_jobs_soon(process: subprocess.Popen[bytes], head: Head) -> bool:
    deadline = time.monotonic() + 120
    while not _takes_jobs(head.address):  # it answers before there is who runs a job
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"the cluster takes no job: {head.log.read_text()}"
        time.sleep(0.5)
    return True


def _takes_jobs(address: str) -> bool:
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as probe:
        if probe.connect_ex((host, int(port))):  # cheaper than a command that waits in vain
            return False
    words = [RAY, "job", "submit", "--address", address, "--", "true"]
    return subprocess.run(words, env=environment(), capture_output=True).returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
