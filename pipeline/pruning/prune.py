"""Prune every linear layer and expert in a model's decoder layers."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.data.windows import read_windows
from pipeline.errors import InputError, NonFiniteError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.layer_files import LayerRecord
from pipeline.models.loading import load_tokenizer
from pipeline.models.matrices import (
    Dense,
    Matrix,
    decoder_layers,
    is_finite,
    kept_dense,
    matrices,
    set_to_zero,
)
from pipeline.models.memory import DEVICE_HIDDEN_BYTES, HOST_HIDDEN_BYTES
from pipeline.models.streaming import each_resident
from pipeline.models.weight_files import unexpected_tensors
from pipeline.progress import phase
from pipeline.pruning.allocation import Allocated, LayerTarget, ModelTarget, allocate
from pipeline.pruning.crew import Crew
from pipeline.pruning.finished_layers import FinishedLayers
from pipeline.pruning.groups import Share
from pipeline.pruning.helper import Helper
from pipeline.pruning.outliers import read_outlier_ratios
from pipeline.pruning.pruners import pruner_for
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.grids import check_rounded
from pipeline.pruning.reconstruction import Fit, Reconstructor
from pipeline.pruning.shared_model import shared_model
from pipeline.pruning.sparsity_check import MatrixSparsity, check_sparsity, count_zeros
from pipeline.pruning.walk import check_windows, layer_sizes, walk
from pipeline.pruning.window_groups import DEFAULT_MEMORY, Memory
from pipeline.specs import (
    Allocation,
    Pattern,
    Pruner,
    PruneSpec,
    Quantizer,
    Uniform,
)
from pipeline.stage import NO_HELPERS, Artifacts, Helpers, Keep


@dataclass
class PruneReport:
    """What was done to each matrix."""

    allocated: Allocated
    """What each decoder layer was pruned to."""
    dense: list[Dense]
    """All other parameters of the model."""
    matrices: list[MatrixSparsity] = field(default_factory=list)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Matrix name to what its pruner recorded."""
    layers: dict[str, int] = field(default_factory=dict)
    """Matrix name to the number of its decoder layer."""
    permutations: dict[str, Tensor] = field(default_factory=dict)
    """Matrix name to the order of its columns `[in_features]` in which the pattern holds, where
    that is not their own."""
    resumed_layers: int = 0
    """Decoder layers that an earlier attempt had finished."""

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned matrices."""
        weights = sum(each.rows * each.columns for each in self.matrices)
        return sum(each.zeros for each in self.matrices) / weights


@dataclass(frozen=True)
class _Decisions:
    """What is decided before the first layer."""

    pruner: MatrixPruner
    options: Mapping[str, Pruner]
    """By the name of a matrix."""
    allocated: Allocated
    layers: int
    """How many decoder layers, from the first on, change."""

    def prune(self, number: int, matrix: Matrix) -> Pruned:
        """Prune a matrix of the decoder layer with that number, in place."""
        if number >= self.layers:  # and without statistics
            return Pruned(torch.zeros_like(matrix.weight, dtype=torch.bool))
        options, target = self.options[matrix.name], self.allocated.layers[number]
        pruned = _prune_matrix(matrix, self.pruner, options, target)
        starved = {"starved_tokens": float(matrix.tokens)} if matrix.starved else {}
        return replace(pruned, weight=None, facts={**pruned.facts, **starved})


def prune_model(
    model: nn.Module,
    windows: Tensor | None,
    pruner: Pruner,
    target: ModelTarget,
    memory: Memory = DEFAULT_MEMORY,
    finished: FinishedLayers | None = None,
    fit: Fit | None = None,
) -> PruneReport:
    """Prune a model in place.

    Args:
        model: a causal language model, in evaluation mode.
        windows: the calibration set, token ids `[nsamples, seqlen]`; None for pruners without data.
        finished: takes every layer that is done, and restores those of an earlier attempt at the
            same pruning.
        fit: what the kept weights of each layer are fitted to; None leaves them to the pruner.

    Raises:
        InputError: if the windows are missing or do not suit the model
            (`pipeline.pruning.walk.check_windows`; it must be in evaluation mode), the pattern does
            not fit a matrix, the pruner's options or the allocation do not suit the model, or the
            model has a form that cannot be pruned.
        ValueError: if the pruner's options do not go with a pattern, or without one.
        NonFiniteError: if a weight or an activation is NaN or infinite.
        SparsityError: if a matrix has another sparsity afterwards than its target.
        RoundingError: if a group of a matrix has more values than its bits allow.
    """
    pattern = target.mean.pattern
    pruner.check_pattern(pattern is not None)
    matrix_pruner = pruner_for(pruner)
    if matrix_pruner.statistics and windows is None:
        raise InputError("windows", None, f"pruner {pruner.name} needs a calibration set")
    if windows is not None:
        check_windows(model, windows)
    dense = _checked_weights(model, pattern)
    decisions = _decided(model, pruner, target)
    report = PruneReport(decisions.allocated, dense)

    def count(number: int, found: list[Matrix]) -> None:
        for matrix in found:
            report.matrices.append(count_zeros(matrix.name, matrix.weight))
            report.layers[matrix.name] = number

    def fitted_in(number: int) -> Reconstructor | None:
        return reconstructor if number < decisions.layers else None

    def visit(number: int, found: list[Matrix]) -> None:
        own = [matrix for matrix in found if matrix.elsewhere is None]  # before waiting for others
        pruned = {matrix.name: decisions.prune(number, matrix) for matrix in own}
        for matrix in found:
            if matrix.elsewhere is not None:
                pruned[matrix.name] = matrix.elsewhere()
            report.facts[matrix.name] = pruned[matrix.name].facts
            permutation = pruned[matrix.name].permutation
            if permutation is not None:
                report.permutations[matrix.name] = permutation.cpu()
        fitted = fitted_in(number)
        if fitted is not None:
            for name, errors in fitted.refine(number).items():
                report.facts[name] = {**report.facts[name], **errors}
        count(number, found)
        if finished is not None:
            masks = {matrix.name: pruned[matrix.name].mask for matrix in found}
            record = LayerRecord(report.facts, report.permutations)
            finished.save(number, found, masks, record)
        if fitted is not None:
            fitted.advance(number)

    def restore(number: int, found: list[Matrix]) -> bool:
        fitted = fitted_in(number)
        if fitted is not None:
            fitted.remember(number, found)
        record = None if finished is None else finished.restore(number, found)
        if record is None:
            return False
        report.facts.update({name: dict(each) for name, each in record.facts.items()})
        report.permutations.update(record.permutations)
        count(number, found)
        report.resumed_layers += 1
        if fitted is not None:
            fitted.advance(number)
        return True

    with ExitStack() as stored:
        reconstructor: Reconstructor | None = None
        if fit is not None:
            reconstructor = stored.enter_context(Reconstructor(model, fit, memory))
        walk(
            model,
            windows,
            matrix_pruner.statistics,
            visit,
            memory,
            restore,
            observed_layers=decisions.layers,
        )
    return report


def _decided(model: nn.Module, pruner: Pruner, target: ModelTarget) -> _Decisions:
    """Decide by the model's form alone, so that all processes of a pruning decide alike."""
    root, layers = decoder_layers(model)
    paths = {  # inside their decoder layers
        matrix.name: matrix.name.removeprefix(f"{root}.{number}.")
        for number, layer in enumerate(layers)
        for matrix in matrices(f"{root}.{number}", layer)
    }
    matrix_pruner = pruner_for(pruner)
    sizes = layer_sizes(model)
    allocated = allocate(target.allocation, target.mean, sizes, target.outlier_ratios)
    rounded = len(layers) - allocated.left_out if isinstance(pruner, Quantizer) else 0
    return _Decisions(
        matrix_pruner,
        matrix_pruner.options_by_matrix(pruner, paths),
        allocated,
        max(rounded, allocated.pruned_layers),
    )


