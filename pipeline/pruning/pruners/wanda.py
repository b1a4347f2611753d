"""Wanda: pruning by weights and activations (arXiv 2306.11695)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.masks import refuse_nan, smallest_to_target
from pipeline.specs import Wanda

_TOLERANCE = 1e-3
"""Largest difference of the variant's sparsity from its target, where bisection can reach it."""

LARGEST_SHARE = 0.8
"""Largest share of a row's score mass that the variant removes."""


def pruner(options: Wanda) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(prune_by_wanda, ("squared_norms",), None if options.variant else "row")


def prune_by_wanda(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    target: LayerTarget,
    options: Wanda,
) -> Pruned:
    """Zero the smallest |W_ij| * ||X_j||_2 of each output row, or of each group of a pattern
    (equation 1).

    Args:
        weight: `[out_features, in_features]`.
        statistics: `squared_norms` `[in_features]`, the sum of X_tj^2 over tokens, on any scale.

    Returns:
        With the variant, facts: `share`, the largest share of a row's score mass to remove.
    """
    scores = wanda_scores(weight, statistics["squared_norms"])
    if options.variant:
        return _prune_by_mass(scores, target.sparsity)
    return Pruned(mask=smallest_to_target(scores, target, "row"))


def wanda_scores(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """Return |W_ij| * ||X_j||_2, `[out_features, in_features]`."""
    return weight.abs() * squared_norms.sqrt()


def first_mask(
    weight: Tensor,
    squared_norms: Tensor,
    target: LayerTarget,
    initial: Literal["magnitude", "wanda"],
) -> Tensor:
    """Return the mask of each row's smallest scores, from which another pruner starts."""
    scores = weight.abs() if initial == "magnitude" else wanda_scores(weight, squared_norms)
    return smallest_to_target(scores, target, "row")


def _prune_by_mass(scores: Tensor, sparsity: float) -> Pruned:
    """Choose in each row the smallest scores whose sum is at most a share of the row's.

    The share, one for all rows, is found by bisection, as in Wanda's code (`use_variant`).
    """
    refuse_nan(scores)
    ordered, order = scores.sort(dim=1, stable=True)
    mass = ordered.cumsum(dim=1, dtype=torch.float64)
    low, share, high = 0.0, LARGEST_SHARE / 2, LARGEST_SHARE
    while True:
        removed = torch.searchsorted(mass, mass[:, -1:] * share, right=True)  # [rows, 1]
        excess = float(removed.sum()) / scores.numel() - sparsity
        if abs(excess) <= _TOLERANCE or high - low < _TOLERANCE:
            break
        low, high = (low, share) if excess > 0 else (share, high)
        share = (low + high) / 2
    first = torch.arange(scores.shape[1], device=scores.device) < removed
    mask = torch.empty_like(first).scatter_(1, order, first)
    return Pruned(mask=mask, facts={"share": share})
