"""Wanda: pruning by weights and activations (arXiv 2306.11695)."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.pruners.masks import smallest_in_groups, smallest_in_rows, zeros_in
from pipeline.pruners.pruned import Pruned
from pipeline.specs import Wanda


def prune_by_wanda(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    sparsity: float,
    pattern: tuple[int, int] | None,
    options: Wanda,
) -> Pruned:
    """Zero the smallest |W_ij| * ||X_j||_2 of each output row, or of each group of a pattern
    (equation 1).

    Args:
        weight: `[out_features, in_features]`.
        statistics: `squared_norms` `[in_features]`, the sum of X_tj^2 over tokens, on any scale.
    """
    scores = weight.abs() * statistics["squared_norms"].sqrt()
    if pattern is not None:
        return Pruned(mask=smallest_in_groups(scores, *pattern))
    return Pruned(mask=smallest_in_rows(scores, zeros_in(sparsity, weight.shape[1])))
