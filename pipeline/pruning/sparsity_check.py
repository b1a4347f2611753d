"""Count the zeros of a pruned matrix, and refuse a wrong count."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.masks import zeros_in


class SparsityError(RuntimeError):
    """A pruned matrix has another sparsity than its target."""


@dataclass(frozen=True)
class MatrixSparsity:
    """Zeros of one matrix."""

    matrix: str
    rows: int
    columns: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / (self.rows * self.columns)


def count_zeros(name: str, weight: Tensor) -> MatrixSparsity:
    """Count all zeros of a weight `[out_features, in_features]`, pruned or not."""
    rows, columns = weight.shape
    zeros = weight.numel() - int(_nonzero(weight).count_nonzero())
    return MatrixSparsity(name, rows, columns, zeros)


def check_sparsity(
    name: str,
    weight: Tensor,
    mask: Tensor,
    target: LayerTarget,
    counted_per: Literal["matrix", "row"] | None,
    permutation: Tensor | None = None,
) -> None:
    """Check that a pruner chose exactly as many weights as its target says, and that they are zero.

    Other weights may be zero too: they were in the dense matrix, or an update rounded to zero in
    half precision.

    Args:
        weight: the pruned weight, `[out_features, in_features]`.
        mask: the weights that the pruner chose, of the same shape.
        counted_per: without a pattern, where floor(sparsity * n) weights must be chosen; None if
            the pruner meets the sparsity only approximately.
        permutation: order of the columns `[in_features]` in which the pattern holds.

    Raises:
        SparsityError: with the matrix's name and both counts.
    """
    if target.pattern is not None:
        kept, size = target.pattern
        chosen = mask if permutation is None else mask[:, permutation]
        _check_count(name, chosen, size, f"group of {size}", size - kept)
    elif counted_per is not None:
        size = weight.shape[1] if counted_per == "row" else weight.numel()
        _check_count(name, mask, size, counted_per, zeros_in(target.sparsity, size))
    left = int((_nonzero(weight) & mask).count_nonzero())
    if left:
        raise SparsityError(f"{name}: {left} pruned weights are not zero")


def _nonzero(weight: Tensor) -> Tensor:
    """Return where a weight is not zero. On a CPU numpy is three times as fast as torch."""
    if weight.is_cpu and weight.dtype == torch.float32:
        return torch.from_numpy(weight.detach().numpy() != 0)
    if weight.is_cpu and weight.dtype.itemsize == 2:  # numpy has no bfloat16: all but the sign
        return torch.from_numpy(weight.detach().view(torch.int16).numpy() & 0x7FFF != 0)
    return weight != 0


def _check_count(name: str, mask: Tensor, size: int, place: str, wanted: int) -> None:
    chosen = mask.reshape(-1, size).sum(dim=1, dtype=torch.int32)
    wrong = chosen[chosen != wanted]
    if len(wrong):
        raise SparsityError(
            f"{name}: {int(wrong[0])} weights of a {place} are pruned, not {wanted}"
        )
