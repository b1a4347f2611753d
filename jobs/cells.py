"""The cells of a grid, and the specs of each."""

import contextlib
import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from jobs.grid import (
    CorpusCalibration,
    CorpusNames,
    GeneratedCalibration,
    Grid,
    GridCalibration,
    PooledCalibration,
    PrunedGenerator,
    with_name,
)
from pipeline.data.presets import CORPUS_PRESETS
from pipeline.errors import InputError, did_you_mean
from pipeline.mistakes import explained
from pipeline.specs import (
    Allocation,
    Corpus,
    CorpusMixture,
    DescribeSpec,
    DrawSpec,
    DropBy,
    EvaluateSpec,
    EvaluationOptions,
    FilterOptions,
    FilterSpec,
    Fraction,
    GenerateSpec,
    GenerationOptions,
    Model,
    Pattern,
    PerplexitySpec,
    Pruner,
    PruneSpec,
    Reconstruction,
    ReconstructionOptions,
    ScoreSpec,
    Spec,
    Uniform,
    WeightedCorpus,
    WindowsSpec,
    Within,
    bits_of,
    data_taker,
    target_name,
)

NO_CALIBRATION = "none"
"""Name of the calibration of cells that use no data."""


class CellReconstruction(ReconstructionOptions):
    """How a cell's kept weights are fitted."""

    calibration: str | None = None
    """Name of the grid's calibration to fit to, at the cell's seed, nsamples and seqlen; None is
    the cell's own set."""

    @property
    def words(self) -> str:
        """What it is called beside a pruner, with the options that differ from the defaults."""
        options = self.model_dump(exclude_defaults=True)
        return " ".join(["reconstructed", *(f"{name} {value}" for name, value in options.items())])


class Cell(Spec):
    """One point of a grid. Fields that mean nothing to it are None, so that points with the same
    work are equal."""

    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"reconstruction"})

    model: str
    calibration: str = NO_CALIBRATION
    pruner: Annotated[Pruner, BeforeValidator(with_name)] | None = None
    """None is the dense model."""
    allocation: Annotated[Allocation, BeforeValidator(with_name)] | None = None
    reconstruction: CellReconstruction | None = None
    sparsity: Fraction = 0.0
    pattern: str | None = None
    seed: int | None = Field(default=None, ge=0)
    nsamples: int | None = Field(default=None, ge=1)
    seqlen: int | None = Field(default=None, ge=8)
    prefix_tokens: int | None = Field(default=None, ge=0)
    drop_fraction: Fraction | None = None
    drop_by: DropBy | None = None
    within: Within | None = None
    num_samples: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0)

    @property
    def target_name(self) -> str:
        """What each matrix becomes, in words."""
        return target_name(self.sparsity, self.pattern, bits_of(self.pruner))

    @model_validator(mode="before")
    @classmethod
    def _pattern_from_sparsity(cls, fields: Any) -> Any:
        """`sparsity: "2:4"` names a pattern."""
        asked = fields.get("sparsity") if isinstance(fields, dict) else None
        if not isinstance(asked, str):
            return fields
        if asked.endswith("%"):
            remedy = "write a share, as 0.5 for 50 %, or a pattern in quotes, as '2:4'"
            raise InputError("sparsity", asked, remedy)
        with contextlib.suppress(ValueError):
            return {**fields, "sparsity": float(asked)}
        try:
            sparsity = Pattern.parse(asked).sparsity
        except ValueError as error:
            raise InputError("sparsity", asked, str(error)) from error
        return {**fields, "pattern": asked, "sparsity": sparsity}


GENERATED_FIELDS = (
    "prefix_tokens",
    "drop_fraction",
    "drop_by",
    "within",
    "num_samples",
    "temperature",
)
"""Axes that override a calibration's own fields, where it has them: a pool has those of the
filter."""

RULE_FIELDS = ("drop_by", "within")
"""Those that mean nothing where no share is dropped."""


