"""What is made once for all tests that need it: a local Ray, and a model that has learned.

torch, whose import takes seconds, is imported where it is used: many tests do without.
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.experimental import internal_kv

from tests.once import once


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make Ray's token, if there is none, before test processes that find none each make one."""
    there = (Path.home() / ".ray" / "auth_token").is_file()
    if not there and not hasattr(session.config, "workerinput"):
        ray_command = Path(sys.executable).with_name("ray")
        make_token = [ray_command, "get-auth-token", "--generate"]
        subprocess.run(make_token, check=True, capture_output=True)


WHOLE_RUNS = {
    "e2e",
    "soak",
    "test_faults.py",
    "test_hidden_inputs.py",
    "test_how_to.py",
    "test_namespaces.py",
    "test_notebooks.py",
    "test_resume.py",
}
"""Folders and files of tests that start processes of their own: clusters, jobs, kernels. A test of
another file that starts one is marked where it stands."""

STARTS = {"local_ray", "ray_of_its_own", "ray_started", "without_flask", "real_folder"}
"""Fixtures of tests that start Ray or vLLM, or read the real model."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole runs, which `make test-quick` leaves out. Their files come first, and the longest
    before all, so that no process is left with one when the others are done."""
    long = set()
    for item in items:
        if WHOLE_RUNS & set(item.path.parts) or STARTS & set(getattr(item, "fixturenames", ())):
            item.add_marker("whole_run")
            long.add(item.path)
    items.sort(
        key=lambda item: (item.path.parent.name not in ("e2e", "soak"), item.path not in long)
    )


@pytest.fixture(scope="session")
def ray_ends() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture
def local_ray(ray_ends: None) -> None:
    """Share one Ray among the tests; only the first after `ray_of_its_own` waits for its start.

    `Cluster.shutdown` resets Ray's key-value client, also that of a Ray which the process shares.
    """
    if not (ray.is_initialized() and internal_kv._internal_kv_initialized()):
        ray.shutdown()
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)


@pytest.fixture
def ray_of_its_own() -> Iterator[None]:
    """For a test that starts a Ray itself, or needs that there is none."""
    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def without_flask() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Where vLLM starts: it looks at all variables of all loaded modules. Those of Flask, which
    the S3 server of other tests brings, cannot be looked at outside of a request."""

    @contextlib.contextmanager
    def unloaded() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in list(sys.modules):
                if name.partition(".")[0] in {"flask", "flask_cors", "moto", "werkzeug"}:
                    patch.delitem(sys.modules, name)
            yield

    return unloaded


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The pretraining stage's output for the preset `tiny`: `model/` and `training.parquet`."""
    import torch

    from pipeline.testbed import pretrain
    from pipeline.testbed.presets import PRETRAIN_PRESETS

    def make(folder: Path) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more gain nothing at this size, and wait for each other
        pretrain.run(PRETRAIN_PRESETS["tiny"], {}, folder)
        torch.set_num_threads(threads)

    return once(tmp_path_factory, worker_id, "tiny", make)


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A real model, texts and tasks, as `python -m jobs prepare` makes them from the registry."""
    from pipeline.real.prepare import prepare_real_folder

    def make(folder: Path) -> None:
        assert prepare_real_folder(folder)

    return once(tmp_path_factory, worker_id, "real", make)
