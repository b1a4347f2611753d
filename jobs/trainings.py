"""Several trainings of a testbed model under one name of a grid file."""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import InputError


def with_trainings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a grid file's content with models of several `trainings` written out.

    `testbed: {preset: testbed-small, trainings: 8}` stands for `testbed-0` to `testbed-7`, which
    differ in their seed. `model: testbed` under cells, include, exclude and design stands for all.

    Raises:
        InputError: if `trainings` is no whole number from 1 on, or a model has a written-out name.
    """
    models = content.get("models")
    if not isinstance(models, Mapping):
        return dict(content)
    written: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    for name, model in models.items():
        if not isinstance(model, Mapping) or "trainings" not in model:
            written[name] = model
            continue
        for each, training in _trainings(name, model).items():
            if each in models:
                remedy = f"is also a name that models.{name} stands for: rename one"
                raise InputError(f"models.{each}", each, remedy)
            written[each] = training
            groups.setdefault(name, []).append(each)
    rest = {
        field: _in_place(content[field], groups)
        for field in ("cells", "include", "exclude", "design")
        if field in content
    }
    return {**content, "models": written, **rest}


def _trainings(name: str, model: Mapping[str, Any]) -> dict[str, Any]:
    count, first = model["trainings"], model.get("seed", 0)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"models.{name}.trainings", count, "must be a whole number, at least 1")
    if "preset" not in model and model.get("kind") != "pretrain":
        remedy = "only a model that the testbed trains has several trainings: remove it"
        raise InputError(f"models.{name}.trainings", count, remedy)
    shared = {field: value for field, value in model.items() if field != "trainings"}
    return {f"{name}-{place}": {**shared, "seed": first + place} for place in range(count)}


def _in_place(value: Any, groups: Mapping[str, list[str]]) -> Any:
    """Replace the names of groups wherever a field `model` holds them."""
    match value:
        case Mapping():
            return {
                field: _members(item, groups) if field == "model" else _in_place(item, groups)
                for field, item in value.items()
            }
        case list():
            return [_in_place(item, groups) for item in value]
        case _:
            return value


def _members(chosen: Any, groups: Mapping[str, list[str]]) -> Any:
    names = chosen if isinstance(chosen, list) else [chosen]
    if not any(isinstance(name, str) and name in groups for name in names):
        return chosen
    return [
        member
        for name in names
        for member in (groups.get(name, [name]) if isinstance(name, str) else [name])
    ]