def _checked_weights(model: nn.Module, pattern: Pattern | None) -> list[Dense]:
    """Check all weights before any forward pass; return all parameters that are not pruned."""
    root, layers = decoder_layers(model)
    dense = [
        Dense(name, tuple(parameter.shape), "outside the decoder layers")
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{root}.")
    ]
    with phase("checking the weights"):
        for number, layer in enumerate(each_resident(layers)):
            for matrix in matrices(f"{root}.{number}", layer):
                _check_matrix(matrix, pattern)
            dense += kept_dense(f"{root}.{number}", layer)
    return dense


def _check_matrix(matrix: Matrix, pattern: Pattern | None) -> None:
    if not is_finite(matrix.weight):
        raise NonFiniteError(f"{matrix.name}: the weight has NaN or infinite values")
    columns = matrix.weight.shape[1]
    if pattern is not None and columns % pattern.group:
        remedy = f"{matrix.name} has {columns} inputs, no multiple of {pattern.group}"
        raise InputError("pattern", str(pattern), remedy)


def _prune_matrix(
    matrix: Matrix, pruner: MatrixPruner, options: Pruner, target: LayerTarget
) -> Pruned:
    weight = matrix.weight
    try:
        pruned = pruner.prune(weight.float().contiguous(), matrix.statistics, target, options)
    except ValueError as error:
        raise ValueError(f"{matrix.name}: {error}") from error
    if pruned.weight is not None:
        assert options.updates_weights, f"the spec of {options.name} lacks updates_weights"
        weight.copy_(pruned.weight)
        if not is_finite(weight):
            raise NonFiniteError(f"{matrix.name}: the updated weight is too large for its dtype")
    set_to_zero(weight, pruned.mask)
    check_sparsity(matrix.name, weight, pruned.mask, target, pruner.counted_per, pruned.permutation)
    if isinstance(options, Quantizer) and options.few_values:
        check_rounded(matrix.name, weight, options)
    return pruned


