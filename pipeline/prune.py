"""Prune every linear layer inside a model's decoder layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, nn

from pipeline.allocation import Allocated, LayerTarget, allocate
from pipeline.errors import InputError
from pipeline.models import Artifacts, load_model, load_tokenizer
from pipeline.outliers import read_outlier_ratios
from pipeline.pruners import PRUNERS
from pipeline.sparsity import MatrixSparsity, check, measure
from pipeline.specs import Allocation, Pruner, PruneSpec, SparseGPT, Uniform, parse_pattern
from pipeline.walk import (
    Matrix,
    NonFiniteError,
    check_length,
    decoder_layers,
    layer_sizes,
    matrices,
    walk,
)
from pipeline.windows import read_windows


@dataclass(frozen=True)
class PruneReport:
    """What was done to each matrix."""

    matrices: list[MatrixSparsity]
    facts: dict[str, dict[str, float]]
    """Matrix name to what its pruner recorded."""
    allocated: Allocated
    """What each decoder layer was pruned to."""
    layers: dict[str, int]
    """Matrix name to the number of its decoder layer."""

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned matrices."""
        weights = sum(each.rows * each.columns for each in self.matrices)
        return sum(each.zeros for each in self.matrices) / weights


def prune_model(
    model: nn.Module,
    windows: Tensor | None,
    pruner: Pruner,
    sparsity: float,
    pattern: tuple[int, int] | None,
    allocation: Allocation,
    batch_size: int | None = None,
    outlier_ratios: Sequence[float] | None = None,
) -> PruneReport:
    """Prune a model in place.

    Args:
        model: a causal language model, in evaluation mode.
        windows: the calibration set, token ids `[nsamples, seqlen]`; None for pruners without data.
        sparsity: share of zeros in each matrix, on average over the decoder layers.
        pattern: kept and group size of an N:M pattern, likewise on average.
        batch_size: windows of a forward pass, by default as many as have
            `pipeline.walk.BATCH_TOKENS` tokens.
        outlier_ratios: of each decoder layer, as `pipeline.outliers` counts them; for OWL.

    Raises:
        InputError: if the windows are missing or too long for the model, a pattern does not fit a
            matrix, the allocation does not fit the model, or the model is of a form that cannot
            be pruned.
        NonFiniteError: if a weight or an activation is NaN or infinite.
        SparsityError: if a matrix is not as sparse afterwards as it should be.
    """
    entry = PRUNERS[pruner.name]
    if entry.statistics and windows is None:
        raise InputError("windows", None, f"pruner {pruner.name} needs a calibration set")
    if windows is not None:
        check_length(model, windows)
    root, layers = decoder_layers(model)
    for number, layer in enumerate(layers):  # all of them, before any forward pass
        for matrix in matrices(f"{root}.{number}", layer):
            _check_matrix(matrix, pattern)
    allocated = allocate(allocation, sparsity, pattern, layer_sizes(model), outlier_ratios)
    measured: list[MatrixSparsity] = []
    facts: dict[str, dict[str, float]] = {}
    numbers: dict[str, int] = {}

    def visit(number: int, found: list[Matrix]) -> None:
        for matrix in found:
            facts[matrix.name] = _prune_matrix(matrix, pruner, allocated.layers[number])
            measured.append(measure(matrix.name, matrix.linear.weight))
            numbers[matrix.name] = number

    walk(model, windows, entry.statistics, visit, batch_size)
    return PruneReport(matrices=measured, facts=facts, allocated=allocated, layers=numbers)


def _check_matrix(matrix: Matrix, pattern: tuple[int, int] | None) -> None:
    if not bool(matrix.linear.weight.isfinite().all()):
        raise NonFiniteError(f"{matrix.name}: the weight has NaN or infinite values")
    columns = matrix.linear.in_features
    if pattern is not None and columns % pattern[1]:
        remedy = f"{matrix.name} has {columns} inputs, no multiple of {pattern[1]}"
        raise InputError("pattern", f"{pattern[0]}:{pattern[1]}", remedy)


def _prune_matrix(matrix: Matrix, pruner: Pruner, target: LayerTarget) -> dict[str, float]:
    entry = PRUNERS[pruner.name]
    sparsity, pattern = target.sparsity, target.pattern
    weight = matrix.linear.weight.data
    try:
        pruned = entry.prune(weight.float(), matrix.statistics, sparsity, pattern, pruner)
    except ValueError as error:
        raise ValueError(f"{matrix.name}: {error}") from error
    if pruned.weight is not None:
        weight.copy_(pruned.weight)
        if not bool(weight.isfinite().all()):
            raise NonFiniteError(f"{matrix.name}: the updated weight is too large for its dtype")
    weight.masked_fill_(pruned.mask, 0.0)
    check(matrix.name, weight, pruned.mask, sparsity, pattern, entry.counted_per)
    return pruned.facts


def run(spec: PruneSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Prune, measure, and leave the model with its tokenizer."""
    model = load_model(spec.model, artifacts)
    tokenizer = load_tokenizer(spec.model, artifacts)
    windows = None
    if spec.calibration is not None and spec.pruner.calibrated:
        windows = read_windows(artifacts[spec.calibration.key])
    outliers = spec.outliers
    report = prune_model(
        model,
        windows,
        spec.pruner,
        spec.sparsity,
        None if spec.pattern is None else parse_pattern(spec.pattern),
        spec.allocation,
        outlier_ratios=None if outliers is None else read_outlier_ratios(artifacts[outliers.key]),
    )
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    pq.write_table(_table(report), output / "sparsity.parquet")
    return {
        "sparsity": report.sparsity,
        "matrices": len(report.matrices),
        **_allocation_summary(spec.allocation, report.allocated),
        **_summary(spec.pruner, report.facts),
    }


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


def _pattern_text(target: LayerTarget) -> str:
    return "unstructured" if target.pattern is None else f"{target.pattern[0]}:{target.pattern[1]}"


def _allocation_summary(allocation: Allocation, allocated: Allocated) -> dict[str, Any]:
    """What each decoder layer was pruned to, and where the allocation could not be followed."""
    if isinstance(allocation, Uniform):
        return {}
    layers, warnings = allocated.layers, []
    if allocated.clamped:
        held = ", ".join(map(str, allocated.clamped))
        warnings.append(
            f"decoder layers {held} would have had a share of zeros that no layer can have: they "
            "are at the bound, and the others shifted so that the mean stays"
        )
    if len(layers) > 1 and len(set(layers)) == 1:
        warnings.append("all decoder layers came out alike: this is what uniform gives")
    return {
        "layer_sparsity": [layer.sparsity for layer in layers],
        "layer_pattern": [_pattern_text(layer) for layer in layers],
        "allocation_warnings": warnings,
    }


def _summary(pruner: Pruner, facts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What a reader of the results must know: damping that was raised, columns without input."""
    if not isinstance(pruner, SparseGPT):
        return {}
    raised = {
        name: {"damping": told["damping"], "raises": int(told["damping_raises"])}
        for name, told in facts.items()
        if told["damping_raises"]
    }
    dead = {name: int(told["dead_columns"]) for name, told in facts.items() if told["dead_columns"]}
    return {"raised_damping": raised, "dead_columns": dead}
