"""Prune every linear layer inside a model's decoder layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, nn

from pipeline.allocation import allocate
from pipeline.errors import InputError
from pipeline.models import Artifacts, load_model, load_tokenizer
from pipeline.pruners import PRUNERS
from pipeline.sparsity import MatrixSparsity, check, measure
from pipeline.specs import Allocation, Pruner, PruneSpec, parse_pattern
from pipeline.walk import Matrix, NonFiniteError, decoder_layers, walk
from pipeline.windows import read_windows


@dataclass(frozen=True)
class PruneReport:
    """What was done to each matrix."""

    matrices: list[MatrixSparsity]
    facts: dict[str, dict[str, float]]
    """Matrix name to what its pruner recorded."""

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
) -> PruneReport:
    """Prune a model in place.

    Args:
        model: a causal language model, in evaluation mode.
        windows: the calibration set, token ids `[nsamples, seqlen]`; None for pruners without data.
        sparsity: share of zeros in each matrix, on average over the decoder layers.
        pattern: kept and group size of an N:M pattern.

    Raises:
        InputError: if the windows are too long for the model or a pattern does not fit a matrix.
        NonFiniteError: if a weight or an activation is NaN or infinite.
        SparsityError: if a matrix is not as sparse afterwards as it should be.
    """
    _check_length(model, windows)
    entry = PRUNERS[pruner.name]
    _, layers = decoder_layers(model)
    shares = allocate(allocation, sparsity, len(layers))
    measured: list[MatrixSparsity] = []
    facts: dict[str, dict[str, float]] = {}

    def visit(number: int, found: list[Matrix]) -> None:
        for matrix in found:
            weight = matrix.linear.weight
            zeros_before = int((weight == 0).sum())
            facts[matrix.name] = _prune_matrix(matrix, pruner, shares[number], pattern)
            measured.append(measure(matrix.name, weight))
            check(measured[-1], weight, zeros_before, shares[number], pattern)

    walk(model, windows, entry.statistics, visit)
    return PruneReport(matrices=measured, facts=facts)


def _prune_matrix(
    matrix: Matrix, pruner: Pruner, sparsity: float, pattern: tuple[int, int] | None
) -> dict[str, float]:
    weight = matrix.linear.weight.data
    if not bool(weight.isfinite().all()):
        raise NonFiniteError(f"{matrix.name}: the weight has NaN or infinite values")
    if pattern is not None and weight.shape[1] % pattern[1]:
        remedy = f"{matrix.name} has {weight.shape[1]} inputs, no multiple of {pattern[1]}"
        raise InputError("pattern", f"{pattern[0]}:{pattern[1]}", remedy)
    prune = PRUNERS[pruner.name].prune
    try:
        pruned = prune(weight.float(), matrix.statistics, sparsity, pattern, pruner)
    except ValueError as error:
        raise ValueError(f"{matrix.name}: {error}") from error
    if pruned.weight is not None:
        weight.copy_(pruned.weight)
    weight.masked_fill_(pruned.mask, 0.0)
    return pruned.facts


def _check_length(model: nn.Module, windows: Tensor | None) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if windows is not None and isinstance(longest, int) and windows.shape[1] > longest:
        remedy = f"the model takes {longest} tokens at the most; lower it"
        raise InputError("seqlen", windows.shape[1], remedy)


def run(spec: PruneSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Prune, measure, and leave the model with its tokenizer."""
    model = load_model(spec.model, artifacts)
    windows = None
    if spec.calibration is not None:
        windows = read_windows(artifacts[spec.calibration.key])
    report = prune_model(
        model,
        windows,
        spec.pruner,
        spec.sparsity,
        None if spec.pattern is None else parse_pattern(spec.pattern),
        spec.allocation,
    )
    model.save_pretrained(output / "model")
    load_tokenizer(spec.model, artifacts).save_pretrained(output / "model")
    pq.write_table(_table(report.matrices), output / "sparsity.parquet")
    return {
        "sparsity": report.sparsity,
        "matrices": len(report.matrices),
        **_summary(spec.pruner, report.facts),
    }


def _table(matrices: list[MatrixSparsity]) -> pa.Table:
    columns: Mapping[str, list[Any]] = {
        "matrix": [each.matrix for each in matrices],
        "rows": [each.rows for each in matrices],
        "columns": [each.columns for each in matrices],
        "zeros": [each.zeros for each in matrices],
        "sparsity": [each.sparsity for each in matrices],
    }
    return pa.table(columns)


def _summary(pruner: Pruner, facts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What a reader of the results must know: damping that was raised, columns without input."""
    asked = getattr(pruner, "damping", None)
    raised = {
        name: told["damping"] for name, told in facts.items() if told.get("damping", asked) != asked
    }
    dead = {
        name: int(told["dead_columns"]) for name, told in facts.items() if told.get("dead_columns")
    }
    return {"raised_damping": raised, "dead_columns": dead} if asked is not None else {}
