"""AWQ: rounding to nearest after scaling the inputs that matter (arXiv 2306.00978)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.grids import grid_of
from pipeline.pruning.pruners.masks import refuse_infinite
from pipeline.specs import AWQ


def pruner(options: AWQ) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(quantize_by_awq, ("hessian",), None)


def quantize_by_awq(
    weight: Tensor, statistics: Mapping[str, Tensor], target: LayerTarget, options: AWQ
) -> Pruned:
    """Round W diag(s) to nearest and scale it back, with s_j = x_j^p of the power p whose rounding
    changes the outputs least (equations 4 and 5).

    The squared change of the outputs over all calibration tokens is tr(D H D^T), where D is the
    change of the weight. x_j is the root mean square of input j, where the paper has its mean
    magnitude. A power of 0, plain rounding, is among those tried.

    Args:
        weight: `[out_features, in_features]`.
        statistics: `hessian` `[in_features, in_features]`, X^T X on any scale.

    Returns:
        Facts: `power`, which was chosen; `error_share`, the squared change of the outputs as a
        share of plain rounding's.

    Raises:
        ValueError: if the Hessian is not finite.
    """
    hessian = statistics["hessian"]
    refuse_infinite(hessian)
    size = hessian.diagonal().sqrt()
    size = torch.where(size > 0, size, 1.0)  # nothing comes in, so any scale will do
    best, least, power, plain = weight, torch.inf, 0.0, 0.0
    for step in range(options.steps):
        scale = size ** (step / options.steps)
        scaled = weight * scale
        rounded = grid_of(scaled, options).nearest(scaled) / scale
        change = rounded - weight
        error = float(torch.einsum("oi,oi->", change @ hessian, change))
        if step == 0:
            plain = error
        if error < least:
            best, least, power = rounded, error, step / options.steps
    share = least / plain if plain else 1.0
    none = torch.zeros_like(weight, dtype=torch.bool)
    return Pruned(mask=none, weight=best, facts={"power": power, "error_share": share})
