"""Folders of lm-eval task files: which names they hold, and copies that run from anywhere."""

import functools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import InputError
from pipeline.evaluation.task_needs import check_needs, lm_eval_folder, task_files
from pipeline.hub import HubItem, copies_in_use, copy_of
from pipeline.specs import LocalTasks, TestbedTasksSpec
from pipeline.testbed.tasks import TASK_NAMES
from pipeline.text import read_text


def missing_tasks(names: list[str], folder: TestbedTasksSpec | LocalTasks | None) -> list[str]:
    """Those of the names that neither the task folder nor lm-eval has.

    Reads the files first, and imports lm-eval, which takes seconds, only for what is not there.

    Raises:
        InputError: if there is no such folder.
    """
    missing = set(names)
    for known in _known_names(folder):
        missing.difference_update(known)
        if not missing:
            break
    return [name for name in names if name in missing]


def _known_names(folder: TestbedTasksSpec | LocalTasks | None) -> Iterator[Iterable[str]]:
    """First what the files say at a glance, then what lm-eval makes of them."""
    if isinstance(folder, TestbedTasksSpec):
        yield TASK_NAMES
    elif isinstance(folder, LocalTasks):
        yield task_files(existing_folder(folder.path))
    yield _lm_eval_names()
    if isinstance(folder, LocalTasks):
        yield task_manager(Path(folder.path)).all_tasks
    yield lm_eval_tasks().all_tasks


def existing_folder(path: str) -> Path:
    """The task folder at a path.

    Raises:
        InputError: if there is none.
    """
    if not Path(path).is_dir():
        raise InputError("task_folder", path, "is no folder: give one with lm-eval task files")
    return Path(path)


@functools.cache
def lm_eval_tasks() -> Any:
    """lm-eval's own tasks, which take seconds to index, once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def task_manager(folder: Path) -> Any:
    """The tasks of a folder; with lm-eval's own besides only where one of its groups needs them."""
    from lm_eval.tasks import TaskManager

    alone = TaskManager(include_path=str(folder), include_defaults=False)
    members = {
        member
        for group in alone.all_groups
        for member in _members(alone.task_index[group].cfg.get("task", []))
    }
    if members <= set(alone.all_tasks):
        return alone
    return TaskManager(include_path=str(folder))


def _members(tasks: Any) -> Iterator[str]:
    for entry in tasks if isinstance(tasks, list) else [tasks]:
        match entry:
            case str():
                yield entry
            case {"group": _, "task": list() as inside}:
                yield from _members(inside)
            case {"group": str() as name} | {"task": str() as name}:
                yield name


@functools.cache
def task_data_sets(names: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """The data sets that lm-eval's own tasks and groups read, and the files of each that they name;
    none means all. Tasks that are written in Python, and those of a task folder, do not tell."""
    index = lm_eval_tasks().task_index
    found: dict[str, tuple[str, ...]] = {}
    waiting = [name for name in names if name in index]
    seen = set(waiting)
    while waiting:
        entry = index[waiting.pop()]
        settings = entry.cfg or {}
        members = entry.tags if not settings else []
        if "group" in settings:
            members = list(_members(settings.get("task", [])))
        elif isinstance(path := settings.get("dataset_path"), str) and "/" in path:
            kwargs = settings.get("dataset_kwargs") or {}
            files = tuple(_texts(kwargs.get("data_files", [])))
            both = files and found.get(path, files)
            found[path] = tuple(sorted({*found.get(path, ()), *files})) if both else ()
        fresh = [name for name in members if name in index and name not in seen]
        seen.update(fresh)
        waiting += fresh
    return sorted(found.items())


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from _texts(list(value.values()))
        case list() | tuple():
            for item in value:
                yield from _texts(item)


@functools.cache
def _lm_eval_names() -> set[str]:
    return set(_lm_eval_files())


@functools.cache
def _lm_eval_files() -> dict[str, list[Path]]:
    folder = lm_eval_folder()
    return {} if folder is None else task_files(folder / "tasks")


def check_tasks(names: list[str], folder: TestbedTasksSpec | LocalTasks | None) -> None:
    """Check that tasks, which are there, can run on this machine; see `check_needs`.

    Raises:
        InputError: if one cannot.
    """
    own = task_files(existing_folder(folder.path)) if isinstance(folder, LocalTasks) else {}
    known = set(TASK_NAMES) if isinstance(folder, TestbedTasksSpec) else set()
    theirs = [name for name in names if name not in known]
    if theirs:
        check_needs(theirs, {**_lm_eval_files(), **own})


def copy_tasks(folder: Path, target: Path, cache: Path) -> None:
    """Copy a task folder so that its tasks find their data and prepare it in `cache`.

    lm-eval leaves `data_files` to the `datasets` library, which looks for relative ones in the
    working directory. In the copy those that stand beside their YAML file are absolute, so a folder
    can be moved and run from anywhere. Python files are copied too, since their bytecode must stay
    out of the folder; all else is linked.

    Raises:
        InputError: if a YAML file does not parse.
    """
    for path in folder.rglob("*"):
        copy = target / path.relative_to(folder)
        if path.is_dir():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.name.endswith(("yaml", "yml")):
            copy.write_text(_relocated(path, cache), encoding="utf-8")
        elif path.suffix == ".py":
            shutil.copyfile(path, copy)
        else:
            copy.symlink_to(path.resolve())


def _relocated(path: Path, cache: Path) -> str:
    """The YAML text with absolute `data_files`, edited as nodes to keep `!function` tags."""
    content = read_text(str(path), "task_folder")
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError("task_folder", str(path), f"is no YAML: {error}") from error
    moved = False
    for options in _values(node, "dataset_kwargs"):
        for scalar in _scalars(_values(options, "data_files")):
            if _is_beside(path.parent, scalar.value):
                scalar.value = str(path.parent.resolve() / scalar.value)
                moved = True
        if moved:
            options.value.append((_text("cache_dir"), _text(str(cache))))
    serialized: str = yaml.serialize(node)
    return serialized if moved else content


def _is_beside(folder: Path, name: str) -> bool:
    return "://" not in name and not name.startswith("/") and any(folder.glob(name))


def _values(node: yaml.Node | None, wanted: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        return []
    return [value for key, value in node.value if key.value == wanted]


def _scalars(nodes: list[yaml.Node]) -> Iterator[yaml.ScalarNode]:
    for node in nodes:
        match node:
            case yaml.ScalarNode():
                yield node
            case yaml.SequenceNode():
                yield from _scalars(node.value)
            case yaml.MappingNode():
                yield from _scalars([value for _, value in node.value])


def _text(value: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", value, style='"')


def link_data_sets(tasks: Iterable[str], folder: Path) -> bool:
    """Let the copies of tasks' data sets stand in a folder under the names that tasks give them.

    Returns:
        Whether there are any.
    """
    if not copies_in_use():
        return False
    for name, files in task_data_sets(tuple(tasks)):
        copy = copy_of(HubItem("dataset", name, None, files))
        if copy is not None:
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(copy.resolve(), target_is_directory=True)
    return folder.exists()
