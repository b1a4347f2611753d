"""The least time that a pruner can take: its matrix products at the machine's own rate.

Counted are the products without which a method's result cannot be had, each with the symmetry and
the sharing that it allows, as 2 FLOP for a multiplication and an addition. Not counted is all that
is no matrix product: norms, activations, statistics of columns, the choice of masks.
"""

from collections.abc import Callable

import torch

from benchmarks.geometry import Geometry

RATE_TOKENS = 16_384
"""At most so many rows of the input in measured products."""


def floating_point_operations(geometry: Geometry, pruner: str) -> int:
    """FLOP that pruning cannot do without; 0 for a pruner without data."""
    match pruner:
        case "magnitude":
            return 0
        case "sparsegpt":
            return _forward_passes(geometry) + geometry.layers * (
                _hessians(geometry) + _inverses(geometry) + _updates(geometry)
            )
        case _:
            return _forward_passes(geometry)


def _forward_passes(geometry: Geometry) -> int:
    """Dense and pruned through each decoder layer: the dense pass may end before the last matrix,
    whose output no statistic needs, and after the last layer none does."""
    weights = [rows * columns for group in geometry.matrices for rows, columns in group]
    products = 2 * geometry.tokens * sum(weights)
    attention = 2 * geometry.tokens * geometry.seqlen * geometry.hidden  # two, causal halves
    last = 2 * geometry.tokens * weights[-1]
    return (2 * geometry.layers - 1) * (products + attention) - geometry.layers * last


def _hessians(geometry: Geometry) -> int:
    """X^T X of each input that a matrix reads: symmetric, so half of the product."""
    return sum(geometry.tokens * columns**2 for columns in _inputs(geometry))


def _inverses(geometry: Geometry) -> int:
    """Of each Hessian the inverse's factor: a Cholesky factor (n^3 / 3), and its inverse."""
    return sum(2 * columns**3 // 3 for columns in _inputs(geometry))


def _updates(geometry: Geometry) -> int:
    """Each column's error taken out of all later columns."""
    return sum(rows * columns**2 for group in geometry.matrices for rows, columns in group)


def _inputs(geometry: Geometry) -> list[int]:
    return [group[0][1] for group in geometry.matrices]


def layer_products(
    geometry: Geometry, device: torch.device, dtype: torch.dtype
) -> tuple[int, Callable[[], None]]:
    """The matrix products of one decoder layer on a batch: their FLOP, and a run of them."""
    tokens = min(RATE_TOKENS, geometry.tokens)
    shapes = sorted({shape for group in geometry.matrices for shape in group})
    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    inputs = {
        columns: torch.randn(tokens, columns, device=device).to(dtype) for _, columns in shapes
    }

    def multiply() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[1]], weight.T)

    return sum(2 * tokens * rows * columns for rows, columns in shapes), multiply


def square_product(
    size: int, device: torch.device, dtype: torch.dtype
) -> tuple[int, Callable[[], None]]:
    """The product of two square matrices: its FLOP, and a run of it."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        torch.mm(left, right)

    return 2 * size**3, multiply