_WITHOUT_PRUNING = {
    "pruner": None,
    "allocation": None,
    "reconstruction": None,
    "sparsity": 0.0,
    "pattern": None,
}
"""Changes that make two cells of one calibration set equal."""


def cell_name(cell: Cell) -> str:
    """Return the cell's name in the results: a hash of its fields."""
    unset = {name for name in cell.left_out_at_default if getattr(cell, name) is None}
    return hashlib.sha256(cell.model_dump_json(exclude=unset).encode()).hexdigest()[:12]


def expand(grid: Grid) -> list[Cell]:
    """Return the grid's cells in the order of its axes, those of dense models first.

    Raises:
        InputError: if a cell is wrong, or there is none.
    """
    for name, calibration in grid.calibrations.items():
        _check_corpora(grid, name, calibration)
    blocks = {"cells": grid.cells}
    for number, further in enumerate(grid.include):
        blocks[f"include.{number}"] = {**grid.cells, **further}
    points = [(where, point) for where, block in blocks.items() for point in _product(where, block)]
    kept = [entry for entry in points if not any(_agrees(entry[1], out) for out in grid.exclude)]
    if not kept:
        raise InputError("exclude", f"all {len(points)} cells", "leaves no cell: exclude less")
    cells = [_normal(grid, _cell(where, point)) for where, point in kept]
    if grid.design is not None and grid.design.seeds == "nested":
        cells = _with_own_seeds(grid, cells)
    _check_exclusions(grid, [point for _, point in points])
    dense = [Cell(model=model) for model in dict.fromkeys(cell.model for cell in cells)]
    return list(dict.fromkeys([*dense, *cells]))


def candidate_names(cells: Collection[Cell]) -> dict[Cell, str]:
    """Return the name of each cell's calibration set: the calibration, and the settings of sets in
    which the cells differ."""
    fields = (*GENERATED_FIELDS, "nsamples", "seqlen")
    varied = [
        field for field in fields if len({getattr(cell, field) for cell in cells} - {None}) > 1
    ]
    names = {}
    for cell in cells:
        settings = {field: getattr(cell, field) for field in varied}
        known = [f"{field} {value}" for field, value in settings.items() if value is not None]
        names[cell] = ", ".join([cell.calibration, *known])
    return names


def evaluate_spec(
    grid: Grid, cell: Cell, sets: dict[Cell, WindowsSpec] | None = None
) -> EvaluateSpec:
    """Return the spec of a cell's last stage, which holds all the others.

    Args:
        sets: calibration sets that cells share. This one's is added: ten thousand cells may have
            a hundred sets.
    """
    pruned = prune_spec(grid, cell, sets)
    measured = grid.evaluate
    known = {**CORPUS_PRESETS, **grid.corpora}
    return EvaluateSpec(
        model=pruned or grid.models[cell.model],
        perplexity=tuple(
            PerplexitySpec(
                **entry.model_dump(exclude={"corpus", "kl"}),
                kl=entry.kl and pruned is not None,
                name=entry.corpus,
                corpus=_get(known, entry.corpus, f"evaluate.perplexity.{number}.corpus"),
            )
            for number, entry in enumerate(measured.all_perplexities())
        ),
        tasks=measured.all_tasks(),
        **{name: getattr(measured, name) for name in EvaluationOptions.model_fields}
        | {"task_folder": measured.folder},
    )


def prune_spec(
    grid: Grid, cell: Cell, sets: dict[Cell, WindowsSpec] | None = None
) -> PruneSpec | None:
    """Return how a cell's model is pruned, None for the dense model. `sets`: see
    `evaluate_spec`."""
    if cell.pruner is None:
        return None
    allocation = cell.allocation or Uniform()
    calibrated = data_taker(cell.pruner, allocation, cell.reconstruction) is not None
    if calibrated and cell.nsamples is not None and grid.window_groups > cell.nsamples:
        remedy = f"a cell has {cell.nsamples} windows (nsamples), fewer than groups: lower it"
        raise InputError("window_groups", grid.window_groups, remedy)
    return PruneSpec(
        model=grid.models[cell.model],
        pruner=cell.pruner,
        sparsity=cell.sparsity,
        pattern=cell.pattern,
        allocation=allocation,
        calibration=_calibration_set(grid, cell, {} if sets is None else sets)
        if calibrated
        else None,
        reconstruction=_reconstruction(grid, cell, {} if sets is None else sets),
        checkpoint=grid.checkpoints
        and not (cell.pruner.updates_weights or cell.reconstruction is not None),
        window_groups=grid.window_groups if calibrated else 1,
    )


