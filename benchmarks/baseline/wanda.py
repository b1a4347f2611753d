"""Wanda (arXiv 2306.11695), written plainly."""

import torch
from torch import Tensor

from benchmarks.baseline.choice import PlainChoice
from benchmarks.baseline.masks import mask_in_groups, mask_in_rows, zero_count


class PlainSquaredNorms:
    """The running mean over windows of sum_t X_tj^2, `[in_features]`."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.mean = torch.zeros(columns, device=device)
        self.windows = 0

    def update(self, inputs: Tensor) -> None:
        """Add a window `[tokens, in_features]`."""
        self.mean *= self.windows / (self.windows + 1)
        self.windows += 1
        self.mean += torch.linalg.vector_norm(inputs.float(), dim=0) ** 2 / self.windows


def choose_by_wanda(
    name: str,
    weight: Tensor,
    statistics: PlainSquaredNorms,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> PlainChoice:
    """Choose the smallest |W_ij| ||X_j|| of each row of `[out_features, in_features]`, or of each
    group (equation 1)."""
    scores = weight.float().abs() * statistics.mean.sqrt()
    if pattern is not None:
        return PlainChoice(mask_in_groups(scores, *pattern), scores)
    return PlainChoice(mask_in_rows(scores, zero_count(sparsity, weight.shape[1])), scores)
