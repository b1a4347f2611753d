"""Where tasks find their data: beside their files, in a folder of data sets, or in hub copies."""

import contextlib
import functools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import InputError
from pipeline.evaluation.task_needs import member_names
from pipeline.evaluation.tasks import lm_eval_tasks
from pipeline.hub import HubItem, copies_in_use, copy_of
from pipeline.specs import LocalDatasets
from pipeline.text import read_text

# -------------------------------------------------------------------------------------- data sets


@functools.cache
def task_data_sets(names: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the data sets of lm-eval's own tasks and groups, and the files that are read of each.

    No files means all. Tasks that are written in Python, and those of a task folder, do not say
    what they read.
    """
    index = lm_eval_tasks().task_index
    found: dict[str, tuple[str, ...]] = {}
    waiting = [name for name in names if name in index]
    seen = set(waiting)
    while waiting:
        entry = index[waiting.pop()]
        settings = entry.cfg or {}
        members = entry.tags if not settings else []
        if "group" in settings:
            members = list(member_names(settings.get("task", [])))
        elif isinstance(path := settings.get("dataset_path"), str) and "/" in path:
            kwargs = settings.get("dataset_kwargs") or {}
            files = tuple(_strings(kwargs.get("data_files", [])))
            both = files and found.get(path, files)
            found[path] = tuple(sorted({*found.get(path, ()), *files})) if both else ()
        fresh = [name for name in members if name in index and name not in seen]
        seen.update(fresh)
        waiting += fresh
    return sorted(found.items())


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from _strings(list(value.values()))
        case list() | tuple():
            for item in value:
                yield from _strings(item)


def data_set_folder(
    tasks: Iterable[str], datasets: LocalDatasets | None, links: Path
) -> Path | None:
    """Return the folder that has the data sets of tasks; None if all come from the hub.

    Args:
        tasks: names of tasks and groups.
        links: a new folder, for links to copies of hub data sets.

    Raises:
        InputError: if `datasets` is no folder.
    """
    if datasets is None:
        return links if _link_copies(tasks, links) else None
    if not Path(datasets.path).is_dir():
        raise InputError("datasets", datasets.path, "is no folder: give one with data sets")
    return Path(datasets.path)


def _link_copies(tasks: Iterable[str], folder: Path) -> bool:
    """Link the copies of tasks' data sets in a folder, under the names that tasks use.

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


@contextlib.contextmanager
def reading_data_sets(folder: Path, prepared: Path) -> Iterator[None]:
    """Work in a folder of data sets: `datasets` looks for a folder before it asks the hub.

    Args:
        prepared: where `datasets` keeps what it makes of them.
    """
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = prepared
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


# ----------------------------------------------------------------------------------- task folders


def copy_tasks(folder: Path, target: Path, cache: Path) -> None:
    """Copy a task folder so that its tasks find their data and prepare it in `cache`.

    lm-eval leaves `data_files` to the `datasets` library, which looks for relative ones in the
    working directory. The copy has absolute paths to those beside their YAML file, so a folder can
    be moved and run from anywhere. Python files are copied too, since their bytecode must stay out
    of the folder; all else is linked.

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
    """Return a task file with absolute `data_files`, edited as nodes to keep `!function` tags."""
    content = read_text(str(path), "task_folder")
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError("task_folder", str(path), f"is no YAML: {error}") from error
    moved = False
    for options in _values_of(node, "dataset_kwargs"):
        for scalar in _scalars(_values_of(options, "data_files")):
            if _is_beside(path.parent, scalar.value):
                scalar.value = str(path.parent.resolve() / scalar.value)
                moved = True
        if moved:
            options.value.append((_string_node("cache_dir"), _string_node(str(cache))))
    serialized: str = yaml.serialize(node)
    return serialized if moved else content


def _is_beside(folder: Path, name: str) -> bool:
    return "://" not in name and not name.startswith("/") and any(folder.glob(name))


def _values_of(node: yaml.Node | None, wanted: str) -> list[yaml.Node]:
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


def _string_node(value: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", value, style='"')
