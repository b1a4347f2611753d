"""The order of a matrix's columns in which an N:M pattern keeps more score."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.pruning.pruners.masks import smallest_in_groups

BLOCK_GROUPS = 256
"""Groups that exchange columns in one assignment, whose time grows with the third power of their
number."""


def channel_permutation(scores: Tensor, kept: int, group: int) -> tuple[Tensor, float]:
    """Find an order of columns by RIA's channel permutation (section 4.3 of its paper).

    The columns are dealt out to the groups by the sum of their scores, to and fro, so that every
    group has strong and weak ones. Then, place by place, each group gives up its column there, and
    these columns are assigned so that the sum of the kept scores is the largest. The same is done
    from the columns' own order, and the better end is taken: a better start may lead to a worse
    end.

    Args:
        scores: `[out_features, in_features]`, none negative, in_features a multiple of `group`.

    Returns:
        The permutation `[in_features]`, the columns' own order if nothing better was found; and the
        sum of the kept scores over that of the columns' own order.
    """
    own = torch.arange(scores.shape[1], device=scores.device)
    before = _retained(scores, kept, group)
    ends = [_reassigned(scores, start, kept, group) for start in (own, _dealt_out(scores, group))]
    after, best = max((_retained(scores[:, end], kept, group), n) for n, end in enumerate(ends))
    return (ends[best], after / before) if after > before else (own, 1.0)


def _retained(scores: Tensor, kept: int, group: int) -> float:
    """Return the sum of the scores that the pattern keeps."""
    mask = smallest_in_groups(scores, kept, group)
    return float(scores.masked_fill(mask, 0.0).sum(dtype=torch.float64))


def _dealt_out(scores: Tensor, group: int) -> Tensor:
    order = scores.sum(dim=0).argsort(stable=True).view(group, -1)  # [place, groups]
    order[1::2] = order[1::2].flip(1)
    return order.T.reshape(-1)


def _reassigned(scores: Tensor, permutation: Tensor, kept: int, group: int) -> Tensor:
    """Assign the columns of one place after another.

    A column s that joins a group's other columns, whose `kept`-th largest in a row is t, adds
    max(0, s - t) there. Since s and t add up to the same for every assignment, the best one has the
    largest sum of |s - t|.
    """
    if kept == group:
        return permutation
    blocks = -(-len(permutation) // (group * BLOCK_GROUPS))
    grouped = permutation.view(-1, group).clone()  # [groups, place]
    for block in range(blocks):
        part = grouped[block::blocks]
        for place in range(group):
            others = [other for other in range(group) if other != place]
            rest = scores[:, part[:, others]]  # [out_features, groups, group - 1]
            limits = rest.kthvalue(group - kept, dim=2).values
            apart = torch.cdist(limits.T, scores[:, part[:, place]].T, p=1.0)
            _, chosen = linear_sum_assignment(apart.cpu().double().numpy(), maximize=True)
            part[:, place] = part[torch.from_numpy(chosen).to(part.device), place]
    return grouped.view(-1)