def _reconstruction(grid: Grid, cell: Cell, sets: dict[Cell, WindowsSpec]) -> Reconstruction | None:
    asked = cell.reconstruction
    if asked is None:
        return None
    options = asked.model_dump(exclude={"calibration"})
    if asked.calibration is None:
        return Reconstruction(**options)
    pruning = {"pruner": cell.pruner, "sparsity": cell.sparsity, "pattern": cell.pattern}
    other = _normal(grid, _with_calibration(cell, asked.calibration, pruning))
    return Reconstruction(**options, calibration=_calibration_set(grid, other, sets))


def describe_spec(
    grid: Grid, cell: Cell, sets: dict[Cell, WindowsSpec] | None = None
) -> DescribeSpec | None:
    """Return the stage that describes a cell's calibration set, None if there is no set or the grid
    wants no description. `sets`: see `evaluate_spec`."""
    asked = grid.describe
    pruned = prune_spec(grid, cell, sets)
    if asked is None or pruned is None or pruned.calibration is None:
        return None
    reference = None
    if asked.reference is not None:
        reference = WindowsSpec(
            source=_get(grid.corpora, asked.reference, "describe.reference"),
            model=pruned.model,
            nsamples=asked.reference_windows,
            seqlen=pruned.calibration.seqlen,
            packing="concat",
        )
    return DescribeSpec(
        calibration=pruned.calibration,
        model=pruned.model,
        reference=reference,
    )


def _calibration_set(grid: Grid, cell: Cell, sets: dict[Cell, WindowsSpec]) -> WindowsSpec:
    same = cell.model_copy(update=_WITHOUT_PRUNING)
    if same not in sets:
        try:
            sets[same] = _windows_spec(grid, cell)
        except ValidationError as error:
            raise explained(error, ("calibrations", cell.calibration)) from error
    return sets[same]


def _windows_spec(grid: Grid, cell: Cell) -> WindowsSpec:
    model = grid.models[cell.model]
    calibration = grid.calibrations[cell.calibration]
    assert cell.seed is not None
    assert cell.nsamples is not None
    assert cell.seqlen is not None
    source: Any
    if isinstance(calibration, CorpusCalibration):
        source = _corpora(grid, calibration.corpus)
    else:
        samples = _samples(grid, cell, calibration)
        options = FilterOptions(**_options(FilterOptions, calibration, cell))
        scorer = calibration.scorer if options.reads_scores else None
        source = FilterSpec(
            **dict(options),
            scores=ScoreSpec(
                samples=samples,
                model=grid.models[scorer] if scorer else samples.model,
                include_prefix=isinstance(calibration, GeneratedCalibration)
                and calibration.include_prefix,
                hidden_states=options.reads_hidden_states,
            ),
            seed=cell.seed if options.draws else 0,
        )
    return WindowsSpec(
        source=source,
        model=model,
        nsamples=cell.nsamples,
        seqlen=cell.seqlen,
        packing="sample" if isinstance(calibration, PooledCalibration) else calibration.packing,
        seed=cell.seed,
    )


def _samples(
    grid: Grid, cell: Cell, calibration: GeneratedCalibration | PooledCalibration
) -> GenerateSpec | DrawSpec:
    """Return the samples that a calibration's rule chooses from."""
    if isinstance(calibration, PooledCalibration):
        return DrawSpec(
            source=_corpora(grid, calibration.corpus),
            model=grid.models[cell.model],
            num_samples=calibration.pool,
            seqlen=cell.seqlen,
            seed=cell.seed,
            shard_size=calibration.shard_size,
        )
    return GenerateSpec(
        model=_generator(grid, cell, calibration),
        prefixes=_corpora(grid, calibration.prefixes),
        seqlen=cell.seqlen,
        seed=cell.seed if calibration.generation_seed is None else calibration.generation_seed,
        **_options(GenerationOptions, calibration, cell),
    )


