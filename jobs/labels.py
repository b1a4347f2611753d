"""Labels of stages for people: the kind, then what varies in the grid, calibration first, as in
`prune wikipedia wanda 2:4 seed 1`.

The label of a stage that several cells share holds what these cells have in common.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jobs.cells import NO_CALIBRATION, Cell
from jobs.stages import STAGES
from pipeline.specs import (
    Allocation,
    DescribeSpec,
    EvaluateSpec,
    Pruner,
    PruneSpec,
    ShardSpec,
    StageSpec,
    Uniform,
)

SETTINGS = (
    "nsamples",
    "seqlen",
    "prefix_tokens",
    "num_samples",
    "temperature",
    "drop_fraction",
    "drop_by",
    "within",
    "seed",
)
"""Fields of a cell that stand before their value, in this order."""

AS_REFERENCE = "as reference"
"""Windows that calibration sets are compared with."""

TO_FIT_TO = "to fit to"
"""Windows that kept weights are fitted to, where others choose the mask."""

MOST_NAMES = 3
"""The most calibrations that a label names; of more it gives the number."""

Owners = dict[str, set[Any]]
"""Field of a cell to its values in the cells that a stage is made for."""


def labels(
    cells: Mapping[str, Cell],
    descriptions: Mapping[str, str],
    specs: Mapping[str, StageSpec],
    inputs: Mapping[str, tuple[str, ...]],
) -> dict[str, str]:
    """Return the label of every stage by key.

    Args:
        cells: key of each cell's last stage to the cell.
        descriptions: key of each cell's last stage to the key of the stage that describes its
            calibration set.
        specs: every stage, each after its inputs.
        inputs: keys of each stage's inputs.
    """
    own: dict[str, Owners] = {}
    """By key, values of the cells that need the stage for themselves."""
    aside: dict[str, tuple[str, Owners]] = {}
    """By key, the use of a stage that only serves generating or a reference, and its cells'
    values."""
    for key, cell in cells.items():
        for last in (key, descriptions.get(key)):
            if last is not None:
                _add(own.setdefault(last, {}), _fields(cell))
    for key, spec in reversed(list(specs.items())):  # what reads a stage comes before it
        for name in inputs[key]:
            use = _use(spec, specs[name])
            if key in aside:
                _add(aside.setdefault(name, (aside[key][0], {}))[1], aside[key][1])
            if key in own and use == AS_REFERENCE:  # it serves all calibrations
                without = {each: own[key][each] for each in own[key] if each != "calibration"}
                _add(aside.setdefault(name, (use, {}))[1], without)
            elif key in own and use == TO_FIT_TO:
                owners = {**own[key], "calibration": own[key]["fitted_to"]}
                _add(aside.setdefault(name, (use, {}))[1], owners)
            elif key in own and use:
                _add(aside.setdefault(name, (use, {}))[1], own[key])
            elif key in own:
                _add(own.setdefault(name, {}), own[key])
    words = _Words(cells.values(), specs.values())
    return {
        key: words.label(spec, own[key])
        if key in own
        else f"{words.label(spec, aside[key][1])} {aside[key][0]}"
        for key, spec in specs.items()
    }


def _use(reader: StageSpec, read: StageSpec) -> str:
    """Return what a stage is read for, if not for its reader's own cells."""
    if isinstance(reader, ShardSpec) and isinstance(read, PruneSpec):
        return "for generating"
    if isinstance(reader, DescribeSpec) and (
        isinstance(read, DescribeSpec) or reader.reference == read != reader.calibration
    ):
        return AS_REFERENCE
    if isinstance(reader, PruneSpec) and reader.reconstruction is not None:
        return TO_FIT_TO if reader.reconstruction.calibration == read != reader.calibration else ""
    return ""


def _fields(cell: Cell) -> Owners:
    values = {name: getattr(cell, name) for name in ("calibration", "model", *SETTINGS)}
    if cell.reconstruction is not None:
        values["reconstruction"] = cell.reconstruction.words
        values["fitted_to"] = cell.reconstruction.calibration
    return {name: {value} for name, value in values.items() if value not in (None, NO_CALIBRATION)}


def _add(owners: Owners, more: Owners) -> None:
    for name, values in more.items():
        owners.setdefault(name, set()).update(values)


class _Words:
    """The words for a grid's labels, which name only what varies in the grid."""

    def __init__(self, cells: Iterable[Cell], specs: Iterable[StageSpec]) -> None:
        whole: Owners = {}
        parts: dict[str, Owners] = {}
        for cell in cells:
            _add(whole, _fields(cell))
            _add(parts.setdefault(cell.calibration, {}), _fields(cell))
        # A value that differs only between calibrations adds nothing to their names.
        self.varies = {name for name in ("calibration", "model") if len(whole.get(name, ())) > 1}
        self.varies |= {
            name for part in parts.values() for name in SETTINGS if len(part.get(name, ())) > 1
        }
        prunings = [spec for spec in specs if isinstance(spec, PruneSpec)]
        chosen = {spec.pruner for spec in prunings} | {spec.allocation for spec in prunings}
        self.variants = Counter(each.name for each in chosen)
        """Number of different pruners, or allocations, with each name."""

    def label(self, spec: StageSpec, owners: Owners) -> str:
        if isinstance(spec, ShardSpec):
            shard = f"shard {spec.index + 1} of {spec.of.shard_count}"
            return f"{self.label(spec.of, owners)} {shard}"
        return " ".join([spec.kind, *self._words(spec, owners)])

    def _words(self, spec: StageSpec, owners: Owners) -> Iterator[str]:
        fields = STAGES[spec.kind].cell_fields
        named = self.varies.intersection(owners if fields is None else owners.keys() & fields)
        if "calibration" in named:
            names = sorted(owners["calibration"])
            yield "+".join(names) if len(names) <= MOST_NAMES else f"{len(names)} calibrations"
        if "model" in named and len(owners["model"]) == 1:
            yield from owners["model"]
        pruned = spec.model if isinstance(spec, EvaluateSpec) else spec
        if isinstance(pruned, PruneSpec):
            yield self._variant(pruned.pruner)
            yield pruned.target_name
            if pruned.allocation != Uniform():
                yield self._variant(pruned.allocation)
            if pruned.reconstruction is not None:
                yield from sorted(owners["reconstruction"])
        elif isinstance(spec, EvaluateSpec):
            yield "dense"
        for name in SETTINGS:
            if name in named and len(owners[name]) == 1:
                (value,) = owners[name]
                yield f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"

    def _variant(self, chosen: Pruner | Allocation) -> str:
        """Return the name, with the options that differ from the defaults if the name alone is not
        unique in the grid. Bits belong to the target."""
        if self.variants[chosen.name] == 1:
            return chosen.name
        fields = chosen.model_dump(exclude={"name", "bits"}, exclude_defaults=True)
        return " ".join([chosen.name, *(f"{name} {value}" for name, value in fields.items())])
