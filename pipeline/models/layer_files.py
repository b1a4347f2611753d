"""The safetensors file of one pruned decoder layer: masks or weights.

A matrix's mask is a tensor of bytes `[ceil(rows * columns / 8)]`: row by row, the first weight in
the highest bit of a byte, 1 for a weight that is set to zero, and 0 in the bits left over at the
end (`numpy.packbits`). Weights are `[rows, columns]` in the model's own type. The metadata entry
`matrices` is JSON: by name, `rows`, `columns`, and `facts`, which the pruner recorded. If an N:M
pattern holds in another order of the columns, `<name>.permutation` `[columns]` is that order.
"""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models.matrices import Matrix, decoder_layers, matrices, set_to_zero
from pipeline.models.streaming import change
from pipeline.specs import canonical_json

_PERMUTATION = ".permutation"
_LAYER_FILE = re.compile(r"layer-(\d{5})\.safetensors")


@dataclass(frozen=True)
class LayerRecord:
    """What a layer file holds besides masks and weights, by matrix name."""

    facts: Mapping[str, Mapping[str, float]]
    """What the pruner recorded."""

    permutations: Mapping[str, Tensor] = field(default_factory=dict)
    """The order of the columns `[columns]` in which a pattern holds, if it is not their own."""


class LayerFileError(ValueError):
    """A file does not fit its decoder layer; the message says where."""


def layer_file(number: int) -> str:
    """Return the file name of a decoder layer."""
    return f"layer-{number:05d}.safetensors"


def write_masks(path: Path, masks: Mapping[str, Tensor], record: LayerRecord) -> None:
    """Write a layer's masks, matrix name to `[rows, columns]`; True sets a weight to zero."""
    bits = {name: torch.from_numpy(packed(mask)) for name, mask in masks.items()}
    _save(path, bits, masks, record)


def write_weights(path: Path, weights: Mapping[str, Tensor], record: LayerRecord) -> None:
    """Write a layer's pruned weights, matrix name to `[rows, columns]`."""
    copied = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    _save(path, copied, weights, record)


@torch.no_grad()
def apply_layer_file(path: Path, found: Sequence[Matrix]) -> LayerRecord:
    """Apply a file's masks or weights to the matrices of its layer.

    Args:
        found: the dense matrices of the layer.

    Returns:
        What the file holds besides.

    Raises:
        LayerFileError: if names or shapes are not those of the layer.
    """
    with safe_open(path, framework="pt") as file:
        entries = json.loads((file.metadata() or {}).get("matrices", "{}"))
        _check_names(path, set(entries), {matrix.name for matrix in found})
        stored = set(file.keys())
        orders = {name + _PERMUTATION for name in entries} & stored
        _check_names(path, stored, set(entries) | orders)
        for matrix in found:
            shape = (entries[matrix.name]["rows"], entries[matrix.name]["columns"])
            if shape != tuple(matrix.weight.shape):
                rows, columns = matrix.weight.shape
                raise LayerFileError(
                    f"{path}: {matrix.name} is {shape[0]} x {shape[1]} here, "
                    f"and {rows} x {columns} in the model"
                )
        for matrix in found:
            tensor = file.get_tensor(matrix.name)
            if tensor.dtype == torch.uint8:
                try:
                    mask = unpacked(tensor, matrix.weight.shape)
                except ValueError as error:
                    raise LayerFileError(f"{path}: the mask of {matrix.name} {error}") from error
                set_to_zero(matrix.weight, mask.to(matrix.weight.device))
            else:
                matrix.weight.copy_(tensor)
        permutations = {
            name.removesuffix(_PERMUTATION): file.get_tensor(name).long() for name in orders
        }
    return LayerRecord({name: entry["facts"] for name, entry in entries.items()}, permutations)


def apply_masks(model: nn.Module, folder: Path) -> None:
    """Apply the masks of all decoder layers to a dense model.

    A layer that is still in its files is masked whenever it is read.

    Raises:
        LayerFileError: if files, names or shapes are not those of the model.
    """
    root, layers = decoder_layers(model)
    there = {path.name for path in folder.iterdir() if _LAYER_FILE.fullmatch(path.name)}
    _check_names(folder, there, {layer_file(number) for number in range(len(layers))})
    for number, layer in enumerate(layers):
        path, name = folder / layer_file(number), f"{root}.{number}"
        change(layer, functools.partial(_apply_to_layer, path, name, layer))


def _apply_to_layer(path: Path, name: str, layer: nn.Module) -> None:
    apply_layer_file(path, matrices(name, layer))


def _save(
    path: Path, tensors: dict[str, Tensor], layer: Mapping[str, Tensor], record: LayerRecord
) -> None:
    matrices = {
        name: {"rows": each.shape[0], "columns": each.shape[1], "facts": record.facts[name]}
        for name, each in layer.items()
    }
    orders = {
        name + _PERMUTATION: record.permutations[name].int()
        for name in layer
        if name in record.permutations
    }
    metadata = {"matrices": canonical_json(matrices).decode()}  # one entry: several have no order
    save_file(tensors | orders, path, metadata=metadata)


def packed(mask: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return a mask in bits, as a layer file has it."""
    return np.packbits(mask.flatten().cpu().numpy())


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask of a shape `[rows, columns]` from its bits.

    Raises:
        ValueError: if the bits are too few or too many.
    """
    count = math.prod(shape)
    if bits.shape != (-(-count // 8),):
        raise ValueError(f"has {bits.numel()} bytes for {count} weights")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool().view(*shape)


def _check_names(path: Path, there: set[str], wanted: set[str]) -> None:
    for problem, names in (("lacks", wanted - there), ("has too much:", there - wanted)):
        if names:
            raise LayerFileError(f"{path}: {problem} {min(names)} ({len(names)} in all)")
