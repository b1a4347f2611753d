"""Choosing what to zero: exact counts, and of equal scores the first ones.

A mask is a boolean tensor of its weight's shape, True where the weight is set to zero. On a CPU
numpy's vectorised partition and comparisons are several times as fast as torch's.
"""

import math

import numpy as np
import torch
from torch import Tensor

_ROUNDING = 1e-12
"""Sparsities are decimal: 0.29 * 100 must be 29, not 28.999..., and no other product may change."""

_CACHED = 2**16
"""Scores that are ranked at a time on a CPU, so that they stay in its cache."""

_NAN = "a score is NaN: the weight or its statistics are not finite"


def zeros_in(sparsity: float, count: int) -> int:
    """floor(sparsity * count): how many of `count` weights are set to zero."""
    return math.floor(sparsity * count * (1 + _ROUNDING))


def smallest(scores: Tensor, zeros: int) -> Tensor:
    """The `zeros` smallest scores of a whole matrix `[rows, columns]`.

    Raises:
        ValueError: if a score is NaN.
    """
    return smallest_in_rows(scores.reshape(1, -1), zeros).view(scores.shape)


def smallest_in_rows(scores: Tensor, zeros: int) -> Tensor:
    """The `zeros` smallest scores of each row of `[rows, columns]`.

    Raises:
        ValueError: if a score is NaN.
    """
    refuse_nan(scores)
    if zeros == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    thresholds = _kth_smallest(scores, zeros)
    mask = scores <= thresholds
    ambiguous = (mask.sum(dim=1) > zeros).nonzero().flatten()
    if len(ambiguous):
        rows, limits = scores[ambiguous], thresholds[ambiguous]
        below, ties = rows < limits, rows == limits
        wanted = zeros - below.sum(dim=1, keepdim=True)
        mask[ambiguous] = below | (ties & (ties.cumsum(dim=1) <= wanted))
    return mask


def smallest_in_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """All but the `kept` largest of every `group` adjacent scores of a row.

    Raises:
        ValueError: if a score is NaN, or the columns are no multiple of `group`.
    """
    columns = scores.shape[1]
    if columns % group:
        raise ValueError(f"{columns} columns are no multiple of the pattern's {group}")
    grouped = scores.reshape(-1, group)
    if scores.is_cpu:
        mask = torch.from_numpy(_smallest_of_few(grouped.numpy(), group - kept))
    else:
        mask = smallest_in_rows(grouped, group - kept)
    return mask.view(scores.shape)


def refuse_nan(scores: Tensor) -> None:
    """Raises:
    ValueError: if a score is NaN.
    """
    if bool(scores.sum().isnan()):  # no score is -inf, so one of them is NaN
        raise ValueError(_NAN)


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest score of each row, `[rows, 1]`."""
    if scores.is_cpu:
        return torch.from_numpy(np.partition(scores.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return scores.kthvalue(k, dim=1, keepdim=True).values


def _smallest_of_few(
    scores: np.ndarray[tuple[int, int], np.dtype[np.float32]], zeros: int
) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """The `zeros` smallest of each short row: a score's rank is how many stand before it."""
    group = scores.shape[1]
    mask = np.empty(scores.shape, dtype=np.bool_)
    step = max(1, _CACHED // group)
    rank_type = np.min_scalar_type(-group)
    for start in range(0, len(scores), step):
        part = np.ascontiguousarray(scores[start : start + step].T)  # [group, rows]
        if np.isnan(part.max(initial=0.0)):  # here, where the part is in the cache
            raise ValueError(_NAN)
        ranks = np.zeros(part.shape, dtype=rank_type)
        for place in range(1, group):
            before = (part[:place] <= part[place]).view(np.int8)  # of equal ones the first
            ranks[place] += np.add.reduce(before, axis=0, dtype=rank_type)
            ranks[:place] -= before
        for place in range(group):
            limit = zeros - (group - 1 - place)
            np.less(ranks[place], limit, out=mask[start : start + step, place])
    return mask
