"""The least time that a pruner can take: its matrix products at the machine's own rate.

The count holds the products that a method cannot do without, at their cheapest: symmetric ones by
half, shared ones once, 2 FLOP for a multiplication and an addition. All else is left out: norms,
activations, statistics of columns, the choice of masks.
"""

from collections.abc import Callable

import torch

from benchmarks.geometry import Geometry

RATE_TOKENS = 16_384
"""The most rows of the input in measured products."""


def floating_point_operations(geometry: Geometry, pruner: str) -> int:
    """Return the FLOP that pruning cannot do without; 0 for a pruner without data."""
    match pruner:
        case "magnitude":
            return 0
        case "sparsegpt" | "gptq":
            return _forward_passes(geometry) + geometry.layers * (
                _hessians(geometry) + _inverses(geometry) + _updates(geometry)
            )
        case _:
            return _forward_passes(geometry)


def _forward_passes(geometry: Geometry) -> int:
    """Count a dense and a pruned pass through each decoder layer.

    The dense pass may end before the layer's last matrix, whose output no statistic needs. The last
    layer needs no pruned pass.
    """
    weights = [rows * columns for group in geometry.matrices for rows, columns in group]
    products = 2 * geometry.tokens * sum(weights)
    attention = 2 * geometry.tokens * geometry.seqlen * geometry.hidden  # two, causal halves
    last = 2 * geometry.tokens * weights[-1]
    return (2 * geometry.layers - 1) * (products + attention) - geometry.layers * last


def _hessians(geometry: Geometry) -> int:
    """Count X^T X for each input that a matrix reads; it is symmetric, so half of the product."""
    return sum(geometry.tokens * columns**2 for columns in _inputs(geometry))


def _inverses(geometry: Geometry) -> int:
    """Count a Cholesky factor (n^3 / 3) and its inverse for each Hessian."""
    return sum(2 * columns**3 // 3 for columns in _inputs(geometry))


def _updates(geometry: Geometry) -> int:
    """Count the updates of all later columns by each column's error."""
    return sum(rows * columns**2 for group in geometry.matrices for rows, columns in group)


def _inputs(geometry: Geometry) -> list[int]:
    return [group[0][1] for group in geometry.matrices]


def layer_products(
    geometry: Geometry, device: torch.device, dtype: torch.dtype
) -> tuple[int, Callable[[], None]]:
    """Return the FLOP of one decoder layer's matrix products on a batch, and a run of them."""
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
    """Return the FLOP of a product of two square matrices, and a run of it."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        torch.mm(left, right)

    return 2 * size**3, multiply