def _options(options: type[Spec], calibration: Spec, cell: Cell) -> dict[str, Any]:
    """Return the calibration's values of some options, replaced by the cell's where it has them."""
    names = options.model_fields
    own = {name: getattr(cell, name) for name in GENERATED_FIELDS if name in names}
    return {name: getattr(calibration, name) for name in names} | {
        name: value for name, value in own.items() if value is not None
    }


def _corpora(grid: Grid, names: CorpusNames) -> Corpus | CorpusMixture:
    if isinstance(names, str):
        return grid.corpora[names]
    return CorpusMixture(
        parts={
            name: WeightedCorpus(corpus=grid.corpora[name], weight=weight)
            for name, weight in names.items()
        }
    )


def _generator(grid: Grid, cell: Cell, calibration: GeneratedCalibration) -> Model:
    chosen = calibration.generator
    if not isinstance(chosen, PrunedGenerator):
        return grid.models[chosen or cell.model]
    pruned = prune_spec(grid, _pruned_by(cell, chosen))
    assert pruned is not None
    return pruned


def _pruned_by(cell: Cell, generator: PrunedGenerator) -> Cell:
    """Return the cell that prunes a generator."""
    pruning = {"pruner": generator.pruner, "sparsity": generator.sparsity}
    return _with_calibration(cell, generator.calibration or NO_CALIBRATION, pruning)


def _with_calibration(cell: Cell, calibration: str, pruning: Mapping[str, Any]) -> Cell:
    """Return a cell with another calibration, whose own settings of generated texts it has."""
    return Cell(
        model=cell.model,
        calibration=calibration,
        seed=cell.seed,
        nsamples=cell.nsamples,
        seqlen=cell.seqlen,
        **pruning,
    )


def _product(where: str, block: dict[str, Any]) -> list[dict[str, Any]]:
    axes = {
        field: values if isinstance(values, list) else [values] for field, values in block.items()
    }
    for field, values in axes.items():
        if not values:
            raise InputError(f"{where}.{field}", [], "is an axis without values: give at least one")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _with_own_seeds(grid: Grid, cells: Sequence[Cell]) -> list[Cell]:
    """Give each model seeds of its own: those of the first model, shifted."""
    count = 1 + max((cell.seed for cell in cells if cell.seed is not None), default=0)
    shift = {model: place * count for place, model in enumerate(grid.models)}
    return [
        cell
        if cell.seed is None
        else cell.model_copy(update={"seed": cell.seed + shift[cell.model]})
        for cell in cells
    ]


def _check_exclusions(grid: Grid, points: Sequence[dict[str, Any]]) -> None:
    """Check that each exclusion names fields of cells and matches a cell."""
    for number, pattern in enumerate(grid.exclude):
        for field, value in pattern.items():
            if field not in Cell.model_fields:
                remedy = f"there is no such field; {did_you_mean(field, Cell.model_fields)}"
                raise InputError(f"exclude.{number}.{field}", value, remedy)
        if not any(_agrees(point, pattern) for point in points):
            remedy = "matches no cell, so it leaves nothing out: correct or remove it"
            raise InputError(f"exclude.{number}", pattern, remedy)


def _agrees(point: Mapping[str, Any], pattern: Mapping[str, Any]) -> bool:
    return all(
        point.get(field) in (value if isinstance(value, list) else [value])
        for field, value in pattern.items()
    )


def _cell(where: str, point: dict[str, Any]) -> Cell:
    try:
        return Cell.model_validate(point)
    except ValidationError as error:
        raise explained(error, (where,), point) from error


