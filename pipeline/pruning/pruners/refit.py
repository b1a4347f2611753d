"""Refit: another pruner's mask, and the kept weights that suit it best (arXiv 2401.02938)."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.alps import fitted, scaled_problem
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.wanda import first_mask
from pipeline.specs import Refit


def pruner(options: Refit) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(refit, ("hessian",), "row")


def refit(
    weight: Tensor, statistics: Mapping[str, Tensor], target: LayerTarget, options: Refit
) -> Pruned:
    """Choose a mask, then minimise ||X W' - X W||_F^2 + damping over the kept weights W, with W'
    the dense ones.

    Conjugate gradients begin at the kept dense weights, and every step lowers the error. The
    columns of X are scaled to one size, which is the preconditioner.

    Args:
        weight: `[out_features, in_features]`.
        statistics: `hessian` `[in_features, in_features]`, X^T X on any scale.

    Returns:
        Facts: `dead_columns`, without any input, whose kept weights stay as they are; `damping`.

    Raises:
        ValueError: if the Hessian is not finite.
    """
    hessian = statistics["hessian"]
    problem = scaled_problem(weight, hessian, options.damping)
    mask = first_mask(weight, hessian.diagonal(), target, options.initial)
    kept = problem.dense.masked_fill(mask, 0.0)
    solution = fitted(problem, kept, mask, options.steps)
    facts = {"dead_columns": float(problem.dead.sum()), "damping": options.damping}
    return Pruned(mask=mask, weight=problem.weight_of(solution, mask), facts=facts)
