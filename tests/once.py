"""What several test processes need is made by the first of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(
    factory: pytest.TempPathFactory, worker_id: str, name: str, make: Callable[[Path], None]
) -> Path:
    """A folder that `make` has filled, the same for all processes of a test run."""
    base = factory.getbasetemp()
    whole_run = base if worker_id == "master" else base.parent  # each has a folder in the run's
    folder = whole_run / name
    with FileLock(whole_run / f"{name}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder
