"""Masks by sorting everything, and by a loop over groups of columns.

The counts are exact, floor(sparsity * n), and of equal scores the first are zeroed; published code
zeroes whatever is not above the threshold, which is one weight more and all ties.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def zeros_in(sparsity: float, count: int) -> int:
    """floor(sparsity * count), the sparsity being the decimal that it is written as."""
    return math.floor(Fraction(str(sparsity)) * count)


def smallest(scores: Tensor, zeros: int) -> Tensor:
    """The `zeros` smallest of a whole matrix."""
    if zeros == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = torch.sort(flat).values[zeros - 1]
    mask = flat <= threshold
    surplus = int(mask.sum()) - zeros
    if surplus:
        mask[(flat == threshold).nonzero().flatten()[-surplus:]] = False
    return mask.view_as(scores)


def smallest_in_rows(scores: Tensor, zeros: int) -> Tensor:
    """The `zeros` smallest of each row."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    order = torch.sort(scores, dim=1, stable=True).indices
    return mask.scatter_(1, order[:, :zeros], True)


def smallest_in_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """All but the `kept` largest of every `group` adjacent scores of a row."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], group):
        found = torch.topk(scores[:, start : start + group], group - kept, dim=1, largest=False)
        mask.scatter_(1, start + found.indices, True)
    return mask
