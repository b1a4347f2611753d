"""ALPS: pruning by the alternating direction method of multipliers (arXiv 2406.07831)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.matrices import set_to_zero
from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.masks import refuse_infinite, smallest_to_target
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
    problem = scaled_problem(weight, statistics["hessian"], options.damping)
    mask, sparse, facts = _admm(problem.dense, problem.gram, target)
    updated = problem.weight_of(fitted(problem, sparse, mask, GRADIENT_STEPS), mask)
    dead = {"dead_columns": float(problem.dead.sum()), "damping": options.damping}
    return Pruned(mask=mask, weight=updated, facts={**dead, **facts})


@dataclass(frozen=True)
class ScaledProblem:
    """Least squares for a matrix's output, scaled so that the Hessian's diagonal is one."""

    original: Tensor
    """The weight, `[rows, columns]`."""

    dense: Tensor
    """The same times `scale`; 0 in dead columns."""

    gram: Tensor
    """The damped Hessian over scale_i scale_j, `[columns, columns]`."""

    scale: Tensor
    """`[columns]`."""

    dead: Tensor
    """Columns without any input, `[columns]`."""

    def weight_of(self, solution: Tensor, mask: Tensor) -> Tensor:
        """Return the weight of a solution, with dead columns as they were and zeros in the mask."""
        weight = torch.where(self.dead, self.original, solution / self.scale)
        set_to_zero(weight, mask)
        return weight


def scaled_problem(weight: Tensor, hessian: Tensor, damping: float) -> ScaledProblem:
    """Scale a matrix's least squares.

    Args:
        damping: added to the Hessian's diagonal, as a share of its mean.

    Raises:
        ValueError: if the Hessian is not finite.
    """
    refuse_infinite(hessian)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    scale = (diagonal + damping * diagonal.mean()).sqrt().masked_fill(dead, 1.0)
    gram = hessian / scale / scale[:, None]
    gram.fill_diagonal_(1.0)
    return ScaledProblem(weight, (weight * scale).masked_fill_(dead, 0.0), gram, scale, dead)


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


def fitted(problem: ScaledProblem, start: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Fit the kept weights by conjugate gradients, from a start that is zero elsewhere.

    The paper's preconditioner is the Hessian's diagonal, which is one everywhere here.
    """
    dense, gram = problem.dense, problem.gram
    tiny = torch.finfo(dense.dtype).tiny  # a row that is solved divides 0 by it
    solution = start.clone()
    residual = ((dense - start) @ gram).masked_fill_(mask, 0.0)
    direction = residual.clone()
    size = residual.square().sum(dim=1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ gram).masked_fill_(mask, 0.0)
        step = size / (direction * curved).sum(dim=1, keepdim=True).clamp_(min=tiny)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, curved, value=-1)
        before, size = size, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(size / before.clamp(min=tiny)).add_(residual)
    return solution
