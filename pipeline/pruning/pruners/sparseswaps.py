"""SparseSwaps: another pruner's mask, improved by exchanging one weight for another (arXiv
2512.10922)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.masks import refuse_infinite
from pipeline.pruning.pruners.wanda import first_mask
from pipeline.specs import Pattern, SparseSwaps

_TOLERANCE = 1e-6
"""A swap counts if it lowers a row's error by more than this share of its first one: sums in
float32 do not tell less from nothing, and a row could swap to and fro."""

_PAIRS = 2**20
"""Pairs of weights whose swaps are computed at a time."""


def pruner(options: SparseSwaps) -> MatrixPruner:
    """Return what the walk runs with these options."""
    return MatrixPruner(prune_by_sparseswaps, ("hessian",), "row")


def prune_by_sparseswaps(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    target: LayerTarget,
    options: SparseSwaps,
) -> Pruned:
    """Choose a mask, then lower each row's error ||X e||^2, e its pruned weights, by swaps.

    With H = X^T X and c = H e, to prune u and bring back p changes the error by

        2 w_u c_u + w_u^2 H_uu - 2 w_p c_p + w_p^2 H_pp - 2 w_u w_p H_up.

    A swap is the best one of the `candidates` weights of each kind for which the terms without
    H_up are least; with a pattern the best one inside any of its groups. A row ends after
    `max_swaps`, or when its best swap does not lower the error.

    Args:
        weight: `[out_features, in_features]`.
        statistics: `hessian` `[in_features, in_features]`, X^T X on any scale.

    Returns:
        Facts: `swaps`, in all rows; `error_left`, the matrix's squared error over that of the first
        mask.

    Raises:
        ValueError: if the Hessian is not finite.
    """
    hessian = statistics["hessian"]
    refuse_infinite(hessian)
    mask = first_mask(weight, hessian.diagonal(), target, options.initial)
    count = min(options.candidates, weight.shape[1])
    pairs = weight.shape[1] * target.pattern.group if target.pattern else count**2
    swaps, before, after = 0, 0.0, 0.0
    for start in range(0, len(weight), max(1, _PAIRS // pairs)):
        rows = slice(start, start + max(1, _PAIRS // pairs))
        done = _swap(weight[rows], mask[rows], hessian, target.pattern, count, options.max_swaps)
        swaps, before, after = swaps + done[0], before + done[1], after + done[2]
    left = after / before if before else 1.0
    return Pruned(mask=mask, facts={"swaps": float(swaps), "error_left": left})


def _swap(
    weight: Tensor,
    mask: Tensor,
    hessian: Tensor,
    pattern: Pattern | None,
    candidates: int,
    max_swaps: int,
) -> tuple[int, float, float]:
    """Swap weights of rows in their mask, in place.

    Returns:
        The number of swaps, and the rows' squared error before and after.
    """
    pull = (weight * mask) @ hessian  # c
    first = (pull * weight * mask).sum(dim=1, dtype=torch.float64)
    after, swaps = float(first.sum()), 0
    active = torch.arange(len(weight), device=weight.device)
    for _ in range(max_swaps):
        own, gone, drawn = weight[active], mask[active], pull[active]
        squares, mixed = own.square() * hessian.diagonal(), 2 * own * drawn
        leave = (squares + mixed).masked_fill_(gone, torch.inf)
        come = (squares - mixed).masked_fill_(~gone, torch.inf)
        if pattern is None:
            change, leaves, returns = _best_of_candidates(own, leave, come, hessian, candidates)
        else:
            change, leaves, returns = _best_in_groups(own, leave, come, hessian, pattern.group)
        better = change.double() < -_TOLERANCE * first[active]
        if not bool(better.any()):
            break
        active, leaves, returns = active[better], leaves[better], returns[better]
        mask[active, leaves], mask[active, returns] = True, False
        pull[active] += weight[active, leaves, None] * hessian[leaves]
        pull[active] -= weight[active, returns, None] * hessian[returns]
        after += float(change[better].sum(dtype=torch.float64))
        swaps += len(active)
    return swaps, float(first.sum()), after


def _best_of_candidates(
    weight: Tensor, leave: Tensor, come: Tensor, hessian: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row the change of its error by its best swap, the column that is pruned, and
    the one that comes back, `[rows]` each.

    Args:
        weight: `[rows, columns]`.
        leave: what pruning each weight adds to the error, infinite for those that are pruned.
        come: the same of bringing it back.
    """
    leave, leaves = leave.topk(count, dim=1, largest=False)
    come, returns = come.topk(count, dim=1, largest=False)
    pairs = weight.gather(1, leaves)[:, :, None] * weight.gather(1, returns)[:, None, :]
    pairs *= hessian[leaves[:, :, None], returns[:, None, :]]
    change = leave[:, :, None] + come[:, None, :] - 2 * pairs
    best, place = change.flatten(1).min(dim=1)
    one, other = (place // count)[:, None], (place % count)[:, None]
    return best, leaves.gather(1, one)[:, 0], returns.gather(1, other)[:, 0]


def _best_in_groups(
    weight: Tensor, leave: Tensor, come: Tensor, hessian: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same, of swaps inside groups of adjacent columns."""
    rows, columns = weight.shape
    groups = columns // group
    blocks = hessian.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    own, goes, comes = (each.view(rows, groups, group) for each in (weight, leave, come))
    pairs = own[..., :, None] * own[..., None, :] * blocks
    change = goes[..., :, None] + comes[..., None, :] - 2 * pairs
    best, place = change.flatten(1).min(dim=1)
    start = place // group**2 * group
    return best, start + place % group**2 // group, start + place % group
