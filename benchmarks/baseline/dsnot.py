"""DSnoT (arXiv 2310.08915, algorithm 1) on Wanda's masks, written plainly: it sorts whole rows, and
pointers into the sorted rows give the next swap."""

import torch
from torch import Tensor

from benchmarks.baseline import wanda
from benchmarks.baseline.choice import PlainChoice

CYCLES = 50
"""The most swaps in a row."""

THRESHOLD = 0.1
"""A row is done once its expected error, summed over a window's tokens, is at most this."""


class Moments:
    """Statistics of a linear layer's input, each `[in_features]`: the means over windows of
    sum_t X_tj^2 and sum_t X_tj, and the variance of X_tj within a window, averaged over tokens."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.squared_norms = wanda.PlainSquaredNorms(columns, device)
        self.sums = torch.zeros(columns, device=device)
        self.deviations = torch.zeros(columns, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add a window `[tokens, in_features]`."""
        self.squared_norms.update(inputs)
        inputs = inputs.float()
        windows = self.squared_norms.windows
        self.sums *= (windows - 1) / windows
        self.sums += inputs.sum(dim=0) / windows
        self.deviations += inputs.var(dim=0, correction=0) * len(inputs)
        self.tokens += len(inputs)

    @property
    def variance(self) -> Tensor:
        """The variance within a window."""
        return self.deviations / self.tokens


def choose_by_dsnot(
    name: str,
    weight: Tensor,
    statistics: Moments,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> PlainChoice:
    """Choose Wanda's mask; in the attention, swap weights until each row's expected error is small.

    A row's error is the sum over its zeroed weights of g_ij = W_ij m_j, where m is the mean over
    windows of the sum of inputs. `weight` is `[out_features, in_features]`.
    """
    initial = wanda.choose_by_wanda(name, weight, statistics.squared_norms, sparsity, pattern)
    if not name.startswith("self_attn"):
        return initial
    contribution = weight.float() * statistics.sums
    ranking = torch.where(initial.mask, contribution / statistics.variance, 0)
    if pattern is None:
        mask = _swap(initial, contribution, ranking)
    else:
        mask = _swap_in_groups(initial, contribution, ranking, pattern[1])
    return PlainChoice(mask, initial.scores)


def _swap(initial: PlainChoice, contribution: Tensor, ranking: Tensor) -> Tensor:
    """Swap one pair in each cycle: bring back the zeroed weight that lowers the error most, by
    g_ij / variance, and zero the kept weight of smallest score that lowers it."""
    mask = initial.mask.clone()
    error = (contribution * mask).sum(dim=1, keepdim=True)  # [rows, 1]
    order = torch.sort(ranking, dim=1).indices  # zeroed g < 0, kept, zeroed g > 0
    kept = int((~mask[0]).sum())
    kept_order = torch.sort(initial.scores.masked_fill(mask, torch.inf), dim=1).indices[:, :kept]
    kept_contribution = contribution.gather(1, kept_order)
    place = torch.arange(kept, device=mask.device).expand_as(kept_order)
    end = torch.full_like(error, kept, dtype=torch.long)
    negative = torch.sort(torch.where(kept_contribution < 0, place, kept), dim=1).values
    positive = torch.sort(torch.where(kept_contribution > 0, place, kept), dim=1).values
    negative, positive = torch.cat([negative, end], 1), torch.cat([positive, end], 1)

    low, high = torch.zeros_like(end), torch.full_like(end, mask.shape[1] - 1)
    next_negative, next_positive = torch.zeros_like(end), torch.zeros_like(end)
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(CYCLES):
        active &= error.abs() > THRESHOLD
        if not active.any():
            break
        over = error > 0
        grown = order.gather(1, torch.where(over, high, low))
        gain = ranking.gather(1, grown)
        places = torch.where(
            over, negative.gather(1, next_negative), positive.gather(1, next_positive)
        )
        active &= torch.where(over, gain > 0, gain < 0) & (
            places < kept
        )  # a weight is left to zero
        lost = kept_order.gather(1, places.clamp(max=kept - 1))
        mask.scatter_(1, grown, mask.gather(1, grown) & ~active)
        mask.scatter_(1, lost, mask.gather(1, lost) | active)
        change = contribution.gather(1, lost) - contribution.gather(1, grown)
        error = torch.where(active, error + change, error)
        high -= (active & over).long()
        low += (active & ~over).long()
        next_negative += (active & over).long()
        next_positive += (active & ~over).long()
    return mask


def _swap_in_groups(
    initial: PlainChoice, contribution: Tensor, ranking: Tensor, group: int
) -> Tensor:
    """Swap as above, but zero the kept weight of smallest score in the same group, of either sign,
    and stop before a row's error changes its sign. A weight that came back stays."""
    mask = initial.mask.clone()
    error = (contribution * mask).sum(dim=1, keepdim=True)  # [rows, 1]
    sign = error.sign()
    order = torch.sort(ranking, dim=1).indices
    scores = initial.scores.masked_fill(mask, torch.inf)
    low = torch.zeros_like(error, dtype=torch.long)
    high = torch.full_like(low, mask.shape[1] - 1)
    active = torch.ones_like(error, dtype=torch.bool)
    members = torch.arange(group, device=mask.device)
    for _ in range(CYCLES):
        active &= error.abs() > THRESHOLD
        if not active.any():
            break
        over = error > 0
        grown = order.gather(1, torch.where(over, high, low))
        gain = ranking.gather(1, grown)
        places = grown // group * group + members  # [rows, group]
        score, member = scores.gather(1, places).min(dim=1, keepdim=True)
        lost = places.gather(1, member)
        changed = error + contribution.gather(1, lost) - contribution.gather(1, grown)
        active &= torch.where(over, gain > 0, gain < 0) & (score < torch.inf)
        active &= changed.sign() == sign
        mask.scatter_(1, grown, mask.gather(1, grown) & ~active)
        mask.scatter_(1, lost, mask.gather(1, lost) | active)
        scores.scatter_(1, lost, torch.where(active, torch.inf, score))
        error = torch.where(active, changed, error)
        high -= (active & over).long()
        low += (active & ~over).long()
    return mask
