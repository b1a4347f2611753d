"""Strict YAML for files that people write: nothing is dropped or converted silently."""

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import InputError
from pipeline.text import read_text

_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_READ_AS = {
    "bool": "true or false",
    "int": "a number",
    "float": "a number",
    "null": "nothing",
    "timestamp": "a date",
}


class _Loader(yaml.SafeLoader):
    """Refuses what YAML 1.1 accepts: duplicate names, names that are not text, integers in base 60
    and 8, and aliases inside their own anchor."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open: set[str] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias: Any = self.peek_event()  # type: ignore[no-untyped-call]
            if alias.anchor in self._open:
                _refuse(alias, f"*{alias.anchor} stands inside what it stands for: write it out")
        return super().compose_node(parent, index)

    def compose_sequence_node(self, anchor: Any) -> Any:
        with_anchor = {anchor} if anchor else set()
        self._open |= with_anchor
        node = super().compose_sequence_node(anchor)
        self._open -= with_anchor
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        with_anchor = {anchor} if anchor else set()
        self._open |= with_anchor
        node = super().compose_mapping_node(anchor)
        self._open -= with_anchor
        lines: dict[str, int] = {}
        for name, _ in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(name, yaml.ScalarNode):
                _refuse(name, "a name must be text, not a list or a mapping")
            if name.tag != "tag:yaml.org,2002:str":
                read_as = _READ_AS.get(name.tag.rpartition(":")[2], "no text")
                _refuse(name, f"YAML reads the name {name.value} as {read_as}: put it in quotes")
            if name.value in lines:
                first = lines[name.value]
                _refuse(name, f"{name.value!r} stands in line {first} already: rename one")
            lines[name.value] = name.start_mark.line + 1
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and _BASE_60.fullmatch(node.value):
            _refuse(node, f"YAML reads {node.value} as a number in base 60: put it in quotes")
        if number and _OCTAL.fullmatch(node.value):
            plain = node.value.lstrip("+-0_")
            _refuse(node, f"YAML reads {node.value} in base 8: write {plain or 0}, or use quotes")
        return node


class _RefusedError(yaml.MarkedYAMLError):
    """YAML that is valid but surely a mistake."""


def _refuse(node: Any, problem: str) -> None:
    raise _RefusedError(problem=problem, problem_mark=node.start_mark)


def read_yaml(field: str, path: Path) -> Any:
    """Read a YAML file.

    Args:
        field: what the file is, for errors.

    Raises:
        InputError: if it cannot be read, with the line of the mistake.
    """
    try:
        return yaml.load(read_text(str(path), field), _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        kind = "" if isinstance(error, _RefusedError) else "is not a YAML file: "
        raise InputError(field, str(path), f"{kind}{line}{error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(field, str(path), f"is not a YAML file: {reason}") from error


def line_number(path: Path, field: str) -> int | None:
    """Return the line of a field, or of the nearest one around it; None if the file has neither.

    Args:
        field: names and indices in lists, joined by dots, outermost first.
    """
    node = yaml.compose(read_text(str(path), field), Loader=yaml.SafeLoader)
    line: int | None = None
    while field:
        children: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        match node:
            case yaml.MappingNode():
                children = {name.value: (name, item) for name, item in node.value}
            case yaml.SequenceNode():
                children = {str(place): (item, item) for place, item in enumerate(node.value)}
        found = [name for name in children if f"{field}.".startswith(f"{name}.")]
        if not found:
            break
        name = max(found, key=len)  # names may hold dots themselves
        marked, node = children[name]
        line = marked.start_mark.line + 1
        field = field[len(name) + 1 :]
    return line
