"""The one list of everything that a grid takes from outside the stage graph.

Hashing for keys, packing for a cluster, copies from the hub, claims of runs and tidying of a store
all use it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from pipeline.evaluation.task_data import task_data_sets
from pipeline.files import fingerprint
from pipeline.hub import HubItem, corpus_item, is_builder, local_files, model_item, on_hub
from pipeline.specs import (
    EvaluateSpec,
    FileCorpus,
    HubCorpus,
    HubModel,
    LocalDatasets,
    LocalModel,
    LocalTasks,
    PruneSpec,
    StageSpec,
    WordList,
)

_Value = TypeVar("_Value")


class Outside(NamedTuple):
    """Files or an item of the hub that something reads and no stage makes."""

    field: str
    """The field that names it, such as `corpora.notes.path`."""

    paths: tuple[str, ...] = ()
    """Paths, globs or URLs of files, which must exist."""

    item: HubItem | None = None
    """The item that is read from the hub."""


def outside(value: object, field: str = "") -> Iterator[Outside]:
    """Yield what a grid, or one stage without those before it, takes from outside.

    Args:
        field: the place of the value in the grid.
    """
    match value:
        case FileCorpus() | LocalModel() | WordList() | LocalTasks() | LocalDatasets():
            yield Outside(f"{field}.path", (value.path,))
        case HubModel():
            yield Outside(f"{field}.name", item=model_item(value))
        case HubCorpus() if on_hub(value):
            yield Outside(f"{field}.path", item=corpus_item(value))
        case HubCorpus():
            name = "data_files" if is_builder(value.path) else "path"
            yield Outside(f"{field}.{name}", local_files(value))
        case BaseModel():
            for name in type(value).model_fields:
                child = getattr(value, name)
                if isinstance(child, PruneSpec):
                    child = child.model  # masks and tokenizer are for this one
                if not isinstance(child, StageSpec):
                    yield from outside(child, _inside(field, name))
        case dict():
            for name, child in value.items():
                yield from outside(child, _inside(field, name))
        case list() | tuple():
            for place, child in enumerate(value):
                yield from outside(child, _inside(field, place))
    if isinstance(value, EvaluateSpec) and value.tasks:
        for name, files in task_data_sets(tuple(task.name for task in value.tasks)):
            if value.datasets is None or not Path(value.datasets.path, name).is_dir():
                item = HubItem("dataset", name, None, files)
                yield Outside(_inside(field, "tasks"), item=item)


def hub_reads(value: object) -> Iterator[HubItem]:
    """Yield what a grid, or one stage without those before it, reads from the hub."""
    return (taken.item for taken in outside(value) if taken.item is not None)


def with_fingerprints(value: _Value, field: str = "") -> _Value:
    """Return the value with a fingerprint of the content of everything that is read from files.

    Raises:
        InputError: if files are missing or unreadable, naming the field.
    """
    match value:
        case BaseModel() if "fingerprint" in type(value).model_fields:
            (taken,) = outside(value, field)
            whole = not isinstance(value, LocalModel)
            found = fingerprint(*taken.paths, field=taken.field, whole_files=whole)
            changed: Any = value.model_copy(update={"fingerprint": found if taken.paths else None})
        case BaseModel():
            parts = {name: getattr(value, name) for name in type(value).model_fields}
            marked = with_fingerprints(parts, field)
            # The others are left alone: a copied field would count as one that the grid sets.
            update = {name: each for name, each in marked.items() if each != parts[name]}
            changed = value.model_copy(update=update)
        case dict():
            changed = {
                name: with_fingerprints(item, _inside(field, name)) for name, item in value.items()
            }
        case tuple():
            changed = tuple(
                with_fingerprints(item, _inside(field, place)) for place, item in enumerate(value)
            )
        case _:
            changed = value
    return changed  # type: ignore[no-any-return]


def _inside(field: str, name: object) -> str:
    return f"{field}.{name}" if field else str(name)
