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
    """`[groups, out_features]`, positive, with the eight significant bits of bfloat16: a type of
    any model holds it, so the integers and scales of a packed checkpoint are these weights."""

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
    """Return the grid that spans the weights of each group, its scale rounded up to eight bits.

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
    scale = _rounded_up((high - low) / (levels - 1))
    scale.masked_fill_(scale == 0, 1.0)  # a group of zeros
    if options.symmetric:
        zero = torch.full_like(scale, levels / 2)
    else:
        zero = (-low / scale).round_().clamp_(0, levels - 1)
    return RoundingGrid(scale, zero, levels, options.group_size)


def _rounded_up(scale: Tensor) -> Tensor:
    """Round positive numbers up to eight significant bits, so that no weight is beyond the grid."""
    nearest_one = scale.bfloat16()
    above = torch.nextafter(nearest_one, torch.full_like(nearest_one, torch.inf))
    return torch.where(nearest_one.float() < scale, above, nearest_one).float()


def whole_numbers(name: str, weight: Tensor, options: Quantizer) -> tuple[Tensor, Tensor]:
    """Return rounded weights as whole numbers times the scales of their groups.

    The product in the weight's type is the weight, to the bit. Where several scales are possible,
    the smallest is taken; the one that it was rounded to is among them.

    Args:
        name: of the matrix.
        weight: `[out_features, in_features]`; rounded to a symmetric grid, and the inputs are a
            multiple of the group size.

    Returns:
        Numbers from -2^(bits - 1) to 2^(bits - 1) - 1, int8 `[out_features, in_features]`, and
        scales `[out_features, groups]` in the weight's type.

    Raises:
        RoundingError: if a group is no such product.
    """
    half = 2 ** (options.bits - 1)
    groups = weight.reshape(-1, options.group_size)
    largest = groups.abs().amax(dim=1).float()
    numbers = torch.zeros_like(groups, dtype=torch.int8)
    scales = torch.ones_like(largest, dtype=weight.dtype)
    left = largest.nonzero()[:, 0]
    for number in range(half, 0, -1):
        nearby = (largest[left] / number).bfloat16()
        for neighbour in (None, torch.inf, 0.0):  # since the product was rounded as well
            scale = nearby
            if neighbour is not None:
                scale = torch.nextafter(nearby, torch.full_like(nearby, neighbour))
            scale = scale.to(weight.dtype)
            own = groups[left]
            found = (own.float() / scale[:, None].float()).round()
            product = (found * scale[:, None].float()).to(weight.dtype)
            right = (product == own).all(dim=1) & (found < half).all(dim=1)
            numbers[left[right]] = found[right].to(torch.int8)
            scales[left[right]] = scale[right]
            left, nearby = left[~right], nearby[~right]
    if len(left):
        raise RoundingError(
            f"{name}: {len(left)} of {len(groups)} groups are no multiples of a scale by whole "
            f"numbers of {options.bits} bits"
        )
    return numbers.view(weight.shape), scales.view(len(weight), -1)


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
