"""SparseGPT: one-shot pruning by the optimal brain surgeon (arXiv 2301.00774)."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.models.matrices import is_finite, set_to_zero
from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.grids import nearest
from pipeline.pruning.pruners.masks import refuse_nan, smallest, smallest_in_columns, zeros_in
from pipeline.specs import SparseGPT

Made = TypeVar("Made")

DAMPING_RAISES = 5
"""How often the damping is raised tenfold before a Hessian counts as singular."""

INNER_COLUMNS = 32
"""Columns of a block that take the errors of earlier columns together, and their own one by one.
With a pattern these are its groups."""


def pruner(options: SparseGPT) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(prune_by_sparsegpt, ("hessian",), "matrix")


def prune_by_sparsegpt(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    target: LayerTarget,
    options: SparseGPT,
) -> Pruned:
    """Zero columns one after another, and let the later ones make up for it (algorithm 1).

    With U the upper Cholesky factor of the damped Hessian's inverse, the weights of a block of
    columns with the smallest W_ij^2 / U_jj^2 over all rows are zeroed, and each column's error
    E_j = (W_j - masked W_j) / U_jj is taken out of the later columns by W -= E_j U_j. In a pattern
    the choice is made in each group of a row, when its first column's turn comes.

    After each block floor(sparsity * n) of the n weights so far are zero, so the last block,
    however narrow, completes the matrix's count. Columns without any input score 0, so they go
    first; their weights beyond the count stay as they are.

    Args:
        weight: `[out_features, in_features]`.
        statistics: `hessian` `[in_features, in_features]`, X^T X on any scale.

    Returns:
        Facts: `dead_columns`, without any input; `damping`, the share that was added;
        `damping_raises`, how often it was raised tenfold.

    Raises:
        ValueError: if the Hessian cannot be inverted.
    """
    dead = statistics["hessian"].diagonal() == 0
    upper, facts = inverse_factor(statistics["hessian"], dead, options.damping)
    mask, updated = by_columns(weight.T, upper, dead, target, options.block_size)
    return Pruned(mask=mask, weight=updated, facts={"dead_columns": float(dead.sum()), **facts})


class ColumnGrid(NamedTuple):
    """To which numbers the weights of each column are rounded: see `grids.RoundingGrid`."""

    scale: Tensor
    """`[in_features, out_features]`."""

    zero: Tensor
    """`[in_features, out_features]`."""

    levels: int


def by_columns(
    columns: Tensor,
    upper: Tensor,
    dead: Tensor,
    target: LayerTarget,
    block_size: int,
    grid: ColumnGrid | None = None,
) -> tuple[Tensor, Tensor]:
    """Zero columns of a matrix one after another, and round what is left to a grid if there is one;
    let the later columns make up for it.

    Args:
        columns: the weight in the order of the columns, `[in_features, out_features]`.
        upper: `inverse_factor` of the Hessian in that order.
        dead: columns without any input, `[in_features]`.

    Returns:
        Mask and new weight, `[out_features, in_features]`, with columns in that order.
    """
    count, rows = columns.shape
    diagonal, scale = upper.diagonal()[:, None], score_scale(upper, dead)[:, None]
    remaining = columns.clone(memory_format=torch.contiguous_format)
    mask = torch.zeros_like(remaining, dtype=torch.bool)
    group, width, pattern = INNER_COLUMNS, block_size, target.pattern
    if pattern is not None:
        group = pattern.group
        width = max(group, width // group * group)  # cuts no group
    chosen = 0
    for start in range(0, count, width):
        end = min(start + width, count)
        block, block_mask = remaining[start:end], mask[start:end]
        scores = sparsegpt_scores(block, scale[start:end])
        if pattern is None:
            wanted = zeros_in(target.sparsity, rows * end) - chosen
            block_mask.copy_(smallest(scores.T, wanted).T)
            chosen += wanted
        errors = torch.zeros_like(block)
        lower = upper[start:end, start:end].T.contiguous()
        arrays = [
            _as_array(each)
            for each in (block, block_mask, scores, errors, scale[start:end], diagonal[start:end])
        ]
        triangle = _as_array(lower)
        for first in range(0, end - start, group):
            part = slice(first, first + group)
            if first:
                block[part].addmm_(lower[part, :first], errors[:first], alpha=-1)
            own, own_mask, own_scores, own_errors, own_scale, own_diagonal = (
                each[part] for each in arrays
            )
            if pattern is not None:
                own_scores[:] = sparsegpt_scores(own, own_scale)
                own_mask[:] = smallest_in_columns(own_scores, group - pattern.kept)
            if grid is None:
                own_errors[:] = own_mask / own_diagonal
                _take_errors(own, own_errors, triangle[part, part])
            else:
                places = slice(start + first, min(start + first + group, end))
                spacing = [_as_array(each[places]) for each in (grid.scale, grid.zero)]
                rounded = (own_mask, own_diagonal, *spacing, grid.levels)
                _round_columns(own, own_errors, triangle[part, part], *rounded)
        if pattern is not None:
            refuse_nan(scores)  # of all groups at once
        remaining[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    mask = mask.T.contiguous()
    updated = remaining.T.contiguous()
    set_to_zero(updated, mask)
    return mask, updated


def _as_array(values: Tensor) -> Any:
    """Return the same memory for numpy, which takes a third of torch's time for short operations;
    on any other device than a CPU, the tensor itself."""
    return values.numpy() if values.is_cpu else values


def _take_errors(columns: Any, errors: Any, lower: Any) -> None:
    """Take each column's error out of the later ones, in place.

    Args:
        columns: of the weight, `[columns, rows]`.
        errors: 1 / U_jj where a weight is masked, 0 elsewhere, of the same shape; becomes E_j.
        lower: U^T for these columns.
    """
    for place, (column, error) in enumerate(zip(columns, errors, strict=True)):
        if place:
            column -= lower[place, :place] @ errors[:place]
        error *= column


def _round_columns(
    columns: Any,
    errors: Any,
    lower: Any,
    mask: Any,
    diagonal: Any,
    scale: Any,
    zero: Any,
    levels: int,
) -> None:
    """Take each column's error out of the later ones and then round it, in place; masked weights
    become 0.

    Args:
        columns: of the weight, `[columns, rows]`.
        errors: of the same shape; becomes E_j.
        lower: U^T for these columns.
        mask: of the shape of `columns`, as `scale` and `zero` are.
        diagonal: U_jj, `[columns, 1]`.
    """
    for place, column in enumerate(columns):
        if place:
            column -= lower[place, :place] @ errors[:place]
        rounded = nearest(column, scale[place], zero[place], levels)
        rounded[mask[place]] = 0
        errors[place] = (column - rounded) / diagonal[place]
        column[:] = rounded


def score_scale(upper: Tensor, dead: Tensor) -> Tensor:
    """Return U_jj^2 of each column; infinite in dead columns, so that they score 0."""
    return upper.diagonal().square().masked_fill_(dead, math.inf)


def sparsegpt_scores(weight: Any, scale: Any) -> Any:
    """Return W_ij^2 / U_jj^2 of a tensor or an array that broadcasts with the scale."""
    return weight * weight / scale


def inverse_factor(
    hessian: Tensor, dead: Tensor, damping: float
) -> tuple[Tensor, dict[str, float]]:
    """Return the upper Cholesky factor of the inverse, and facts about the damping. Matrices that
    share one Hessian and come one after another share the factor, which must not be written to.

    Dead columns depend on no other, so their diagonal only has to be positive.
    """
    upper, facts = _factors.get(hessian, damping, lambda: _inverse_factor(hessian, dead, damping))
    return upper, dict(facts)


class OfLastHessian(Generic[Made]):
    """What was made of the last Hessian, while that lives and nobody writes to it."""

    def __init__(self) -> None:
        self._made = WeakTensorKeyDictionary()

    def get(self, hessian: Tensor, options: object, make: Callable[[], Made]) -> Made:
        """Return what was made with these options, or make it."""
        key = hessian._version, options
        if hessian not in self._made or self._made[hessian][0] != key:
            self._made.clear()  # what is made may be as large as the Hessian itself
            self._made[hessian] = key, make()
        made: Made = self._made[hessian][1]
        return made


_factors: OfLastHessian[tuple[Tensor, dict[str, float]]] = OfLastHessian()


def _inverse_factor(
    hessian: Tensor, dead: Tensor, damping: float
) -> tuple[Tensor, dict[str, float]]:
    mean = hessian.diagonal().mean()
    for raises in range(DAMPING_RAISES + 1):
        share = damping * 10**raises
        # From the last column to the first H = R R^T with R upper triangular, so R^-1 is the
        # factor of the inverse: half the work of inverting and factoring again.
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(share * mean).masked_fill_(dead.flip(0), 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper = torch.eye(len(lower), device=lower.device)
            torch.linalg.solve_triangular(lower.flip(0, 1), upper, upper=True, out=upper)
            if is_finite(upper):
                return upper, {"damping": share, "damping_raises": float(raises)}
    raise ValueError(
        f"the Hessian cannot be inverted, even with a damping of {share:g}: use more windows, "
        "or raise damping"
    )
