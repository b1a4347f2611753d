"""The temporary files of a worker, which may be killed before it can remove them."""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import filelock

SCRATCH_VARIABLE = "CALPRUNE_SCRATCH"
"""Environment variable with the folder for temporary files of this process."""


@functools.cache
def own_scratch() -> Path:
    """Make a folder for this process's temporary files, and name it in the environment.

    The folder goes when the process ends. If it is killed (by Ray, for memory, with its node), the
    next process on the node that asks for one removes it: a process holds a lock on its folder, and
    the lock goes with the process. Hidden states and layers can take gigabytes.
    """
    root = Path(tempfile.gettempdir()) / f"calprune-work-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    remove_abandoned(root)
    folder = root / uuid.uuid4().hex[:12]
    lock = filelock.FileLock(f"{folder}.lock")
    lock.acquire()
    folder.mkdir(mode=0o700)
    os.environ[SCRATCH_VARIABLE] = str(folder)
    atexit.register(_remove, folder, lock)
    return folder


def remove_abandoned(root: Path) -> None:
    """Remove the folders in `root` whose processes have ended."""
    for path in root.glob("*.lock"):
        with contextlib.suppress(filelock.Timeout, OSError):
            lock = filelock.FileLock(path)
            lock.acquire(timeout=0)
            _remove(path.with_suffix(""), lock)


def _remove(folder: Path, lock: filelock.BaseFileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
