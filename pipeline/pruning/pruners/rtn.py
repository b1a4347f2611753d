"""Rounding every weight to the nearest number of its group's grid."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.grids import grid_of
from pipeline.specs import RTN


def pruner(options: RTN) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(round_to_nearest, (), None)


def round_to_nearest(
    weight: Tensor, statistics: Mapping[str, Tensor], target: LayerTarget, options: RTN
) -> Pruned:
    """Round each weight; none is pruned.

    Args:
        weight: `[out_features, in_features]`.
    """
    none = torch.zeros_like(weight, dtype=torch.bool)
    return Pruned(mask=none, weight=grid_of(weight, options).nearest(weight))
