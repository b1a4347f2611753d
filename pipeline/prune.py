"""Prune every matrix of attention and MLP in a model's decoder layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from pipeline.allocation import allocate
from pipeline.errors import InputError, NonFiniteError
from pipeline.matrices import Matrix, decoder_layers, matrices
from pipeline.models import Artifacts, load_model, load_tokenizer
from pipeline.pruners import PRUNERS, PrunerEntry
from pipeline.pruners.pruned import Pruned
from pipeline.sparsity import MatrixSparsity, check, measure
from pipeline.specs import (
    DEVICE_HIDDEN_BYTES,
    HOST_HIDDEN_BYTES,
    Allocation,
    Pruner,
    PruneSpec,
    parse_pattern,
)
from pipeline.walk import walk
from pipeline.windows import read_windows


@dataclass(frozen=True)
class PruneReport:
    """What was done to each matrix."""

    matrices: list[MatrixSparsity]
    facts: dict[str, dict[str, float]]
    """Matrix name to what its pruner recorded."""
    permutations: dict[str, Tensor]
    """Matrix name to the order of its columns `[in_features]` in which the pattern holds, where
    that is not their own."""

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
    device: torch.device | None = None,
    device_hidden_bytes: int = DEVICE_HIDDEN_BYTES,
    host_hidden_bytes: int = HOST_HIDDEN_BYTES,
) -> PruneReport:
    """Prune a model in place.

    Args:
        model: a causal language model, in evaluation mode.
        windows: the calibration set, token ids `[nsamples, seqlen]`; None for pruners without data.
        sparsity: share of zeros in each matrix, on average over the decoder layers.
        pattern: kept and group size of an N:M pattern.
        batch_size: windows of a forward pass, by default as many as have
            `pipeline.walk.BATCH_TOKENS` tokens.
        device: where layers are run and pruned, one at a time; by default where the model is.
        device_hidden_bytes: bytes of hidden states to hold there,
        host_hidden_bytes: and beyond that in host memory, before they go to files.

    Raises:
        InputError: if the windows are missing or too long for the model, a pattern does not fit a
            matrix, the pruner's options do not suit the model, or the model is of a form that
            cannot be pruned.
        ValueError: if the pruner's options do not go with a pattern, or without one.
        NonFiniteError: if a weight or an activation is NaN or infinite.
        SparsityError: if a matrix is not as sparse afterwards as it should be.
    """
    pruner.check_pattern(pattern is not None)
    entry = PRUNERS[pruner.name](pruner)
    if entry.statistics and windows is None:
        raise InputError("windows", None, f"pruner {pruner.name} needs a calibration set")
    _check_length(model, windows)
    root, layers = decoder_layers(model)
    paths: dict[str, str] = {}
    for number, layer in enumerate(layers):  # all of them, before any forward pass
        for matrix in matrices(f"{root}.{number}", layer):
            _check_matrix(matrix, pattern)
            paths[matrix.name] = matrix.name.removeprefix(f"{root}.{number}.")
    options = entry.options_by_matrix(pruner, paths)
    shares = allocate(allocation, sparsity, len(layers))
    measured: list[MatrixSparsity] = []
    facts: dict[str, dict[str, float]] = {}
    permutations: dict[str, Tensor] = {}

    def visit(number: int, found: list[Matrix]) -> None:
        for matrix in found:
            pruned = _prune_matrix(matrix, entry, options[matrix.name], shares[number], pattern)
            facts[matrix.name] = dict(pruned.facts)
            if matrix.starved:
                facts[matrix.name]["starved_tokens"] = float(matrix.tokens)
            if pruned.permutation is not None:
                permutations[matrix.name] = pruned.permutation.cpu()
            measured.append(measure(matrix.name, matrix.weight))

    walk(
        model,
        windows,
        entry.statistics,
        visit,
        batch_size,
        device,
        device_hidden_bytes,
        host_hidden_bytes,
    )
    return PruneReport(matrices=measured, facts=facts, permutations=permutations)


def _check_length(model: nn.Module, windows: Tensor | None) -> None:
    config: Any = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if windows is not None and isinstance(longest, int) and windows.shape[1] > longest:
        remedy = f"the model takes {longest} tokens at the most; lower it"
        raise InputError("seqlen", windows.shape[1], remedy)


def _check_matrix(matrix: Matrix, pattern: tuple[int, int] | None) -> None:
    if not bool(matrix.weight.isfinite().all()):
        raise NonFiniteError(f"{matrix.name}: the weight has NaN or infinite values")
    columns = matrix.weight.shape[1]
    if pattern is not None and columns % pattern[1]:
        remedy = f"{matrix.name} has {columns} inputs, no multiple of {pattern[1]}"
        raise InputError("pattern", f"{pattern[0]}:{pattern[1]}", remedy)


def _prune_matrix(
    matrix: Matrix,
    entry: PrunerEntry,
    options: Pruner,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> Pruned:
    weight = matrix.weight
    try:
        pruned = entry.prune(
            weight.float().contiguous(), matrix.statistics, sparsity, pattern, options
        )
    except ValueError as error:
        raise ValueError(f"{matrix.name}: {error}") from error
    if pruned.weight is not None:
        weight.copy_(pruned.weight)
        if not bool(weight.isfinite().all()):
            raise NonFiniteError(f"{matrix.name}: the updated weight is too large for its dtype")
    weight.masked_fill_(pruned.mask, 0.0)
    check(
        matrix.name,
        weight,
        pruned.mask,
        sparsity,
        pattern,
        entry.counted_per,
        pruned.permutation,
    )
    return pruned


def run(spec: PruneSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Prune, measure, and leave the model with its tokenizer."""
    model = load_model(spec.model, artifacts)
    tokenizer = load_tokenizer(spec.model, artifacts)
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
        device_hidden_bytes=spec.device_hidden_bytes,
        host_hidden_bytes=spec.host_hidden_bytes,
    )
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    pq.write_table(_table(report.matrices), output / "sparsity.parquet")
    return {
        "sparsity": report.sparsity,
        "matrices": len(report.matrices),
        **_summary(report.facts),
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


def _summary(facts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What a reader of the results must know: experts that saw few tokens, damping that was
    raised, columns without input."""

    def told(fact: str) -> dict[str, float]:
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
            for name, raises in told("damping_raises").items()
        }
    if "dead_columns" in recorded:
        summary["dead_columns"] = {
            name: int(columns) for name, columns in told("dead_columns").items()
        }
    return summary
