"""Which tasks there are, in lm-eval and in folders of task files, and whether they can run here."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.evaluation.task_needs import (
    check_needs,
    generates,
    lm_eval_folder,
    member_names,
    task_files,
)
from pipeline.specs import LocalTasks, TestbedTasksSpec
from pipeline.testbed.tasks import TASK_NAMES


def missing_tasks(names: list[str], folder: TestbedTasksSpec | LocalTasks | None) -> list[str]:
    """Return those of the names that neither the task folder nor lm-eval has.

    The files are read first: lm-eval, whose index takes seconds, is asked only for other names
    that some file mentions.

    Raises:
        InputError: if there is no such folder.
    """
    missing = set(names)
    for known in _known_names(folder):
        missing.difference_update(known)
        if not missing:
            return []
    if _mentioned(missing):
        missing.difference_update(lm_eval_tasks().all_tasks)
    return [name for name in names if name in missing]


def _known_names(folder: TestbedTasksSpec | LocalTasks | None) -> Iterator[Iterable[str]]:
    """Yield the names that the files show at a glance, then those that lm-eval finds in the
    folder."""
    if isinstance(folder, TestbedTasksSpec):
        yield TASK_NAMES
    elif isinstance(folder, LocalTasks):
        yield task_files(existing_folder(folder.path))
    yield _lm_eval_files()
    if isinstance(folder, LocalTasks):
        yield task_manager(Path(folder.path)).all_tasks


def _mentioned(names: Iterable[str]) -> bool:
    """Return whether a task file of lm-eval has one of the names anywhere. Most included files have
    no ending."""
    folder = lm_eval_folder()
    paths = () if folder is None else (folder / "tasks").rglob("*")
    sought = [name.encode() for name in names]
    return any(
        name in content
        for path in paths
        if path.suffix in ("", ".yaml", ".yml") and path.is_file()
        for content in (path.read_bytes(),)
        for name in sought
    )


def existing_folder(path: str) -> Path:
    """Return the task folder at a path.

    Raises:
        InputError: if there is none.
    """
    if not Path(path).is_dir():
        raise InputError("task_folder", path, "is no folder: give one with lm-eval task files")
    return Path(path)


def check_tasks(names: list[str], folder: TestbedTasksSpec | LocalTasks | None) -> None:
    """Check that known tasks can run on this machine; see `check_needs`.

    Raises:
        InputError: if one cannot.
    """
    others = _other_names(names, folder)
    if others:
        check_needs(others, _files(folder))


def generative_tasks(names: list[str], folder: TestbedTasksSpec | LocalTasks | None) -> list[str]:
    """Return those of the names whose known tasks let the model write text.

    Raises:
        InputError: if there is no such folder.
    """
    others = _other_names(names, folder)
    return [name for name in others if generates(name, _files(folder))] if others else []


def _other_names(names: list[str], folder: TestbedTasksSpec | LocalTasks | None) -> list[str]:
    """Return the names of tasks that are not the testbed's."""
    testbed = TASK_NAMES if isinstance(folder, TestbedTasksSpec) else ()
    return [name for name in names if name not in testbed]


def _files(folder: TestbedTasksSpec | LocalTasks | None) -> dict[str, list[Path]]:
    own = task_files(existing_folder(folder.path)) if isinstance(folder, LocalTasks) else {}
    return {**_lm_eval_files(), **own}


@functools.cache
def _lm_eval_files() -> dict[str, list[Path]]:
    folder = lm_eval_folder()
    return {} if folder is None else task_files(folder / "tasks")


@functools.cache
def lm_eval_tasks() -> Any:
    """Return lm-eval's own tasks. Indexing them takes seconds, once per process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def task_manager(folder: Path) -> Any:
    """Return the tasks of a folder, with lm-eval's own only if one of its groups needs them."""
    from lm_eval.tasks import TaskManager

    alone = TaskManager(include_path=str(folder), include_defaults=False)
    members = {
        member
        for group in alone.all_groups
        for member in member_names(alone.task_index[group].cfg.get("task", []))
    }
    if members <= set(alone.all_tasks):
        return alone
    return TaskManager(include_path=str(folder))
