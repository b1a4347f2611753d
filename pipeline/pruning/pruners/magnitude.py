"""Magnitude pruning."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.pruning.allocation import check_target
from pipeline.pruning.pruners.masks import smallest, smallest_in_groups, zeros_in
from pipeline.pruning.pruners.pruned import Pruned
from pipeline.specs import Magnitude


def prune_by_magnitude(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    sparsity: float,
    pattern: tuple[int, int] | None,
    options: Magnitude,
) -> Pruned:
    """Zero the smallest |W| of the whole matrix, or of each group of a pattern.

    Args:
        weight: `[out_features, in_features]`.
        statistics: none are used.
    """
    check_target(sparsity, pattern)
    scores = weight.abs()
    if pattern is not None:
        return Pruned(mask=smallest_in_groups(scores, *pattern))
    return Pruned(mask=smallest(scores, zeros_in(sparsity, weight.numel())))
