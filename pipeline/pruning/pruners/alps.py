"""ALPS: pruning by the alternating direction method of multipliers (arXiv 2406.07831)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.models.matrices import is_finite, set_to_zero
from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.masks import smallest_to_target
from pipeline.specs import ALPS

FIRST_PENALTY = 0.1
"""rho of the first iterations, for a Hessian whose diagonal is one."""

UPDATE_EVERY = 3
"""Iterations between two comparisons of the mask with the last one."""

PENALTY_FACTORS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Share of the kept weights that changed at least, and the factor for rho."""

MAX_ITERATIONS = 300
"""Iterations of ADMM, even if the mask still changes."""

GRADIENT_STEPS = 10
"""Steps of conjugate gradients."""


def pruner(options: ALPS) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(prune_by_alps, ("hessian",), "matrix")


def prune_by_alps(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    target: LayerTarget,
    options: ALPS,
) -> Pruned:
    """Find the mask and the weights W that least change the layer's output, ||X W' - X W||_F^2 with
    W' the dense weights, under the mask's count.

    With H = X^T X damped and scaled to a diagonal of one, and W' scaled inversely, ADMM repeats
    (section 3.2 of the paper, algorithm 1)

        W <- (H + rho)^-1 (H W' - V + rho D),  D <- P(W + V / rho),  V <- V + rho (W - D),

    P keeping the largest entries of the matrix, or of each group of a pattern. Every 3 iterations
    rho grows, faster the more entries of D's support changed, until none did. Then the squared
    error is minimised on the support by conjugate gradients (section 3.3, algorithm 2), each row
    with its own steps. Columns without any input go first; their weights beyond the count stay as
    they are.

    Args:
        weight: `[out_features, in_features]`.
        statistics: `hessian` `[in_features, in_features]`, X^T X on any scale.

    Returns:
        Facts: `dead_columns`, without input; `damping`; `iterations` of ADMM and its last `rho`.

    Raises:
        ValueError: if the Hessian is not finite.
    """
    hessian = statistics["hessian"]
    if not is_finite(hessian):
        raise ValueError("the Hessian has NaN or infinite values")
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    scale = (diagonal + options.damping * diagonal.mean()).sqrt().masked_fill(dead, 1.0)
    gram = hessian / scale / scale[:, None]
    gram.fill_diagonal_(1.0)
    dense = (weight * scale).masked_fill_(dead, 0.0)

    mask, sparse, facts = _admm(dense, gram, target)
    updated = _fitted(dense, sparse, gram, mask) / scale
    updated = torch.where(dead, weight, updated)
    set_to_zero(updated, mask)
    facts = {"dead_columns": float(dead.sum()), "damping": options.damping, **facts}
    return Pruned(mask=mask, weight=updated, facts=facts)


def _admm(
    dense: Tensor, gram: Tensor, target: LayerTarget
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return the mask and D, both `[rows, columns]`, and facts."""
    values, vectors = torch.linalg.eigh(gram.double())
    values.clamp_(min=0.0)
    rho = FIRST_PENALTY
    inverse = _shifted_inverse(values, vectors, rho)
    mask = smallest_to_target(dense.abs(), target, "matrix")
    kept = mask.numel() - int(mask.sum())
    sparse = dense.masked_fill(mask, 0.0)
    dual = torch.zeros_like(dense)
    before = mask
    for iteration in range(1, MAX_ITERATIONS + 1):
        change = (sparse - dense).mul_(rho).sub_(dual) @ inverse  # W - W'
        shifted = change.add_(dense).add_(dual, alpha=1 / rho)  # W + V / rho
        mask = smallest_to_target(shifted.abs(), target, "matrix")
        sparse = shifted.masked_fill(mask, 0.0)
        dual = shifted.sub_(sparse).mul_(rho)  # V + rho (W - D)
        if iteration % UPDATE_EVERY == 0:
            changed = int((mask != before).sum())
            if changed == 0:
                break
            rho *= next(factor for share, factor in PENALTY_FACTORS if changed >= share * kept)
            inverse = _shifted_inverse(values, vectors, rho)
            before = mask
    return mask, sparse, {"iterations": float(iteration), "rho": rho}


def _shifted_inverse(values: Tensor, vectors: Tensor, rho: float) -> Tensor:
    """Return (H + rho)^-1 in float32, from H's eigenvalues and eigenvectors."""
    return ((vectors / (values + rho)) @ vectors.T).float()


def _fitted(dense: Tensor, start: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """Fit the kept weights by conjugate gradients, from a start that is zero elsewhere.

    The paper's preconditioner is the Hessian's diagonal, which is one everywhere here.
    """
    tiny = torch.finfo(dense.dtype).tiny  # a row that is solved divides 0 by it
    fitted = start.clone()
    residual = ((dense - start) @ gram).masked_fill_(mask, 0.0)
    direction = residual.clone()
    size = residual.square().sum(dim=1, keepdim=True)
    for _ in range(GRADIENT_STEPS):
        curved = (direction @ gram).masked_fill_(mask, 0.0)
        step = size / (direction * curved).sum(dim=1, keepdim=True).clamp_(min=tiny)
        fitted.addcmul_(step, direction)
        residual.addcmul_(step, curved, value=-1)
        before, size = size, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(size / before.clamp(min=tiny)).add_(residual)
    return fitted
