"""Prune every linear layer and expert in a model's decoder layers."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from pipeline.models.streaming import resident
from pipeline.models.weight_files import unexpected_tensors
from pipeline.progress import phase
from pipeline.pruning.allocation import Allocated, LayerTarget, allocate
from pipeline.pruning.finished_layers import FinishedLayers
from pipeline.pruning.first_layer import FirstLayer
from pipeline.pruning.hidden_states import DEVICE_HIDDEN_BYTES, HOST_HIDDEN_BYTES
from pipeline.pruning.outliers import read_outlier_ratios
from pipeline.pruning.pruners import pruner_for
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.reuse import first_layer, streamed
from pipeline.pruning.sparsity_check import MatrixSparsity, check, measure
from pipeline.pruning.walk import check_windows, layer_sizes, walk
from pipeline.specs import (
    Allocation,
    Pattern,
    Pruner,
    PruneSpec,
    Uniform,
)
from pipeline.stage import Artifacts, Keep


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
    permutations: Mapping[str, Tensor]
    """Matrix name to the order of its columns `[in_features]` in which the pattern holds, where
    that is not their own."""
    dense: list[Dense]
    """All other parameters of the model."""
    resumed_layers: int = 0
    """Decoder layers that an earlier attempt had finished."""

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned matrices."""
        weights = sum(each.rows * each.columns for each in self.matrices)
        return sum(each.zeros for each in self.matrices) / weights


def prune_model(
    model: nn.Module,
    windows: Tensor | None,
    pruner: Pruner,
    target: LayerTarget,
    allocation: Allocation,
    batch_size: int | None = None,
    outlier_ratios: Sequence[float] | None = None,
    device: torch.device | None = None,
    device_hidden_bytes: int = DEVICE_HIDDEN_BYTES,
    host_hidden_bytes: int = HOST_HIDDEN_BYTES,
    finished: FinishedLayers | None = None,
    first: FirstLayer | None = None,
) -> PruneReport:
    """Prune a model in place.

    Args:
        model: a causal language model, in evaluation mode.
        windows: the calibration set, token ids `[nsamples, seqlen]`; None for pruners without data.
        target: what each matrix is pruned to, on average over the decoder layers.
        batch_size: windows of a forward pass, by default as many as have
            `pipeline.pruning.walk.BATCH_TOKENS` tokens.
        outlier_ratios: of each decoder layer, as `pipeline.pruning.outliers` counts them; for OWL.
        device: where layers are run and pruned, one at a time; by default where the model is.
        device_hidden_bytes: bytes of hidden states to hold there,
        host_hidden_bytes: and beyond that in host memory, before they go to files.
        finished: takes every layer that is done, and gives back those of an earlier attempt at
            the same pruning.
        first: the first layer's statistics, which an earlier pruning may have left there.

    Raises:
        InputError: if the windows are missing or do not suit the model
            (`pipeline.pruning.walk.check_windows`; it must be in evaluation mode), the pattern does
            not fit a matrix, the pruner's options or the allocation do not suit the model, or the
            model is of a form that cannot be pruned.
        ValueError: if the pruner's options do not go with a pattern, or without one.
        NonFiniteError: if a weight or an activation is NaN or infinite.
        SparsityError: if a matrix is not as sparse afterwards as it should be.
    """
    pruner.check_pattern(target.pattern is not None)
    matrix_pruner = pruner_for(pruner)
    if matrix_pruner.statistics and windows is None:
        raise InputError("windows", None, f"pruner {pruner.name} needs a calibration set")
    if windows is not None:
        check_windows(model, windows)
    root, layers = decoder_layers(model)
    paths: dict[str, str] = {}
    dense = [
        Dense(name, tuple(parameter.shape), "outside the decoder layers")
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{root}.")
    ]
    with phase("checking the weights"):  # all of them, before any forward pass
        for number, layer in enumerate(layers):
            with resident(layer):
                for matrix in matrices(f"{root}.{number}", layer):
                    _check_matrix(matrix, target.pattern)
                    paths[matrix.name] = matrix.name.removeprefix(f"{root}.{number}.")
                dense += kept_dense(f"{root}.{number}", layer)
    options = matrix_pruner.options_by_matrix(pruner, paths)
    allocated = allocate(allocation, target, layer_sizes(model), outlier_ratios)
    measured: list[MatrixSparsity] = []
    facts: dict[str, dict[str, float]] = {}
    numbers: dict[str, int] = {}
    permutations: dict[str, Tensor] = {}
    resumed: list[int] = []

    def measure_matrix(number: int, matrix: Matrix) -> None:
        measured.append(measure(matrix.name, matrix.weight))
        numbers[matrix.name] = number

    def visit(number: int, found: list[Matrix]) -> None:
        masks: dict[str, Tensor] = {}
        for matrix in found:
            pruned = _prune_matrix(
                matrix, matrix_pruner, options[matrix.name], allocated.layers[number]
            )
            masks[matrix.name], facts[matrix.name] = pruned.mask, dict(pruned.facts)
            if matrix.starved:
                facts[matrix.name]["starved_tokens"] = float(matrix.tokens)
            if pruned.permutation is not None:
                permutations[matrix.name] = pruned.permutation.cpu()
            measure_matrix(number, matrix)
        if finished is not None:
            finished.save(number, found, masks, LayerRecord(facts, permutations))

    def restore(number: int, found: list[Matrix]) -> bool:
        record = None if finished is None else finished.restore(number, found)
        if record is None:
            return False
        facts.update({name: dict(each) for name, each in record.facts.items()})
        permutations.update(record.permutations)
        for matrix in found:
            measure_matrix(number, matrix)
        resumed.append(number)
        return True

    walk(
        model,
        windows,
        matrix_pruner.statistics,
        visit,
        batch_size,
        device,
        device_hidden_bytes,
        host_hidden_bytes,
        restore,
        first,
    )
    return PruneReport(measured, facts, allocated, numbers, permutations, dense, len(resumed))


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
        assert options.updates_weights, f"{options.name} is said to leave weights as they are"
        weight.copy_(pruned.weight)
        if not is_finite(weight):
            raise NonFiniteError(f"{matrix.name}: the updated weight is too large for its dtype")
    set_to_zero(weight, pruned.mask)
    check(matrix.name, weight, pruned.mask, target, pruner.counted_per, pruned.permutation)
    return pruned


