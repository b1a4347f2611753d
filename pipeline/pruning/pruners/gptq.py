"""GPTQ: rounding column by column, the later columns making up for it (arXiv 2210.17323)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.grids import grid_of
from pipeline.pruning.pruners.sparsegpt import (
    ColumnGrid,
    OfLastHessian,
    by_columns,
    inverse_factor,
)
from pipeline.specs import GPTQ


def pruner(options: GPTQ) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(quantize_by_gptq, ("hessian",), "matrix")


def quantize_by_gptq(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    target: LayerTarget,
    options: GPTQ,
) -> Pruned:
    """Round the columns one after another, and let the later ones make up for it (algorithm 1).

    With U the upper Cholesky factor of the damped Hessian's inverse, each column's error
    E_j = (W_j - rounded W_j) / U_jj is taken out of the later columns by W -= E_j U_j. The grid of
    a group spans its weights as they were before the first column. Where the target has a sparsity,
    SparseGPT's mask is chosen block by block and masked weights are rounded to 0.

    Args:
        weight: `[out_features, in_features]`.
        statistics: `hessian` `[in_features, in_features]`, X^T X on any scale.

    Returns:
        Facts: as of SparseGPT.

    Raises:
        ValueError: if the Hessian cannot be inverted.
    """
    hessian, order = statistics["hessian"], None
    if options.act_order:
        hessian, order = _by_input(hessian)
    dead = hessian.diagonal() == 0
    upper, facts = inverse_factor(hessian, dead, options.damping)
    grid = grid_of(weight, options)
    columns, places = weight.T, torch.arange(weight.shape[1], device=weight.device)
    if order is not None:
        columns, places = columns[order], order
    in_order = ColumnGrid(*grid.of_columns(places), grid.levels)
    mask, rounded = by_columns(columns, upper, dead, target, options.block_size, in_order)
    if order is not None:
        back = order.argsort()
        mask, rounded = mask[:, back], rounded[:, back]
    return Pruned(mask=mask, weight=rounded, facts={"dead_columns": float(dead.sum()), **facts})


def _by_input(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Hessian with the largest inputs first, and the order of its columns. Matrices that
    share a Hessian share both."""

    def ordered() -> tuple[Tensor, Tensor]:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        return hessian[order][:, order], order

    return _ordered.get(hessian, None, ordered)


_ordered: OfLastHessian[tuple[Tensor, Tensor]] = OfLastHessian()