def _normal(grid: Grid, cell: Cell) -> Cell:
    """Check the names in a cell, and set fields that mean nothing to it to None."""
    _get(grid.models, cell.model, "cells.model")
    if cell.pruner is None:
        return Cell(model=cell.model)
    allocation = cell.allocation or Uniform()
    needs_data = data_taker(cell.pruner, allocation, cell.reconstruction)
    if needs_data is None:
        unused = dict.fromkeys(("seed", "nsamples", "seqlen", *GENERATED_FIELDS))
        kept = {"calibration": NO_CALIBRATION, "allocation": allocation}
        return cell.model_copy(update={**kept, **unused})
    if cell.calibration == NO_CALIBRATION:
        raise InputError(
            "cells.calibration",
            cell.calibration,
            f"{needs_data} needs data: name one of the grid's calibrations",
        )
    calibration = _get(grid.calibrations, cell.calibration, "cells.calibration")
    if cell.reconstruction is not None and cell.reconstruction.calibration is not None:
        fitted_to = cell.reconstruction.calibration
        _get(grid.calibrations, fitted_to, "cells.reconstruction.calibration")
    defaults: dict[str, Any] = {
        "allocation": allocation,
        "seed": 0 if cell.seed is None else cell.seed,
        "nsamples": cell.nsamples or 128,
        "seqlen": cell.seqlen or 2048,
    }
    for role in ("generator", "scorer"):
        chosen = getattr(calibration, role, None)
        where = f"calibrations.{cell.calibration}.{role}"
        if isinstance(chosen, str):
            _get(grid.models, chosen, where)
        elif isinstance(chosen, PrunedGenerator) and chosen.calibration is not None:
            _check_generator(grid, cell, chosen, f"{where}.calibration")
    for field in GENERATED_FIELDS:
        own, chosen = getattr(calibration, field, None), getattr(cell, field)
        defaults[field] = own if own is None or chosen is None else chosen
    if defaults["drop_fraction"] == 0:  # all rules keep everything, so the cells are one
        assert not isinstance(calibration, CorpusCalibration), "has no share to drop"
        _check_share(cell, calibration)
        defaults |= {name: FilterOptions.model_fields[name].default for name in RULE_FIELDS}
    return cell.model_copy(update=defaults)


def _check_share(cell: Cell, calibration: GeneratedCalibration | PooledCalibration) -> None:
    """Check that a rule or a pool from which nothing is dropped is not there by oversight."""
    if cell.drop_fraction is not None or "drop_fraction" in calibration.model_fields_set:
        return
    choosing = {
        name: getattr(cell, name) or getattr(calibration, name)
        for name in RULE_FIELDS
        if getattr(cell, name) is not None or name in calibration.model_fields_set
    }
    if isinstance(calibration, PooledCalibration):
        choosing["pool"] = calibration.pool
    for name, value in choosing.items():
        remedy = "is there to choose, but nothing is dropped: give drop_fraction, such as 0.2"
        raise InputError(f"calibrations.{cell.calibration}.{name}", value, remedy)


def _check_generator(grid: Grid, cell: Cell, generator: PrunedGenerator, where: str) -> None:
    """Check that the calibrations of pruned generators form no circle."""
    seen = [cell.calibration]
    while generator.calibration is not None:
        name = generator.calibration
        if name in seen:
            remedy = f"needs itself, by {' and '.join(seen)}: name a calibration that does not"
            raise InputError(where, name, remedy)
        seen.append(name)
        calibration = _get(grid.calibrations, name, where)
        if not isinstance(calibration, GeneratedCalibration):
            return
        if not isinstance(calibration.generator, PrunedGenerator):
            return
        generator = calibration.generator


def _check_corpora(grid: Grid, name: str, calibration: GridCalibration) -> None:
    field = "prefixes" if isinstance(calibration, GeneratedCalibration) else "corpus"
    for corpus in calibration.corpora:
        _get(grid.corpora, corpus, f"calibrations.{name}.{field}")


def _get(known: Mapping[str, Any], name: str, field: str) -> Any:
    if name not in known:
        raise InputError(field, name, f"is not defined in the grid; {did_you_mean(name, known)}")
    return known[name]