def run(
    spec: PruneSpec,
    artifacts: Artifacts,
    output: Path,
    keep: Keep | None = None,
    helpers: Helpers = NO_HELPERS,
    device_hidden_bytes: int = DEVICE_HIDDEN_BYTES,
    host_hidden_bytes: int = HOST_HIDDEN_BYTES,
) -> dict[str, Any]:
    """Prune, count zeros, and write masks, or the model with its tokenizer.

    Prunings of one model that follow each other in a process load it once.

    Args:
        keep: keeps every decoder layer that is done; layers that it already has are not pruned
            again. None keeps none.
        helpers: processes that share the work; each has called `helper`.
        device_hidden_bytes: as in `pipeline.pruning.window_groups.Memory`.
        host_hidden_bytes: as there.
    """
    scratch = output / "scratch"
    model = shared_model(spec.model, artifacts)
    checkpoint = None
    if not spec.stores_masks:
        tokenizer = load_tokenizer(spec.model, artifacts)
        checkpoint = Checkpoint(model, output / "model")
    finished = FinishedLayers(
        output / "masks" if checkpoint is None else scratch / "layers",
        masks=checkpoint is None,
        keep=keep,
        checkpoint=checkpoint,
    )
    masks = not spec.updates_weights
    crew = Crew(spec.window_groups, helpers, spread=True, masks=masks)
    report = prune_model(
        model,
        _windows(spec, artifacts),
        spec.pruner,
        _target(spec, artifacts),
        memory=Memory(
            device_hidden_bytes=device_hidden_bytes, host_hidden_bytes=host_hidden_bytes, crew=crew
        ),
        finished=finished,
        fit=_fit(spec, artifacts),
    )
    if checkpoint is not None:
        with phase("writing the model"):
            checkpoint.finish()
        tokenizer.save_pretrained(output / "model")
        if report.permutations:
            save_file(report.permutations, output / "permutations.safetensors")
    shutil.rmtree(scratch, ignore_errors=True)
    pq.write_table(_table(report), output / "sparsity.parquet")
    pq.write_table(_dense_table(report.dense), output / "dense.parquet")
    return {
        "sparsity": report.sparsity,
        "matrices": len(report.matrices),
        **unexpected_tensors(model),
        "resumed_layers": report.resumed_layers,
        **_allocation_summary(spec.allocation, report.allocated),
        **_summary(report.facts),
    }


def helper(
    spec: PruneSpec,
    artifacts: Artifacts,
    member: int,
    members: int,
    device_hidden_bytes: int = DEVICE_HIDDEN_BYTES,
    host_hidden_bytes: int = HOST_HIDDEN_BYTES,
) -> Helper:
    """Return a helper's part in a pruning; the arguments are those of `run`.

    Args:
        member: its number among all processes, from 1: the first one leads.
        members: how many there are.
    """
    model = shared_model(spec.model, artifacts)
    windows = _windows(spec, artifacts)
    assert windows is not None, "a pruning without data has no helpers"
    decisions = _decided(model, spec.pruner, _target(spec, artifacts))
    return Helper(
        model,
        windows,
        decisions.pruner.statistics,
        Share(spec.window_groups, member, members),
        decisions.prune,
        masks=not spec.updates_weights,
        memory=Memory(device_hidden_bytes=device_hidden_bytes, host_hidden_bytes=host_hidden_bytes),
    )


