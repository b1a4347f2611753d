"""Wanda (arXiv 2306.11695), written plainly."""

import torch
from torch import Tensor

from benchmarks.baseline.choice import Choice
from benchmarks.baseline.masks import smallest_in_groups, smallest_in_rows, zeros_in


class SquaredNorms:
    """The running mean over windows of sum_t X_tj^2, `[in_features]`."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.mean = torch.zeros(columns, device=device)
        self.windows = 0

    def update(self, inputs: Tensor) -> None:
        """Add a window `[tokens, in_features]`."""
        self.mean *= self.windows / (self.windows + 1)
        self.windows += 1
        self.mean += torch.linalg.vector_norm(inputs.float(), dim=0) ** 2 / self.windows


def choose(
    name: str,
    weight: Tensor,
    statistics: SquaredNorms,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> Choice:
    """The smallest |W_ij| ||X_j|| of each row of `[out_features, in_features]`, or of each group
    (equation 1)."""
    scores = weight.float().abs() * statistics.mean.sqrt()
    if pattern is not None:
        return Choice(smallest_in_groups(scores, *pattern), scores)
    return Choice(smallest_in_rows(scores, zeros_in(sparsity, weight.shape[1])), scores)
