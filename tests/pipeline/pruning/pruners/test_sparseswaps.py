"""Swapped masks against all masks of small rows, and against the error in float64."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import Pruned
from pipeline.pruning.pruners.magnitude import prune_by_magnitude
from pipeline.pruning.pruners.sparseswaps import prune_by_sparseswaps
from pipeline.pruning.pruners.wanda import prune_by_wanda
from pipeline.specs import Magnitude, SparseSwaps, Wanda
from tests.pipeline.pruning.pruners.test_refit import drawn, inputs

HALF = LayerTarget(0.5)
PATTERN = LayerTarget.parse(0.5, "2:4")


def swapped(weight: Tensor, x: Tensor, target: LayerTarget = HALF, **options: object) -> Pruned:
    statistics = {"hessian": x.T @ x}
    return prune_by_sparseswaps(weight, statistics, target, SparseSwaps.model_validate(options))


def errors(weight: Tensor, x: Tensor, mask: Tensor) -> np.ndarray:  # type: ignore[type-arg]
    """Squared error of each row, in float64."""
    lost = (weight * mask).double()
    return (x.double() @ lost.T).square().sum(dim=0).numpy()  # type: ignore[no-any-return]


def wanda(weight: Tensor, x: Tensor, target: LayerTarget = HALF) -> Tensor:
    return prune_by_wanda(weight, {"squared_norms": x.square().sum(0)}, target, Wanda()).mask


@pytest.mark.parametrize("target", [HALF, PATTERN, LayerTarget(0.3)])
def test_the_error_of_every_row_falls_and_its_count_stays(target: LayerTarget) -> None:
    x, weight = inputs(32), drawn(12, 32)
    first, found = wanda(weight, x, target), swapped(weight, x, target)
    before, after = errors(weight, x, first), errors(weight, x, found.mask)
    assert (after <= before).all()
    assert after.sum() < 0.9 * before.sum()
    assert found.facts["error_left"] == pytest.approx(after.sum() / before.sum(), rel=1e-4)
    assert torch.equal(found.mask.sum(dim=1), first.sum(dim=1))
    if target is PATTERN:
        assert (found.mask.view(12, 8, 4).sum(dim=-1) == 2).all()


@pytest.mark.parametrize("target", [HALF, PATTERN])
def test_no_swap_of_two_weights_is_left_that_lowers_an_error(target: LayerTarget) -> None:
    x, weight = inputs(16), drawn(5, 16)
    mask = swapped(weight, x, target, candidates=16).mask
    reached = errors(weight, x, mask)
    for row, (one, other) in itertools.product(range(5), itertools.combinations(range(16), 2)):
        inside = target is HALF or one // 4 == other // 4
        if mask[row, one] != mask[row, other] and inside:
            tried = mask.clone()
            tried[row, one], tried[row, other] = mask[row, other], mask[row, one]
            assert errors(weight, x, tried)[row] > reached[row] * (1 - 1e-5)


def test_each_swap_is_the_best_of_all() -> None:
    x, weight = inputs(12), drawn(4, 12)
    first = wanda(weight, x)
    one = swapped(weight, x, max_swaps=1, candidates=12).mask
    for row in range(4):
        best = errors(weight, x, first)[row]
        for gone, kept in itertools.product(range(12), repeat=2):
            if first[row, gone] and not first[row, kept]:
                tried = first.clone()
                tried[row, gone], tried[row, kept] = False, True
                best = min(best, errors(weight, x, tried)[row])
        assert errors(weight, x, one)[row] == pytest.approx(best, rel=1e-5)


def test_swaps_come_near_the_best_mask_of_all() -> None:
    x, weight = inputs(10), drawn(20, 10)
    found, start = swapped(weight, x).mask, wanda(weight, x)
    best = []
    for row in range(20):
        tried = torch.zeros(252, 10, dtype=torch.bool)
        for place, gone in enumerate(itertools.combinations(range(10), 5)):
            tried[place, list(gone)] = True
        best.append(errors(weight[row].expand(252, 10), x, tried).min())
    above = errors(weight, x, found).sum() - sum(best)
    assert 0 <= above < 0.25 * (errors(weight, x, start).sum() - sum(best))


def test_few_candidates_never_raise_an_error_and_all_lower_it_more() -> None:
    x, weight = inputs(64), drawn(10, 64)
    few = errors(weight, x, swapped(weight, x, candidates=2).mask)
    every = errors(weight, x, swapped(weight, x, candidates=64).mask)
    assert (few <= errors(weight, x, wanda(weight, x))).all()
    assert every.sum() < few.sum()


def test_uncorrelated_inputs_leave_wandas_mask() -> None:
    """Without correlations a row's error is the sum of its squared Wanda scores."""
    scales = torch.linspace(0.5, 3.0, 24)
    weight = drawn(6, 24)
    found = swapped(weight, torch.diag(scales))
    assert torch.equal(found.mask, wanda(weight, torch.diag(scales)))
    assert found.facts == {"swaps": 0.0, "error_left": 1.0}


def test_no_swaps_leave_the_first_mask() -> None:
    x, weight = inputs(32), drawn(8, 32)
    assert torch.equal(swapped(weight, x, max_swaps=0).mask, wanda(weight, x))
    by_magnitude = swapped(weight, x, max_swaps=0, initial="magnitude").mask
    in_rows = [prune_by_magnitude(row[None], {}, HALF, Magnitude()).mask for row in weight]
    assert torch.equal(by_magnitude, torch.cat(in_rows))


def test_rows_and_the_hessians_scale_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(32), drawn(9, 32)
    whole = swapped(weight, x)
    alone = [swapped(row[None], 4 * x) for row in weight]
    assert torch.equal(whole.mask, torch.cat([each.mask for each in alone]))
    assert whole.facts["swaps"] == sum(each.facts["swaps"] for each in alone)
    monkeypatch.setattr("pipeline.pruning.pruners.sparseswaps._PAIRS", 2_000)
    assert torch.equal(swapped(weight, x).mask, whole.mask)


def test_dead_inputs_go_first_and_a_hessian_that_is_not_finite_is_refused() -> None:
    x, weight = inputs(16), drawn(4, 16)
    x[:, :5] = 0
    assert swapped(weight, x).mask[:, :5].all()
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        swapped(weight, x)
