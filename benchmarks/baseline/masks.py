"""Masks by sorting everything, and by a loop over groups of columns.

The counts are exact, floor(sparsity * n), and the first of equal scores are zeroed. Published code
zeroes all that is not above the threshold: one weight more, and all ties.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def zero_count(sparsity: float, count: int) -> int:
    """Return floor(sparsity * count), with the sparsity as the decimal that it is written as."""
    return math.floor(Fraction(str(sparsity)) * count)


def mask_in_matrix(scores: Tensor, zeros: int) -> Tensor:
    """Mark the `zeros` smallest scores of a whole matrix."""
    if zeros == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = torch.sort(flat).values[zeros - 1]
    mask = flat <= threshold
    surplus = int(mask.sum()) - zeros
    if surplus:
        mask[(flat == threshold).nonzero().flatten()[-surplus:]] = False
    return mask.view_as(scores)


def mask_in_rows(scores: Tensor, zeros: int) -> Tensor:
    """Mark the `zeros` smallest scores of each row."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    order = torch.sort(scores, dim=1, stable=True).indices
    return mask.scatter_(1, order[:, :zeros], True)


def mask_in_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """Mark all but the `kept` largest of every `group` adjacent scores of a row."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], group):
        found = torch.topk(scores[:, start : start + group], group - kept, dim=1, largest=False)
        mask.scatter_(1, start + found.indices, True)
    return mask