def _windows(spec: PruneSpec, artifacts: Artifacts) -> Tensor | None:
    if spec.calibration is None or not spec.pruner.calibrated:
        return None
    return read_windows(artifacts[spec.calibration.key])


def _fit(spec: PruneSpec, artifacts: Artifacts) -> Fit | None:
    if spec.reconstruction is None:
        return None
    own = spec.reconstruction.calibration or spec.calibration
    assert own is not None, "the spec says that reconstruction needs a calibration set"
    return Fit(spec.reconstruction, read_windows(artifacts[own.key]))


def _target(spec: PruneSpec, artifacts: Artifacts) -> ModelTarget:
    outliers = spec.outliers
    ratios = None if outliers is None else read_outlier_ratios(artifacts[outliers.key])
    return ModelTarget(LayerTarget.parse(spec.sparsity, spec.pattern), spec.allocation, ratios)


def _table(report: PruneReport) -> pa.Table:
    matrices = report.matrices
    layers = [report.layers[each.matrix] for each in matrices]
    targets = [report.allocated.layers[layer] for layer in layers]
    columns: Mapping[str, list[Any]] = {
        "matrix": [each.matrix for each in matrices],
        "rows": [each.rows for each in matrices],
        "columns": [each.columns for each in matrices],
        "zeros": [each.zeros for each in matrices],
        "sparsity": [each.sparsity for each in matrices],
        "layer": layers,
        "layer_sparsity": [target.sparsity for target in targets],
        "layer_pattern": [_pattern_text(target) for target in targets],
    }
    return pa.table(columns)


def _dense_table(dense: Sequence[Dense]) -> pa.Table:
    columns: Mapping[str, Any] = {
        "parameter": [each.name for each in dense],
        "shape": pa.array([each.shape for each in dense], pa.list_(pa.int64())),
        "why": [each.why for each in dense],
    }
    return pa.table(columns)


def _pattern_text(target: LayerTarget) -> str:
    return "unstructured" if target.pattern is None else str(target.pattern)


def _allocation_summary(allocation: Allocation, allocated: Allocated) -> dict[str, Any]:
    """Return what each decoder layer was pruned to, and where the allocation was not followed."""
    if isinstance(allocation, Uniform):
        return {}
    layers, warnings = allocated.layers, []
    if allocated.clamped:
        held = ", ".join(map(str, allocated.clamped))
        warnings.append(
            f"decoder layers {held} are at a bound, since no layer can have their share of zeros; "
            "the others were shifted to keep the mean"
        )
    if len(layers) > 1 and len(set(layers)) == 1:
        warnings.append("all decoder layers came out equal: this is what uniform gives")
    return {
        "layer_sparsity": [layer.sparsity for layer in layers],
        "layer_pattern": [_pattern_text(layer) for layer in layers],
        "allocation_warnings": warnings,
    }


def _summary(facts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return what a reader of the results must know: experts that saw few tokens, damping that was
    raised, columns without input; and how well kept weights were fitted, on average over matrices
    of the error of their part, relative to its dense output."""

    def nonzero(fact: str) -> dict[str, float]:
        return {name: each[fact] for name, each in facts.items() if each.get(fact)}

    recorded = {fact for each in facts.values() for fact in each}
    summary: dict[str, Any] = {}
    if "starved_tokens" in recorded:
        summary["starved_experts"] = {
            name: int(each["starved_tokens"])
            for name, each in facts.items()
            if "starved_tokens" in each
        }
    if "damping_raises" in recorded:
        summary["raised_damping"] = {
            name: {"damping": facts[name]["damping"], "raises": int(raises)}
            for name, raises in nonzero("damping_raises").items()
        }
    if "error_after" in recorded:
        fitted = [each for each in facts.values() if "error_after" in each]
        summary["fitted"] = {
            name: sum(each[name] for each in fitted) / len(fitted)
            for name in ("error_before", "error_after")
        }
    if "dead_columns" in recorded:
        summary["dead_columns"] = {
            name: int(columns) for name, columns in nonzero("dead_columns").items()
        }
    return summary
