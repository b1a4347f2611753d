"""Wanda++: Wanda's score with gradients of the decoder layer's output (arXiv 2503.04992)."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.gradients import GRADIENT_SQUARES
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.masks import smallest_to_target
from pipeline.specs import WandaPlusPlus


def pruner(options: WandaPlusPlus) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(prune_by_wandapp, ("squared_norms", GRADIENT_SQUARES), "row")


def prune_by_wandapp(
    weight: Tensor, statistics: Mapping[str, Tensor], target: LayerTarget, options: WandaPlusPlus
) -> Pruned:
    """Zero the smallest (alpha G_ij + ||X_j||_2) |W_ij| of each output row, or of each group of a
    pattern (equation 4), with G_ij the root mean square over windows of the gradient of the
    layer's output norm.

    Args:
        weight: `[out_features, in_features]`.
        statistics: `squared_norms` `[in_features]`, the sum of X_tj^2 over tokens;
            `gradient_squares` `[out_features, in_features]`.
    """
    gradients = statistics[GRADIENT_SQUARES].sqrt()
    scores = weight.abs() * (options.alpha * gradients + statistics["squared_norms"].sqrt())
    return Pruned(mask=smallest_to_target(scores, target, "row"))
