"""Choosing what to zero: exact counts, and of equal scores the first ones.

A mask is a boolean tensor of its weight's shape, True where the weight is set to zero.
"""

import math

import torch
from torch import Tensor

_ROUNDING = 1e-12
"""Sparsities are decimal: 0.29 * 100 must be 29, not 28.999..., and no other product may change."""


def zeros_in(sparsity: float, count: int) -> int:
    """floor(sparsity * count): how many of `count` weights are set to zero."""
    return math.floor(sparsity * count * (1 + _ROUNDING))


def smallest(scores: Tensor, zeros: int) -> Tensor:
    """The `zeros` smallest scores of a whole matrix `[rows, columns]`, which may hold no NaN."""
    if zeros == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(zeros).values  # a quarter of the time of a stable sort
    mask = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[: zeros - int(mask.sum())]] = True
    return mask.view(scores.shape)


def smallest_in_rows(scores: Tensor, zeros: int) -> Tensor:
    """The `zeros` smallest scores of each row of `[rows, columns]`."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.argsort(dim=1, stable=True)[:, :zeros], True)


def smallest_in_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """All but the `kept` largest of every `group` adjacent scores of a row.

    Raises:
        ValueError: if the columns are no multiple of `group`.
    """
    rows, columns = scores.shape
    if columns % group:
        raise ValueError(f"{columns} columns are no multiple of the pattern's {group}")
    grouped = scores.reshape(rows * columns // group, group)
    return smallest_in_rows(grouped, group - kept).view(rows, columns)
