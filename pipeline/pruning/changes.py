"""A pruned matrix on its way from one process to another."""

import numpy as np
import torch
from torch import Tensor

from pipeline.models.layer_files import packed, unpacked
from pipeline.models.matrices import set_to_zero

Change = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""Of a pruner that only chooses what to zero: its mask, one bit a weight. Of any other: the bytes
of the weights."""


def change_of(weight: Tensor, mask: Tensor, masks: bool) -> Change:
    """Return what became of a weight `[out_features, in_features]`.

    Args:
        mask: of the same shape, True where it was set to zero.
        masks: whether the pruner only chooses what to zero.
    """
    if masks:
        return packed(mask)
    values = weight.contiguous().cpu().flatten().view(torch.uint8)
    return np.asarray(values)


def zeros_of(weight: Tensor) -> Tensor:
    """Return a mask that gives this weight again from the one before pruning; -0.0 was there."""
    return (weight == 0) & ~weight.signbit()


def apply_change(weight: Tensor, change: Change, masks: bool) -> Tensor:
    """Make the same change to another process's weight, in place; return the mask."""
    if masks:
        mask = unpacked(torch.tensor(change), weight.shape).to(weight.device)
        set_to_zero(weight, mask)
        return mask
    weight.copy_(torch.tensor(change).view(weight.dtype).view(weight.shape))
    return zeros_of(weight)
