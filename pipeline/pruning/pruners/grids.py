"""The numbers to which a quantizer rounds the weights of a matrix."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.specs.pruners import Quantizer


class RoundingError(RuntimeError):
    """A group of weights has more values than its bits allow."""


@dataclass(frozen=True)
class RoundingGrid:
    """Evenly spaced numbers for each group of each row: (k - zero) * scale for k from 0 to
    `levels` - 1."""

    scale: Tensor
    """`[groups, out_features]`, positive."""

    zero: Tensor
    """Which k stands for 0, `[groups, out_features]`: a whole number."""

    levels: int
    group_size: int

    def of_columns(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero of columns, `[columns, out_features]`.

        Args:
            columns: their places in the matrix.
        """
        groups = columns // self.group_size
        return self.scale[groups], self.zero[groups]

    def nearest(self, weight: Tensor) -> Tensor:
        """Round a weight `[out_features, in_features]` to the nearest numbers of the grid."""
        columns = torch.arange(weight.shape[1], device=weight.device)
        scale, zero = self.of_columns(columns)
        rounded: Tensor = nearest(weight.T, scale, zero, self.levels)
        return rounded.T.contiguous()


def nearest(values: Any, scale: Any, zero: Any, levels: int) -> Any:
    """Round a tensor or an array to the nearest (k - zero) * scale with 0 <= k < levels, halves to
    even k."""
    number = ((values / scale).round() + zero).clip(0, levels - 1)
    return (number - zero) * scale


def grid_of(weight: Tensor, options: Quantizer) -> RoundingGrid:
    """Return the grid that spans the weights of each group.

    A symmetric grid has the largest |W| of a group half a step beyond its last number on the
    positive side, as GPTQ's code and compressed-tensors have it: the scale is
    2 max|W| / (levels - 1). The other spans from min(W, 0) to max(W, 0), so that 0 is one of its
    numbers.

    Args:
        weight: `[out_features, in_features]`.
    """
    levels = 2**options.bits
    parts = torch.split(weight.T, options.group_size)
    low = torch.stack([part.amin(dim=0) for part in parts]).clamp_(max=0)
    high = torch.stack([part.amax(dim=0) for part in parts]).clamp_(min=0)
    if options.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = (high - low) / (levels - 1)
    scale.masked_fill_(scale == 0, 1.0)  # a group of zeros
    zero = torch.full_like(scale, levels / 2) if options.symmetric else (-low / scale).round_()
    return RoundingGrid(scale, zero, levels, options.group_size)


def check_rounded(name: str, weight: Tensor, options: Quantizer) -> None:
    """Check that no group of a weight `[out_features, in_features]` has more than 2^bits values.

    Raises:
        RoundingError: with the matrix's name and the largest number of values.
    """
    for part in torch.split(weight, options.group_size, dim=1):
        values = 1 + (part.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1)
        if values.max() > 2**options.bits:
            raise RoundingError(
                f"{name}: {int(values.max())} values in a group of {options.group_size}, at most "
                f"{2**options.bits} are allowed with {options.bits} bits"
            )
