"""DSnoT: dynamic sparse no training (arXiv 2310.08915)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import MatrixPruner, Pruned
from pipeline.pruning.pruners.masks import refuse_nan, smallest_in_rows, smallest_to_target
from pipeline.pruning.pruners.sparsegpt import inverse_factor, score_scale, sparsegpt_scores
from pipeline.pruning.pruners.wanda import wanda_scores
from pipeline.specs import DSnoT, SparseGPT

SMALLEST_VARIANCE = 1e-12
"""Least v_j^a, as a share of the largest: nothing is divided by zero, and inputs without variance
come back first, in the order of their contributions."""

ATTENTION = ("attention", "attn")
"""Parts of the names of attention modules."""


def pruner(options: DSnoT) -> MatrixPruner:
    """Return what the walk runs with these options."""
    hessian = ("hessian",) if options.initial == "sparsegpt" else ()
    statistics = ("squared_norms", "window_sums", _variances(options), *hessian)
    return MatrixPruner(prune_by_dsnot, statistics, "row", options_by_matrix)


def options_by_matrix(options: DSnoT, paths: Mapping[str, str]) -> dict[str, DSnoT]:
    """Return the options of each matrix: outside the scope nothing is swapped.

    Args:
        paths: by matrix name, its path inside its decoder layer.

    Raises:
        InputError: if the scope is attention and no matrix is inside an attention module.
    """
    if options.scope == "all":
        return dict.fromkeys(paths, options)
    inside = {name for name, path in paths.items() if _in_attention(path)}
    if not inside:
        remedy = "no module of this model that has matrices is named attention: set scope: all"
        raise InputError("scope", options.scope, remedy)
    unswapped = options.model_copy(update={"max_cycles": 0})
    return {name: options if name in inside else unswapped for name in paths}


def _in_attention(path: str) -> bool:
    modules = path.lower().split(".")[:-1]
    return any(part in module for module in modules for part in ATTENTION)


def _variances(options: DSnoT) -> str:
    return "variances" if options.variance == "total" else "pooled_variances"


def prune_by_dsnot(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    target: LayerTarget,
    options: DSnoT,
) -> Pruned:
    """Swap pruned and kept weights of each row until its expected error is near zero (algorithm 1).

    With g_ij = W_ij m_j, m_j the input's mean sum over a window, row i's error is the sum of its
    pruned g_ij. While it is positive, the pruned weight of largest g_ij / v_j^a comes back, v_j
    the input's variance, and the kept weight of g_ij < 0 with the smallest Wanda score goes; while
    it is negative, the same with signs turned. With a pattern the one that goes is the smallest by
    the initial score in the group of the one that comes back. No weight is moved twice.

    A row ends when its error is within the threshold, after `max_cycles`, when no weight can come
    back, and, with `same_sign` or a pattern, before its error changes sign. A swap may overshoot,
    so a row keeps the swaps up to its smallest error; with `keep: all` it keeps all.

    Args:
        weight: `[out_features, in_features]`.
        statistics: `squared_norms`, `window_sums`, and `variances` or `pooled_variances`,
            `[in_features]` each; `hessian` `[in_features, in_features]` if SparseGPT's score
            chooses the initial mask.

    Returns:
        Facts: `swaps`, in all rows; `rows_unsettled`, rows that end with an error beyond the
        threshold; with a Hessian, SparseGPT's facts about it.

    Raises:
        ValueError: if the Hessian cannot be inverted, or a weight or a statistic is not finite.
    """
    wanda = wanda_scores(weight, statistics["squared_norms"])
    initial, facts = _initial_scores(weight, statistics, wanda, options)
    mask = smallest_to_target(initial, target, "row")
    if options.max_cycles == 0:
        return Pruned(mask=mask, facts=facts)

    contributions = weight * statistics["window_sums"]
    refuse_nan(contributions)
    claims = contributions / _relative(statistics[_variances(options)], options.variance_power)
    returning = _both_signs(-claims.abs(), contributions, mask, options.max_cycles)
    pattern = target.pattern
    if pattern is None:
        listed = _both_signs(wanda, -contributions, ~mask, options.max_cycles)
        returning.masked_fill_(listed < 0, -1)  # as many come back as can go
        leave = _from_list(listed, returning, contributions)
    else:
        scores = initial.masked_fill(mask, torch.inf)
        leave = _from_group(scores, pattern.group, returning, contributions)
    same_sign = options.same_sign or pattern is not None
    error = (contributions * mask).sum(dim=1, dtype=torch.float64)
    swaps = _swap(mask, error, returning, leave, same_sign, options)
    return Pruned(mask=mask, facts={**swaps, **facts})


def _initial_scores(
    weight: Tensor, statistics: Mapping[str, Tensor], wanda: Tensor, options: DSnoT
) -> tuple[Tensor, dict[str, float]]:
    match options.initial:
        case "magnitude":
            return weight.abs(), {}
        case "wanda":
            return wanda, {}
        case "sparsegpt":
            dead = statistics["hessian"].diagonal() == 0
            upper, facts = inverse_factor(statistics["hessian"], dead, SparseGPT().damping)
            scores = sparsegpt_scores(weight, score_scale(upper, dead))
            return scores, {"dead_columns": float(dead.sum()), **facts}


def _relative(variances: Tensor, power: float) -> Tensor:
    """Return v_j^a relative to the largest, and nowhere zero."""
    largest = variances.max()
    relative = (variances / largest).pow(power).clamp(min=SMALLEST_VARIANCE)
    return torch.where(largest > 0, relative, 1.0)


# ------------------------------------------------------------------------------------------- swaps

_EXCLUDED = 1e37
"""Key of columns that are no candidates: beyond all others, and far below float32's maximum."""

