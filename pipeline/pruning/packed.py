"""Checkpoints of rounded models as integers and scales, in the format of compressed-tensors, which
vLLM and transformers read."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import InputError
from pipeline.models.checkpoint import INDEX
from pipeline.models.weight_files import safetensors_files
from pipeline.pruning.pruners.grids import whole_numbers
from pipeline.specs import FirstLayers, PruneSpec, Quantizer

PACKED_BITS = (4, 8)
"""Those of which a whole number fills 32 bits."""


def check_packable(spec: PruneSpec, pruned: Path) -> None:
    """Check that a pruned model can be stored as integers.

    Args:
        pruned: the folder of its artifact.

    Raises:
        InputError: naming what stands against it.
    """
    pruner = spec.pruner
    if not isinstance(pruner, Quantizer) or not pruner.few_values:
        raise InputError("pruner", pruner.name, "leaves no integers to pack: take gptq or rtn")
    if pruner.bits not in PACKED_BITS:
        raise InputError("bits", pruner.bits, "does not fill a machine word: take 4 or 8")
    if not pruner.symmetric:
        remedy = "has zero points, which are not written: take symmetric: true"
        raise InputError("symmetric", pruner.symmetric, remedy)
    if isinstance(spec.allocation, FirstLayers):
        remedy = "leaves layers unrounded, which the format's readers do not expect: take uniform"
        raise InputError("allocation", spec.allocation.name, remedy)
    table = pq.read_table(pruned / "sparsity.parquet", columns=["matrix", "columns"])
    for row in table.to_pylist():
        if row["columns"] % pruner.group_size:
            remedy = f"{row['matrix']} has {row['columns']} inputs: take a divisor, such as 64"
            raise InputError("group_size", pruner.group_size, remedy)
    if find_spec("compressed_tensors") is None:
        raise InputError("packed", True, "needs compressed-tensors: pip install 'calprune[packed]'")


def pack_checkpoint(folder: Path, spec: PruneSpec, pruned: Path) -> None:
    """Replace the rounded matrices of a checkpoint by packed integers and scales, file by file.

    What a reader multiplies out are the same weights, to the bit, in the checkpoint's type.

    Args:
        folder: of the checkpoint.
        spec: passes `check_packable`.
        pruned: the folder of its artifact.

    Raises:
        InputError: if the checkpoint stores a rounded matrix together with others.
        RoundingError: if a matrix is not rounded.
    """
    assert isinstance(spec.pruner, Quantizer)
    table = pq.read_table(pruned / "sparsity.parquet", columns=["matrix"])
    rounded = set(table["matrix"].to_pylist())
    weight_map: dict[str, str] = {}
    left: list[str] = []
    size = 0
    for path in safetensors_files(folder):
        tensors: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor, matrix = file.get_tensor(name), name.removesuffix(".weight")
                if matrix in rounded:
                    rounded.remove(matrix)
                    packed = _packed(matrix, tensor, spec.pruner)
                    tensors |= {f"{matrix}.{part}": each for part, each in packed.items()}
                else:
                    tensors[name] = tensor
                    if matrix != name and tensor.dim() == 2:
                        left.append(matrix)
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        size += sum(each.nbytes for each in tensors.values())
    if rounded:
        remedy = "is stored together with other matrices, and packed ones are not: leave packed out"
        raise InputError("model", min(rounded), remedy)
    index = folder / INDEX
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] = size
    content["weight_map"] = dict(sorted(weight_map.items()))
    index.write_text(json.dumps(content, indent=2) + "\n")
    config = folder / "config.json"
    settings = json.loads(config.read_text()) | {"quantization_config": _settings(spec, left)}
    config.write_text(json.dumps(settings, indent=2) + "\n")


def _packed(name: str, weight: Tensor, options: Quantizer) -> Mapping[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    numbers, scale = whole_numbers(name, weight, options)
    return {
        "weight_packed": pack_to_int32(numbers, options.bits).contiguous(),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def _settings(spec: PruneSpec, left: list[str]) -> dict[str, Any]:
    """Return the field of a model's configuration from which readers know the format.

    Args:
        left: matrices of the checkpoint that are as they were.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        QuantizationStrategy,
    )

    assert isinstance(spec.pruner, Quantizer)
    weights = QuantizationArgs(
        num_bits=spec.pruner.bits,
        group_size=spec.pruner.group_size,
        strategy=QuantizationStrategy.GROUP,
        symmetric=True,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    found: dict[str, Any] = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=sorted({*left, "lm_head"}),
    ).model_dump(mode="json")
    return found
