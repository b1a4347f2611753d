"""SparseGPT: one-shot pruning by the optimal brain surgeon (arXiv 2301.00774)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.pruners.masks import smallest, smallest_in_groups, zeros_in
from pipeline.pruners.pruned import Pruned
from pipeline.specs import SparseGPT

DAMPING_RAISES = 5
"""How often the damping is raised tenfold before a Hessian counts as not invertible."""

INNER_COLUMNS = 32
"""Columns of a block whose errors are taken out of each other one by one, and out of the block's
later ones together."""


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

    After each block floor(sparsity * n) of the n weights so far are zero, so the last block,
    however narrow, completes the matrix's count. Columns without any input score 0, so they go
    first; a weight there that is not needed for the count stays as it is.

    Args:
        weight: `[out_features, in_features]`.
        statistics: `hessian` `[in_features, in_features]`, X^T X on any scale.

    Returns:
        Facts: `dead_columns`, without any input; `damping`, the share that was added in the end;
        `damping_raises`, how often it was raised tenfold to get there.

    Raises:
        ValueError: if the Hessian cannot be inverted.
    """
    rows, columns = weight.shape
    dead = statistics["hessian"].diagonal() == 0
    upper, facts = inverse_factor(statistics["hessian"], dead, options.damping)
    diagonal = upper.diagonal()
    scale = diagonal.square()

    remaining = weight.T.clone(memory_format=torch.contiguous_format)  # [columns, rows]
    mask = torch.zeros_like(remaining, dtype=torch.bool)
    group = 1 if pattern is None else pattern[1]
    width = max(group, options.block_size // group * group)  # cuts no group
    inner_width = max(group, INNER_COLUMNS // group * group)
    chosen = 0
    for start in range(0, columns, width):
        end = min(start + width, columns)
        block = remaining[start:end]
        errors = torch.zeros_like(block)
        if pattern is None:
            wanted = zeros_in(sparsity, rows * end) - chosen
            scores = sparsegpt_scores(block.T, scale[start:end], dead[start:end])
            mask[start:end] = smallest(scores, wanted).T
            chosen += wanted
        for first in range(start, end, inner_width):  # few columns, which a CPU's cache holds
            last = min(first + inner_width, end)
            inner = remaining[first:last]
            inner_errors = errors[first - start : last - start]
            if pattern is None:
                inner_errors.copy_(mask[first:last]).div_(diagonal[first:last, None])
            # views are taken once: on small matrices they would cost more than the arithmetic
            taken = zip(inner, inner_errors, upper[first:last, first:last], strict=True)
            for place, (column, error, later) in enumerate(taken):
                if pattern is not None and place % group == 0:
                    part = slice(first + place, first + place + group)
                    scores = sparsegpt_scores(remaining[part].T, scale[part], dead[part])
                    mask[part] = smallest_in_groups(scores, *pattern).T
                    chosen_errors = inner_errors[place : place + group]
                    chosen_errors.copy_(mask[part]).div_(diagonal[part, None])
                error.mul_(column)  # it was 1 / U_jj where masked, and 0 elsewhere
                inner[place + 1 :].addr_(later[place + 1 :], error, alpha=-1)
            remaining[last:end].addmm_(upper[first:last, last:end].T, inner_errors, alpha=-1)
        remaining[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    mask = mask.T.contiguous()
    updated = remaining.T.contiguous().masked_fill_(mask, 0.0)
    return Pruned(mask=mask, weight=updated, facts={"dead_columns": float(dead.sum()), **facts})


def sparsegpt_scores(weight: Tensor, scale: Tensor, dead: Tensor) -> Tensor:
    """W_ij^2 / U_jj^2 of a weight `[rows, columns]` with scale U_jj^2; 0 in dead columns."""
    return (weight.square() / scale).masked_fill_(dead, 0.0)


def inverse_factor(
    hessian: Tensor, dead: Tensor, damping: float
) -> tuple[Tensor, dict[str, float]]:
    """Upper Cholesky factor of the inverse, and the damping that it took; for matrices that share
    one tensor and come one after another it is computed once, and must not be written to.

    Dead columns are tied to no other, so what stands on their diagonal only has to be positive.
    """
    key = hessian._version, damping
    if hessian not in _latest or _latest[hessian][0] != key:
        _latest.clear()  # one factor is as large as the Hessian itself
        _latest[hessian] = key, _inverse_factor(hessian, dead, damping)
    upper, facts = _latest[hessian][1]
    return upper, dict(facts)


_latest = WeakTensorKeyDictionary()
"""The last Hessian, while it lives: its version and damping, and what came of it."""


def _inverse_factor(
    hessian: Tensor, dead: Tensor, damping: float
) -> tuple[Tensor, dict[str, float]]:
    mean = hessian.diagonal().mean()
    for raises in range(DAMPING_RAISES + 1):
        share = damping * 10**raises
        damped = hessian.clone()
        damped.diagonal().add_(share * mean).masked_fill_(dead, 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper, {"damping": share, "damping_raises": float(raises)}
    raise ValueError(
        f"the Hessian cannot be inverted, even with a damping of {share:g}: use more windows, "
        "or raise damping"
    )