_Leave = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From each row's place in the flattened `[2, rows, count + 1]` list of returning columns to the
column that goes, -1 if there is none, and the change of the error by both; all `[rows]`."""


def _both_signs(keys: Tensor, signs: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The candidates of positive and those of negative sign, the smallest keys first: columns
    `[2, rows, count + 1]`, -1 after the last one."""
    return torch.stack(
        [
            _ordered(keys, candidates & (signs > 0), count),
            _ordered(keys, candidates & (signs < 0), count),
        ]
    )


def _ordered(keys: Tensor, candidates: Tensor, count: int) -> Tensor:
    count = min(count, keys.shape[1])
    # the others have keys of their own: to choose among equal ones takes longer
    excluded = _EXCLUDED * (1 + 1e-6 * torch.arange(keys.shape[1], device=keys.device))
    keys = torch.where(candidates, keys, excluded)
    columns = smallest_in_rows(keys, count).nonzero()[:, 1].view(-1, count)
    values, order = keys.gather(1, columns).sort(dim=1, stable=True)
    columns = columns.gather(1, order).masked_fill_(values >= _EXCLUDED, -1)
    return torch.nn.functional.pad(columns, (0, 1), value=-1)


def _from_list(listed: Tensor, returning: Tensor, contributions: Tensor) -> _Leave:
    """Let the column go that has the same place in another list `[2, rows, count + 1]`."""
    both = contributions.expand(2, *contributions.shape)
    gone, back = (both.gather(2, each.clamp(min=0)).double() for each in (listed, returning))
    change = gone - back
    return lambda place: (listed.take(place), change.take(place))


def _from_group(scores: Tensor, group: int, returning: Tensor, contributions: Tensor) -> _Leave:
    """Let the smallest score in the returning column's group go; no column goes twice.

    Args:
        scores: `[rows, columns]`, infinite where pruned; columns that go become infinite too.
    """
    rows = torch.arange(len(scores), device=scores.device)
    places = torch.arange(group, device=scores.device)

    def leave(place: Tensor) -> tuple[Tensor, Tensor]:
        back = returning.take(place).clamp(min=0)
        start = back // group * group
        gone = start + scores.gather(1, start[:, None] + places).argmin(dim=1)
        found = scores[rows, gone].isfinite()
        scores[rows, gone] = torch.inf
        change = contributions[rows, gone].double() - contributions[rows, back].double()
        return torch.where(found, gone, -1), change

    return leave


def _swap(
    mask: Tensor,
    error: Tensor,
    returning: Tensor,
    leave: _Leave,
    same_sign: bool,
    options: DSnoT,
) -> dict[str, float]:
    """Change the mask `[rows, columns]` in place: one swap of every row at a time. Each row keeps
    its swaps up to its smallest error, or all.

    Args:
        error: of each row, in float64.
        returning: columns `[2, rows, count + 1]`, as `_both_signs` lists them.
    """
    count = returning.shape[2]
    # each row's place in the list of columns that return while its error has that sign
    positive = torch.arange(len(mask), device=mask.device) * count
    negative = positive + len(mask) * count
    there = returning >= 0
    first, size = error, error.abs()
    active = torch.ones_like(positive, dtype=torch.bool)
    smallest, kept = size, torch.zeros_like(positive)
    swaps: list[tuple[Tensor, Tensor, Tensor]] = []
    for cycle in range(1, options.max_cycles + 1):
        below = error < 0
        place = torch.where(below, negative, positive)
        active = active & (size > options.update_threshold) & there.take(place)
        if not bool(active.any()):
            break
        gone, change = leave(place)
        swapped = active & (gone >= 0)
        after = error + change
        if same_sign:
            unturned = after.sign() == first.sign()
            active &= unturned | ~swapped
            swapped &= unturned
        error = torch.where(swapped, after, error)
        size = error.abs()
        below &= active
        negative = negative + below
        positive = positive + (active ^ below)
        swaps.append((place, gone, swapped))
        better = swapped if options.keep == "all" else size < smallest
        smallest = torch.where(better, size, smallest)
        kept.masked_fill_(better, cycle)
    total = 0
    if swaps:
        places, gone, swapped = (torch.stack(each) for each in zip(*swaps, strict=True))
        cycles = torch.arange(1, len(swaps) + 1, device=mask.device)[:, None]
        at, row = (swapped & (cycles <= kept)).nonzero(as_tuple=True)  # no weight is moved twice
        mask[row, returning.take(places[at, row])] = False
        mask[row, gone[at, row]] = True
        total = len(row)
    unsettled = (smallest > options.update_threshold).sum()
    return {"swaps": float(total), "rows_unsettled": float(unsettled)}
