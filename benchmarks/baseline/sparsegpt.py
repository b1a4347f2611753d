"""SparseGPT (arXiv 2301.00774, algorithm 1), written plainly."""

import math

import torch
from torch import Tensor

from benchmarks.baseline.choice import PlainChoice
from benchmarks.baseline.masks import mask_in_matrix, zero_count

_DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""

BLOCK = 128
"""Columns that share one choice of a mask and one update of the later columns."""


class PlainHessian:
    """The running mean over windows of 2 X^T X, `[in_features, in_features]`."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.mean = torch.zeros(columns, columns, device=device)
        self.windows = 0

    def update(self, inputs: Tensor) -> None:
        """Add a window `[tokens, in_features]`."""
        self.mean *= self.windows / (self.windows + 1)
        self.windows += 1
        scaled = math.sqrt(2 / self.windows) * inputs.float()
        self.mean += scaled.T @ scaled


def choose_by_sparsegpt(
    name: str,
    weight: Tensor,
    statistics: PlainHessian,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> PlainChoice:
    """Choose the smallest W_ij^2 / U_jj^2, block by block over all rows of `[out_features,
    in_features]` or in each group of a row, and take each column's error out of the later columns.

    A group of a pattern must not cross the end of a block. Of the n weights up to the end of a
    block floor(sparsity * n) are zeroed, so that the matrix has the exact count.
    """
    rows, columns = weight.shape
    remaining = weight.float().clone()
    hessian = statistics.mean.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    remaining[:, dead] = 0
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)

    mask = torch.zeros_like(remaining, dtype=torch.bool)
    scores = torch.zeros_like(remaining)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block = remaining[:, start:end].clone()
        block_upper = upper[start:end, start:end]
        scale = block_upper.diagonal().square()
        block_mask, block_scores = mask[:, start:end], scores[:, start:end]
        pruned, errors = torch.zeros_like(block), torch.zeros_like(block)
        if pattern is None:
            zeros = zero_count(sparsity, rows * end) - zero_count(sparsity, rows * start)
            block_scores[:] = block.square() / scale
            block_mask[:] = mask_in_matrix(block_scores, zeros)
        for column in range(end - start):
            if pattern is not None and column % pattern[1] == 0:
                kept, group = pattern
                part = slice(column, column + group)
                block_scores[:, part] = block[:, part].square() / scale[part]
                found = torch.topk(block_scores[:, part], group - kept, dim=1, largest=False)
                block_mask.scatter_(1, column + found.indices, True)
            left = block[:, column].clone()
            left[block_mask[:, column]] = 0
            error = (block[:, column] - left) / block_upper[column, column]
            block[:, column:] -= error[:, None] @ block_upper[column, column:][None]
            pruned[:, column], errors[:, column] = left, error
        remaining[:, start:end] = pruned
        remaining[:, end:] -= errors @ upper[start:end, end:]
    return PlainChoice(mask, scores, remaining)
