"""What tasks need of this machine, read from lm-eval's task files without importing any."""

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from packaging.requirements import Requirement

from pipeline.errors import InputError

_NAME = re.compile(r"""^(?:task|group|tag):[ \t]*["']?([^\s"'#\[{]+)""", re.MULTILINE)

DISTRIBUTIONS = {"antlr4": "antlr4-python3-runtime", "bs4": "beautifulsoup4", "PIL": "pillow"}
"""Modules whose distribution has another name."""


WRITES = "generate_until"
"""The `output_type` of tasks for which the model writes text, and of those that name none."""


class _Function(NamedTuple):
    """`!function module.name` in a task file."""

    module: Path


class _TaskFileLoader(yaml.SafeLoader):
    """Keeps the modules of functions; other tags become None."""

    folder: Path


def _function(loader: _TaskFileLoader, node: yaml.ScalarNode) -> _Function:
    module = str(node.value).rpartition(".")[0].replace(".", "/")
    return _Function(loader.folder / f"{module}.py")


_TaskFileLoader.add_constructor("!function", _function)
_TaskFileLoader.add_multi_constructor("", lambda loader, suffix, node: None)


def task_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of a folder by the tasks, groups and tags that they name at a glance."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        for name in _NAME.findall(path.read_text(encoding="utf-8")):
            files.setdefault(name, []).append(path)
    return files


def member_names(tasks: Any) -> Iterator[str]:
    """Yield the tasks and groups that a group's `task` field names, nested ones included."""
    for entry in tasks if isinstance(tasks, list) else [tasks]:
        match entry:
            case str():
                yield entry
            case {"task": list() as inside}:
                yield from member_names(inside)
            case {"group": str() as name} | {"task": str() as name}:
                yield name


def check_needs(names: Iterable[str], files: dict[str, list[Path]]) -> None:
    """Check that tasks can run here.

    The packages that they import must be installed, they must run no code that a model writes, and
    their data must come from no script. Only files that are known are read.

    Args:
        files: what `task_files` returns.

    Raises:
        InputError: at the first task that cannot run.
    """
    for name in names:
        for path in _leaves(name, files, set()):
            settings = _task_settings(path)
            task = settings.get("task", name)
            called = name if task == name else f"{name}: {task}"
            if settings.get("unsafe_code") is True:
                remedy = "it runs code that the model writes, which calprune does not do: drop it"
                raise InputError("evaluate.tasks", called, remedy)
            if str(settings.get("dataset_path")).endswith(".py"):
                remedy = "its data set is a script, which datasets no longer runs: drop it"
                raise InputError("evaluate.tasks", called, remedy)
            for function in _functions(settings):
                for module in sorted(_imports(function.module, set())):
                    _check_installed(called, module)


def generates(name: str, files: dict[str, list[Path]]) -> bool:
    """Return whether a task, or one of a group or under a tag, lets the model write text.

    Tasks written in Python do not say so in their files.
    """
    for path in _leaves(name, files, set()):
        settings = _task_settings(path)
        written_in_python = not settings or "class" in settings
        if not written_in_python and settings.get("output_type", WRITES) == WRITES:
            return True
    return False


def _leaves(name: str, files: dict[str, list[Path]], seen: set[str]) -> Iterator[Path]:
    """Yield the files of a task, or of all tasks in a group or under a tag."""
    if name in seen:
        return
    seen.add(name)
    for path in files.get(name, []):
        settings = _task_settings(path)
        if "group" not in settings:
            yield path
        elif settings["group"] == name:
            for member in member_names(settings.get("task")):
                yield from _leaves(member, files, seen)


def _task_settings(path: Path) -> dict[str, Any]:
    """Return a task file's settings with those that it includes; none if it does not parse."""

    class Here(_TaskFileLoader):
        folder = path.parent

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Here)
    except (OSError, yaml.YAMLError):  # lm-eval reports it on loading
        return {}
    if not isinstance(content, dict):
        return {}
    included = content.pop("include", None)
    for name in included if isinstance(included, list) else [included] if included else []:
        content = {**_task_settings(path.parent / str(name)), **content}
    return content


def _functions(value: Any) -> Iterator[_Function]:
    match value:
        case _Function():
            yield value
        case dict():
            yield from _functions(list(value.values()))
        case list():
            for item in value:
                yield from _functions(item)


# --------------------------------------------------------------------------------------- packages


def _imports(path: Path, seen: set[Path]) -> set[str]:
    """Return the packages that importing a module needs, directly or through lm-eval's modules."""
    if path in seen or not path.is_file():
        return set()
    seen.add(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for module in _imported(tree.body):
        own = _own_file(module, path)
        if own is not None:
            found |= _imports(own, seen)
        elif module.partition(".")[0] != "lm_eval":
            found.add(module.partition(".")[0])
    return found


def _imported(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the modules that statements import; those that an `except` replaces are optional."""
    for statement in body:
        match statement:
            case ast.Import():
                yield from (alias.name for alias in statement.names)
            case ast.ImportFrom():
                home = "." * statement.level + (statement.module or "")
                yield home
                joint = "" if home.endswith(".") else "."
                yield from (f"{home}{joint}{alias.name}" for alias in statement.names)
            case ast.Try():
                raises = (
                    isinstance(each, ast.Raise) for one in statement.handlers for each in one.body
                )
                if any(raises):
                    yield from _imported(statement.body)


def _own_file(module: str, path: Path) -> Path | None:
    """Return the file of a module of lm-eval, or of one beside the module that imports it."""
    if module.startswith("lm_eval.tasks"):
        home, rest = lm_eval_folder(), module.removeprefix("lm_eval.")
    else:
        rest = module.lstrip(".")
        level = len(module) - len(rest)
        home = path.parents[max(0, level - 1)]
    file = None if home is None else home / f"{rest.replace('.', '/')}.py"
    return file if file is not None and file.is_file() else None


def lm_eval_folder() -> Path | None:
    """Return where lm-eval is installed, without importing it."""
    found = importlib.util.find_spec("lm_eval")
    return None if found is None or found.origin is None else Path(found.origin).parent


def _check_installed(task: str, module: str) -> None:
    if module.startswith(".") or not module or importlib.util.find_spec(module) is not None:
        return
    distribution = DISTRIBUTIONS.get(module, module.replace("_", "-"))
    extra = next(
        (
            str(requirement.marker).rpartition("==")[2].strip(" \"'")
            for requirement in map(Requirement, metadata.requires("lm-eval") or [])
            if requirement.marker is not None
            and "extra" in str(requirement.marker)
            and requirement.name.replace("_", "-") == distribution
        ),
        None,
    )
    what = distribution if extra is None else f'"lm-eval[{extra}]"'
    remedy = f"it needs the package {distribution}: pip install {what}, or drop the task"
    raise InputError("evaluate.tasks", task, remedy)
