"""The base of all specs: a frozen, validated value. The hash of a stage's lineage is its key."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from pipeline.errors import InputError, did_you_mean

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share in [0, 1)."""


Mixture = Annotated[dict[str, Annotated[float, Field(gt=0.0, strict=True)]], Field(min_length=1)]
"""Relative weight of each part: positive, with any sum."""


class Spec(BaseModel):
    """A frozen value that refuses unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    left_out_at_default: ClassVar[frozenset[str]] = frozenset()
    """Fields that a lineage leaves out at their default: they came later, and old keys hold."""

    lineage_constants: ClassVar[Mapping[str, Any]] = {}
    """What every lineage holds beside the fields: settings that were fields once. They keep old
    keys valid."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_likely_mistakes(cls, content: Any) -> Any:
        """Refuse unknown fields, naming the nearest, and truth values for a number or text: YAML
        reads `no` as false, and pydantic reads that as 0."""
        for name, value in content.items() if isinstance(content, Mapping) else ():
            field = cls.model_fields.get(name)
            if field is None:
                remedy = f"there is no such field; {did_you_mean(str(name), cls.model_fields)}"
                raise InputError(str(name), value, remedy)
            if isinstance(value, bool) and field.annotation not in (bool, Any):
                remedy = (
                    "this field takes neither true nor false, and YAML reads yes, no, on and off "
                    "as these: put a name in quotes"
                )
                raise InputError(name, value, remedy)
        return content


class StageSpec(Spec):
    """The input of one stage. Equal specs share one artifact."""

    version: ClassVar[int]
    """Raise it when a stage's output changes for the same spec: every later key changes too."""

    kind: str
    """The stage's name, and the discriminator where a field takes several kinds."""

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """The spec and all specs in it as plain JSON values, with the versions of their stages."""
        return {**_plain_fields(self), "version": self.version}

    @cached_property
    def key(self) -> str:
        """`<kind>-<first 24 hexadecimal digits of the SHA-256 of the canonical JSON>`."""
        return f"{self.kind}-{hashlib.sha256(canonical_json(self.lineage)).hexdigest()[:24]}"

    def inputs(self) -> tuple["StageSpec", ...]:
        """The stages whose artifacts this one reads."""
        return tuple(nearest_stages(self))

    def rests_on(self) -> tuple["StageSpec", ...]:
        """The stages whose artifacts a reader of this one's artifact needs too."""
        return ()


def spec_fields(lineage: Any) -> Any:
    """Return the fields of a lineage's specs, without its versions and constants."""
    if isinstance(lineage, list):
        return [spec_fields(item) for item in lineage]
    if not isinstance(lineage, dict):
        return lineage
    fields = {name: spec_fields(value) for name, value in lineage.items()}
    if "kind" in lineage and isinstance(lineage.get("version"), int):
        del fields["version"]
        for name, value in _lineage_constants(lineage["kind"]).items():
            if fields.get(name) == value:  # no spec gives another value
                del fields[name]
        if fields["kind"] == "prune":
            fields.pop("outliers", None)
            fields["pruner"].pop("version", None)
    return fields


def _lineage_constants(kind: str) -> Mapping[str, Any]:
    for spec in _subclasses(StageSpec):
        if spec.model_fields["kind"].default == kind:
            return spec.lineage_constants
    return {}


def _subclasses(spec: type[StageSpec]) -> Iterator[type[StageSpec]]:
    for child in spec.__subclasses__():
        yield child
        yield from _subclasses(child)


def canonical_json(value: object) -> bytes:
    """Return JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _plain(value: object) -> Any:
    match value:
        case StageSpec():
            return value.lineage
        case Spec():
            return _plain_fields(value)
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def _plain_fields(spec: Spec) -> dict[str, Any]:
    fields = {
        name: getattr(spec, name)
        for name, field in type(spec).model_fields.items()
        if name not in spec.left_out_at_default or getattr(spec, name) != field.default
    }
    return {**spec.lineage_constants, **{name: _plain(value) for name, value in fields.items()}}


def nearest_stages(value: object) -> Iterator[StageSpec]:
    """Yield the stages inside a value, but not those inside another stage."""
    if isinstance(value, BaseModel):
        children: list[object] = [getattr(value, name) for name in type(value).model_fields]
    elif isinstance(value, (list, tuple)):
        children = list(value)
    else:
        return
    for child in children:
        if isinstance(child, StageSpec):
            yield child
            yield from child.rests_on()
        else:
            yield from nearest_stages(child)
