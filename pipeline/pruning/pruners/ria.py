"""RIA: relative importance and activations, with a permutation of the columns for patterns.

Source: Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models, ICLR 2024.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.masks import smallest_in_groups, smallest_to_target
from pipeline.pruning.pruners.permutation import channel_permutation
from pipeline.specs import RIA


def pruner(options: RIA) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(prune_by_ria, ("squared_norms",), "matrix")


def prune_by_ria(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    target: LayerTarget,
    options: RIA,
) -> Pruned:
    """Zero the smallest (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a of the whole
    matrix, or of each group of a pattern (equations 3 and 4).

    Args:
        weight: `[out_features, in_features]`.
        statistics: `squared_norms` `[in_features]`, the sum of X_tj^2 over tokens, on any scale.

    Returns:
        With a permutation, facts: `retained_score`, the sum of the kept scores over the sum that
        the columns' own order keeps; 1 where no better order was found.
    """
    scores = ria_scores(weight, statistics["squared_norms"], options.activation_power)
    if target.pattern is None or not options.permutation:
        return Pruned(mask=smallest_to_target(scores, target, "matrix"))
    permutation, gain = channel_permutation(scores, *target.pattern)
    mask = torch.empty_like(scores, dtype=torch.bool)
    mask[:, permutation] = smallest_in_groups(scores[:, permutation], *target.pattern)
    return Pruned(mask=mask, permutation=permutation, facts={"retained_score": gain})


def ria_scores(weight: Tensor, squared_norms: Tensor, activation_power: float) -> Tensor:
    """Return the relative importance with activations, `[out_features, in_features]`."""
    sizes = weight.abs()
    smallest_sum = torch.finfo(sizes.dtype).tiny  # for a row or column of zeros
    in_column = sizes / sizes.sum(dim=0, keepdim=True).clamp_(min=smallest_sum)
    in_row = sizes / sizes.sum(dim=1, keepdim=True).clamp_(min=smallest_sum)
    return (in_column + in_row) * squared_norms.pow(activation_power / 2)
