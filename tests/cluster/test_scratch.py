"""A worker's temporary files do not outlast it, however it ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

WORKER = """
import sys
from cluster.scratch import own_scratch
folder = own_scratch()
(folder / "states").write_bytes(b"0" * 1000)
assert own_scratch() == folder
print(folder, flush=True)
sys.stdin.readline()
"""


class Worker:
    """A process with a scratch folder, in a temporary folder of the test's."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())

    def end(self, how: signal.Signals | None) -> None:
        """End by a signal, or of its own accord."""
        if how is None:
            self.process.communicate("\n")
        else:
            self.process.send_signal(how)
            self.process.communicate()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[Worker]]:
    both = [Worker(tmp_path), Worker(tmp_path)]
    yield both
    for worker in both:
        worker.process.kill()
        worker.process.communicate()


def test_a_worker_that_ends_removes_its_files_alone(workers: list[Worker]) -> None:
    first, second = workers
    assert first.folder != second.folder
    first.end(None)
    assert not first.folder.exists()
    assert (second.folder / "states").exists()
    assert [path.name for path in second.folder.parent.iterdir()] == [
        name for name in os.listdir(second.folder.parent) if name.startswith(second.folder.name)
    ]


def test_the_next_worker_removes_what_a_killed_one_left(
    workers: list[Worker], tmp_path: Path
) -> None:
    killed, alive = workers
    killed.end(signal.SIGKILL)
    assert (killed.folder / "states").exists()
    late = Worker(tmp_path)
    assert not killed.folder.exists()
    assert (alive.folder / "states").exists()
    late.end(None)


STAGE = """
import os
import sys
from pathlib import Path
from cluster.graph import Resources, Stage
from cluster.store import Store
from cluster.worker import Maker, make_artifact

def execute(payload, artifacts, output, cpus, partial, helpers):
    scratch = Path(os.environ["CALPRUNE_SCRATCH"])
    assert scratch.is_dir()
    assert scratch in output.parents, output
    return {}

stage = Stage(
    key="a-1", kind="a", label="a", spec={}, payload="", inputs=(), resources=Resources(),
    seconds=1.0,
)
made = make_artifact(stage, Maker(execute, "memory://store", {}, "run"), frozenset())
print(made.key)
"""


def test_a_stage_for_a_remote_store_writes_into_its_workers_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", STAGE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a-1\n"
    assert list(tmp_path.glob("calprune-work-*/*")) == []
