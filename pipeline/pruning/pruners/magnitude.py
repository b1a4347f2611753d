"""Magnitude pruning."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.masks import smallest_to_target
from pipeline.specs import Magnitude


def pruner(options: Magnitude) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(prune_by_magnitude, (), "matrix")


def prune_by_magnitude(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    target: LayerTarget,
    options: Magnitude,
) -> Pruned:
    """Zero the smallest |W| of the whole matrix, or of each group of a pattern.

    Args:
        weight: `[out_features, in_features]`.
        statistics: none are used.
    """
    return Pruned(mask=smallest_to_target(weight.abs(), target, "matrix"))
