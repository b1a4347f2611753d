"""What pydantic finds wrong, in a person's words."""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import InputError, did_you_mean

_WANTED = {
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be finite",
    "dict_type": "must be a mapping, with a name and a colon in each line",
    "model_type": "must be a mapping of fields",
    "model_attributes_type": "must be a mapping of fields",
    "missing": "is missing; add it",
    "string_pattern_mismatch": "must begin with a letter or digit and hold no more than letters, "
    "digits, '.', '_' and '-'",
}
"""By pydantic's type of error."""

_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def explained(error: ValidationError, where: Sequence[str], content: Any = None) -> InputError:
    """The first mistake in a line, with how many more there are.

    Args:
        where: the field that was validated.
        content: what was validated. Parts of pydantic's path that it lacks are names of variants,
            which no file has; without it only the path's last part is shown.
    """
    details = error.errors(include_url=False)
    first = details[0]
    loc = first["loc"] if content is not None else first["loc"][-1:]
    path = [*where, *_own_path(loc, content, first["type"] == "missing")]
    value = None if first["type"] == "missing" else first["input"]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        path.append(cause.field)
        value, remedy = cause.value, cause.remedy
    else:
        if first["type"] == "union_tag_invalid":
            path, value = _with_tag(path, first)
        remedy = _remedy(first, path)
    if len(details) > 1:
        remedy += f" (and {len(details) - 1} more)"
    return InputError(".".join(path) or "grid", value, remedy)


def _own_path(loc: Sequence[int | str], content: Any, missing: bool) -> list[str]:
    """The parts of a path that the content has, and a last one that it should have."""
    path = []
    for place, part in enumerate(loc):
        match content:
            case Mapping() if part in content:
                content = content[part]
            case list() | tuple() if isinstance(part, int) and part < len(content):
                content = content[part]
            case _ if content is not None and not (missing and place == len(loc) - 1):
                continue
        path.append(str(part))
    return path


def _with_tag(path: list[str], mistake: ErrorDetails) -> tuple[list[str], object]:
    """Path and value of the name that says which variant is meant. `pruner: wnada` is short for
    `pruner: {name: wnada}`."""
    field = mistake["ctx"]["discriminator"].strip("'")
    return (path if field == "name" else [*path, field]), mistake["ctx"]["tag"]


def _remedy(mistake: ErrorDetails, path: Sequence[str]) -> str:
    kind, value, context = mistake["type"], mistake["input"], mistake.get("ctx", {})
    if value is None and kind != "missing":
        return "is empty: give it a value, or remove the line"
    match kind:
        case "literal_error":
            return f"there is no such value; {_choice(str(value), context['expected'])}"
        case "union_tag_invalid":
            return f"there is no such value; {_choice(context['tag'], context['expected_tags'])}"
        case "union_tag_not_found":
            field = context["discriminator"].strip("'")
            return f"does not say which kind it is: add {field}"
        case "tuple_type" | "list_type":
            how = "put a dash before each" if isinstance(value, Mapping) else f"write [{value}]"
            return f"must be a list{_of(path[-1])}: {how}"
        case "too_short" | "string_too_short":
            least = context["min_length"]
            return "must not be empty" if least == 1 else f"must have at least {least} entries"
        case "string_type" if isinstance(value, date):
            return "must be text, and YAML reads this as a date: put it in quotes"
        case "string_type" if isinstance(value, int | float):
            return "must be text: put it in quotes"
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"must be {words} {context[name]:g}{_as_share(value, context[name])}"
    return _WANTED.get(kind, mistake["msg"].removeprefix("Value error, "))


def _choice(value: str, expected: str) -> str:
    """The nearest of the values that pydantic lists: `'a', 'b' or 'c'`."""
    return did_you_mean(value, expected.replace(" or ", ", ").replace("'", "").split(", "))


def _of(field: str) -> str:
    """`tasks` as ` of tasks`."""
    return f" of {field}" if field.endswith("s") else ""


def _as_share(value: object, bound: float) -> str:
    """What a percentage is as a share."""
    if bound == 1 and isinstance(value, int | float) and 2 <= value <= 100:
        return f"; write {value / 100:g} for {value:g} %"
    return ""
