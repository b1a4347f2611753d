"""Masks of the smallest scores: exact counts, and of equal scores the first ones.

A mask is a boolean tensor of its weight's shape, True where the weight is set to zero. On a CPU
numpy's vectorised partition and comparisons are several times as fast as torch's.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.models.matrices import is_finite
from pipeline.pruning.allocation import LayerTarget

_ROUNDING = 1e-12
"""Sparsities are decimal: 0.29 * 100 must be 29, not 28.999..., and no other product may change."""

_CACHED = 2**16
"""Scores that are ranked at a time on a CPU, which stay in its cache."""

_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
"""By the size of a group, the word that has a byte for each of its scores, the first one lowest."""

MOST_RANKED = 8
"""Rows up to which each is compared with each."""

_NAN = "a score is NaN: the weight or its statistics are not finite"


def zeros_in(sparsity: float, count: int) -> int:
    """Return floor(sparsity * count): how many of `count` weights are set to zero.

    Raises:
        ValueError: if the sparsity is not in [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity {sparsity} is no share of zeros, 0 to 1")
    return math.floor(sparsity * count * (1 + _ROUNDING))


def smallest_to_target(
    scores: Tensor, target: LayerTarget, counted_per: Literal["matrix", "row"]
) -> Tensor:
    """Choose the smallest of the scores `[rows, columns]`: of each group of the target's pattern,
    or, without one, of the matrix or of each row.

    Raises:
        ValueError: if a score is NaN, or the columns are no multiple of the pattern's group.
    """
    if target.pattern is not None:
        return smallest_in_groups(scores, *target.pattern)
    if counted_per == "row":
        return smallest_in_rows(scores, zeros_in(target.sparsity, scores.shape[1]))
    return smallest(scores, zeros_in(target.sparsity, scores.numel()))


def smallest(scores: Tensor, zeros: int) -> Tensor:
    """Choose the `zeros` smallest scores of a whole matrix `[rows, columns]`.

    Raises:
        ValueError: if a score is NaN, or the matrix has fewer scores.
    """
    return smallest_in_rows(scores.reshape(1, -1), zeros).view(scores.shape)


def smallest_in_rows(scores: Tensor, zeros: int) -> Tensor:
    """Choose the `zeros` smallest scores of each row of `[rows, columns]`.

    Raises:
        ValueError: if a score is NaN, or a row has fewer scores.
    """
    if not 0 <= zeros <= scores.shape[1]:
        raise ValueError(f"{zeros} zeros of {scores.shape[1]} scores: take 0 to all of them")
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
    """Choose all but the `kept` largest of every `group` adjacent scores of a row.

    Raises:
        ValueError: if a score is NaN, the columns are no multiple of `group`, or `kept` exceeds it.
    """
    columns = scores.shape[1]
    if not 0 <= kept <= group or group < 1:
        raise ValueError(f"pattern {kept}:{group} keeps {kept} of {group}: take 0 to all of them")
    if columns % group:
        raise ValueError(f"{columns} columns are no multiple of the pattern's {group}")
    if scores.is_cpu and group in _WORDS:
        mask = torch.from_numpy(_smallest_of_few(scores.flatten().numpy(), group - kept, group))
    else:
        mask = smallest_in_rows(scores.reshape(-1, group), group - kept)
    return mask.view(scores.shape)


def smallest_in_columns(scores: Any, zeros: int) -> Any:
    """Choose the `zeros` smallest scores of each column of a tensor or an array `[few, columns]`.

    In an array of few rows the rank of a score is the number of scores before it: whole rows are
    compared. NaN is not looked for there; `refuse_nan` can check many arrays at once.
    """
    few = len(scores)
    if isinstance(scores, Tensor):
        return smallest_in_rows(scores.T, zeros).T
    if few > MOST_RANKED:
        return smallest_in_columns(torch.from_numpy(scores), zeros).numpy()
    ranks = np.empty(scores.shape, dtype=np.int8)
    ranks[:] = np.arange(few - 1, -1, -1, dtype=np.int8)[:, None]  # all of the later ones
    for distance in range(1, few):
        # of equal scores the first stands before the other
        before = (scores[:-distance] <= scores[distance:]).view(np.int8)
        ranks[distance:] += before
        ranks[:-distance] -= before
    return ranks < zeros


def refuse_nan(scores: Tensor) -> None:
    """Raise ValueError if a score is NaN."""
    if bool(scores.sum().isnan()):  # no score is -inf, so one of them is NaN
        raise ValueError(_NAN)


def refuse_infinite(hessian: Tensor) -> None:
    """Raise ValueError if a Hessian has NaN or infinite values."""
    if not is_finite(hessian):
        raise ValueError("the Hessian has NaN or infinite values")


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest score of each row, `[rows, 1]`."""
    if scores.is_cpu:
        return torch.from_numpy(np.partition(scores.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return scores.kthvalue(k, dim=1, keepdim=True).values


def _smallest_of_few(
    scores: np.ndarray[tuple[int], np.dtype[np.float32]], zeros: int, group: int
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Choose the `zeros` smallest of each group by their ranks, the number of scores before each: a
    byte for each score, a word for each group.

    All neighbours at a distance are compared, across groups too, and each word takes only those
    inside its group: contiguous memory is faster than fewer comparisons.
    """
    word = _WORDS[group]
    mask = np.empty(len(scores), dtype=np.bool_)
    later = int.from_bytes(reversed(range(group)), "little")
    ones = int.from_bytes([1] * group, "little")
    step = _CACHED // group * group
    for start in range(0, len(scores), step):
        part = scores[start : start + step]
        if np.isnan(part.max(initial=0.0)):  # here, where the part is in the cache
            raise ValueError(_NAN)
        ranks = np.full(len(part) // group, later, dtype=word)
        first = np.zeros(len(part), dtype=np.bool_)
        for distance in range(1, group):
            # of equal scores the first stands before the other
            np.less_equal(part[:-distance], part[distance:], out=first[:-distance])
            before = first.view(word) & word(ones >> 8 * distance)
            ranks -= before
            ranks += before << word(8 * distance)
        np.less(ranks.view(np.uint8), zeros, out=mask[start : start + step])
    return mask
