"""SparseGPT: one-shot pruning by the optimal brain surgeon (arXiv 2301.00774)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.pruners.masks import smallest, smallest_in_groups, zeros_in
from pipeline.pruners.pruned import Pruned
from pipeline.specs import SparseGPT

DAMPING_TRIES = 5
"""How often the damping is raised tenfold before a Hessian counts as not invertible."""


def prune_by_sparsegpt(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    sparsity: float,
    pattern: tuple[int, int] | None,
    options: SparseGPT,
) -> Pruned:
    """Zero columns one after another, and let the later ones make up for it (algorithm 1).

    With U the upper Cholesky factor of the damped Hessian's inverse, the weights of a block of
    columns with the smallest W_ij^2 / U_jj^2 over all rows are zeroed, and each column's error
    E_j = (W_j - masked W_j) / U_jj is taken out of the later columns by W -= E_j U_j. In a pattern
    the choice is made in each group of a row, when its first column's turn comes.

    Columns without any input score 0, so they go first; a weight there that is not needed for the
    sparsity stays as it is.

    Args:
        weight: `[out_features, in_features]`.
        statistics: `hessian` `[in_features, in_features]`, X^T X on any scale.

    Raises:
        ValueError: if the Hessian cannot be inverted.
    """
    rows, columns = weight.shape
    hessian = statistics["hessian"].clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    upper, damping = _inverse_factor(hessian, options.damping)
    scale = upper.diagonal().square()

    weight = weight.clone()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    width = options.block_size if pattern is None else _whole_groups(options.block_size, pattern[1])
    zeros = 0
    for start in range(0, columns, width):
        end = min(start + width, columns)
        block = weight[:, start:end].clone()  # [rows, width]
        errors = torch.zeros_like(block)
        if pattern is None:
            wanted = zeros_in(sparsity, rows * end) - zeros
            mask[:, start:end] = smallest(_scores(block, scale[start:end], dead[start:end]), wanted)
            zeros += wanted
        for column in range(start, end):
            place = column - start
            if pattern is not None and column % pattern[1] == 0:
                group = slice(column, column + pattern[1])
                candidates = block[:, place : place + pattern[1]]
                scores = _scores(candidates, scale[group], dead[group])
                mask[:, group] = smallest_in_groups(scores, *pattern)
            old = block[:, place].clone()
            new = old.masked_fill(mask[:, column], 0.0)
            errors[:, place] = (old - new) / upper[column, column]
            block[:, place:] -= torch.outer(errors[:, place], upper[column, column:end])
            block[:, place] = new
        weight[:, start:end] = block
        weight[:, end:] -= errors @ upper[start:end, end:]
    facts = {"dead_columns": float(dead.sum()), "damping": damping}
    return Pruned(mask=mask, weight=weight.masked_fill_(mask, 0.0), facts=facts)


def _scores(weight: Tensor, scale: Tensor, dead: Tensor) -> Tensor:
    return (weight.square() / scale).masked_fill_(dead, 0.0)


def _whole_groups(block_size: int, group: int) -> int:
    """The largest width up to the block size, but one group at least, that cuts no group."""
    return max(group, block_size // group * group)


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse, and the damping that it took."""
    mean = hessian.diagonal().mean()
    for raised in range(DAMPING_TRIES + 1):
        share = damping * 10**raised
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper, share
    raise ValueError(
        f"the Hessian cannot be inverted, even with a damping of {share:g}: use more windows, "
        "or raise damping"
    )
