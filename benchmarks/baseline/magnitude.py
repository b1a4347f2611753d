"""Magnitude pruning, written plainly."""

from torch import Tensor

from benchmarks.baseline.choice import Choice
from benchmarks.baseline.masks import smallest, smallest_in_groups, zeros_in


def choose(
    name: str,
    weight: Tensor,
    statistics: None,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> Choice:
    """The smallest |W| of the matrix `[out_features, in_features]`, or of each group of a row."""
    scores = weight.float().abs()
    if pattern is not None:
        return Choice(smallest_in_groups(scores, *pattern), scores)
    return Choice(smallest(scores, zeros_in(sparsity, weight.numel())), scores)
