"""Magnitude pruning, written plainly."""

from torch import Tensor

from benchmarks.baseline.choice import PlainChoice
from benchmarks.baseline.masks import mask_in_groups, mask_in_matrix, zero_count


def choose_by_magnitude(
    name: str,
    weight: Tensor,
    statistics: None,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> PlainChoice:
    """Choose the smallest |W| of the matrix `[out_features, in_features]`, or of each group."""
    scores = weight.float().abs()
    if pattern is not None:
        return PlainChoice(mask_in_groups(scores, *pattern), scores)
    return PlainChoice(mask_in_matrix(scores, zero_count(sparsity, weight.numel())), scores)