def run(
    spec: PruneSpec,
    artifacts: Artifacts,
    output: Path,
    keep: Keep | None = None,
    device_hidden_bytes: int = DEVICE_HIDDEN_BYTES,
    host_hidden_bytes: int = HOST_HIDDEN_BYTES,
) -> dict[str, Any]:
    """Prune, measure, and leave masks, or the model with its tokenizer.

    Prunings of one model that follow each other in a process load it once, and those with one
    calibration set and the same statistics take those of the first layer once.

    Args:
        keep: keeps every decoder layer that is done; layers that it has already are not pruned
            again. None keeps none.
        device_hidden_bytes: bytes of hidden states to hold on the device,
        host_hidden_bytes: and beyond that in host memory; the rest goes to files in the system's
            temporary folder. The result depends on neither.
    """
    scratch = output / "scratch"
    model = streamed(spec.model, artifacts)
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
    windows = first = None
    if spec.calibration is not None and spec.pruner.calibrated:
        windows = read_windows(artifacts[spec.calibration.key])
        first = first_layer(spec, pruner_for(spec.pruner).statistics, artifacts)
    outliers = spec.outliers
    report = prune_model(
        model,
        windows,
        spec.pruner,
        LayerTarget.parse(spec.sparsity, spec.pattern),
        spec.allocation,
        outlier_ratios=None if outliers is None else read_outlier_ratios(artifacts[outliers.key]),
        device_hidden_bytes=device_hidden_bytes,
        host_hidden_bytes=host_hidden_bytes,
        finished=finished,
        first=first,
    )
    if checkpoint is not None:
        with phase("writing the model"):
            checkpoint.finish()
        tokenizer.save_pretrained(output / "model")
        if report.permutations:
            save_file(dict(report.permutations), output / "permutations.safetensors")
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
