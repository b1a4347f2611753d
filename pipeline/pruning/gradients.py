"""Gradients of a decoder layer's output by its own weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.models.layer_calls import CapturedBatch, states_of
from pipeline.models.matrices import Matrix, holders

GRADIENT_SQUARES = "gradient_squares"
"""Name of a matrix's statistic `[out_features, in_features]`."""


def add_gradient_squares(
    batches: Sequence[CapturedBatch], number: int, layer: nn.Module, found: Sequence[Matrix]
) -> None:
    """Add to the statistics of a layer's matrices the square of the gradient of its output's
    Frobenius norm, on average over windows (arXiv 2503.04992, section 3.2).

    An expert that saw too few tokens gets zeros.

    Args:
        batches: one window each.
        number: of the layer, which is dense.
    """
    held = holders(layer, found)
    weights = trainable(held)
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in batches:
        with torch.enable_grad(), with_weights(layer, weights) as run:
            norm = states_of(batch.forward(number, run)).float().norm()
        gradients = torch.autograd.grad(norm, list(weights.values()), allow_unused=True)
        for total, gradient in zip(squares.values(), gradients, strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient, value=1 / len(batches))
    for matrix in found:
        own = torch.zeros(matrix.weight.shape, device=matrix.weight.device)
        if not matrix.starved:
            name, start = _place(matrix, held)
            own = squares[name].as_strided(matrix.weight.shape, matrix.weight.stride(), start)
        matrix.statistics = {**matrix.statistics, GRADIENT_SQUARES: own}


def trainable(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return copies in float32 that gradients are taken by."""
    return {
        name: parameter.detach().float().clone().requires_grad_()
        for name, parameter in parameters.items()
    }


@contextmanager
def with_weights(layer: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[Callable[..., Any]]:
    """Yield the layer as a function with other weights for some of its own, by path.

    In a model of half precision products are taken in its type, whatever that of the weights.
    """
    own = next(parameter for name, parameter in layer.named_parameters() if name in weights)

    def run(*positional: Any, **keywords: Any) -> Any:
        return functional_call(layer, dict(weights), positional, keywords)

    half = own.dtype != torch.float32
    with torch.autocast(own.device.type, dtype=own.dtype, enabled=half):
        yield run


def _place(matrix: Matrix, held: Mapping[str, nn.Parameter]) -> tuple[str, int]:
    """Return the parameter that holds a matrix, and the offset of its first weight there."""
    for name, parameter in held.items():
        offset = matrix.weight.data_ptr() - parameter.data_ptr()
        if 0 <= offset < parameter.nbytes:
            return name, offset // parameter.itemsize
    raise AssertionError(f"{matrix.name} is in no parameter of its layer")
