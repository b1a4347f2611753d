"""What pruning saves: bytes on disk by format, and time with 2:4 weights."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from pipeline.models.matrices import Matrix, decoder_layers, matrices
from pipeline.models.streaming import each_resident

TOKENS = 4096
"""Rows of the input of timed products."""

TIMED_ROUNDS = 10
"""Rounds of timing; the fastest counts."""

CALLS = 10
"""Products per round: enough for their launch not to matter."""

SPARSE_TENSOR_CORES = (8, 0)
"""Lowest compute capability with sparse tensor cores."""


def bytes_by_format(model: Any) -> dict[str, int]:
    """Return the bytes of a model's prunable matrices as safetensors, each in a file of its own.

    `dense`: all weights. `masks`: one bit per weight, for use with the dense model. `compressed`:
    those bits and the weights that are not zero.
    """
    totals = {"dense": 0, "masks": 0, "compressed": 0}
    for matrix in _matrices(model):
        weight = matrix.weight.detach().cpu().contiguous()
        kept = weight != 0
        mask = torch.from_numpy(np.packbits(kept.flatten().numpy()))
        totals["dense"] += len(save({"weight": weight}))
        totals["masks"] += len(save({"mask": mask}))
        totals["compressed"] += len(save({"mask": mask, "values": weight[kept]}))
    return totals


def speed_2_4(model: Any) -> str:
    """Return the speed-up of the first decoder layer's products by torch's semi-structured form of
    2:4 weights over the same weights dense, or why it was not measured."""
    device = next(model.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < SPARSE_TENSOR_CORES:
        return "not measured: no GPU with sparse tensor cores"
    weights = [matrix.weight.detach() for matrix in _matrices(model, layers=1)]
    if not all(_is_2_4(weight) for weight in weights):
        return "not measured: the weights are not 2:4"
    dense = sparse = 0.0
    for weight in weights:
        weight = weight.to(torch.bfloat16 if weight.dtype == torch.float32 else weight.dtype)
        inputs = torch.randn(TOKENS, weight.shape[1], device=device, dtype=weight.dtype)
        packed = torch.sparse.to_sparse_semi_structured(weight.contiguous())
        dense += _seconds(lambda: functional.linear(inputs, weight))  # noqa: B023
        sparse += _seconds(lambda: functional.linear(inputs, packed))  # noqa: B023
    return f"{dense / sparse:.2f}"


def _matrices(model: Any, layers: int | None = None) -> Iterator[Matrix]:
    root, found = decoder_layers(model)
    for number, layer in enumerate(each_resident(found[:layers])):
        yield from matrices(f"{root}.{number}", layer)


def _is_2_4(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) != 0).sum(dim=1) <= 2).all())


def _seconds(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest round on the GPU."""
    times = []
    for _ in range(TIMED_ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
