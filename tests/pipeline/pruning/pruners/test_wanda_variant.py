"""Wanda's variant: rows lose the same share of their score mass, not the same number of weights."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners import pruner_for
from pipeline.pruning.pruners.wanda import prune_by_wanda, wanda_scores
from pipeline.pruning.sparsity_check import check_sparsity
from pipeline.specs import Wanda

VARIANT = Wanda(variant=True)


def example(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows with few large weights and rows of even ones."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.linspace(0.5, 4, rows)[:, None]
    sizes = torch.rand(rows, columns, generator=generator) ** powers
    signs = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
    return sizes * signs, torch.rand(columns, generator=generator) + 0.2


def removed_by_share(scores: Tensor, share: float) -> list[set[int]]:
    """In each row the smallest scores whose sum is at most a share of the row's."""
    removed = []
    for row in scores.double().numpy():
        gone: set[int] = set()
        mass = 0.0
        for place in np.argsort(row, kind="stable"):
            mass += row[place]
            if mass > share * row.sum():
                break
            gone.add(int(place))
        removed.append(gone)
    return removed


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_one_share_of_mass_serves_all_rows_and_meets_the_sparsity(
    sparsity: float, seed: int
) -> None:
    weight, squares = example(40, 200, seed)
    pruned = prune_by_wanda(weight, {"squared_norms": squares}, LayerTarget(sparsity), VARIANT)
    expected = removed_by_share(wanda_scores(weight, squares), pruned.facts["share"])
    assert [set(np.flatnonzero(row)) for row in pruned.mask.numpy()] == expected
    assert float(pruned.mask.float().mean()) == pytest.approx(sparsity, abs=2e-3)
    counts = pruned.mask.sum(dim=1)
    assert int(counts[-1]) > int(counts[0]) + 20  # small weights are cheaper there


def test_the_share_is_the_first_one_of_the_bisection_that_is_near_enough() -> None:
    weight, squares = example(40, 200, seed=1)
    scores = wanda_scores(weight, squares)
    low, share, high = 0.0, 0.4, 0.8
    while True:
        sparsity = sum(map(len, removed_by_share(scores, share))) / scores.numel()
        if abs(sparsity - 0.6) <= 1e-3:
            break
        low, high = (low, share) if sparsity > 0.6 else (share, high)
        share = (low + high) / 2
    pruned = prune_by_wanda(weight, {"squared_norms": squares}, LayerTarget(0.6), VARIANT)
    assert pruned.facts == {"share": share}


def test_a_sparsity_beyond_the_largest_share_ends_there() -> None:
    weight, squares = torch.ones(4, 100), torch.ones(100)
    pruned = prune_by_wanda(weight, {"squared_norms": squares}, LayerTarget(0.95), VARIANT)
    assert pruned.mask.sum(dim=1).tolist() == [79] * 4
    assert 0.799 < pruned.facts["share"] < 0.8


def test_its_count_is_not_checked_but_that_the_zeros_are_there_is() -> None:
    weight, squares = example(40, 200, seed=2)
    mask = prune_by_wanda(weight, {"squared_norms": squares}, LayerTarget(0.6), VARIANT).mask
    counted_per = pruner_for(VARIANT).counted_per
    assert counted_per is None
    check_sparsity("up_proj", weight.masked_fill(mask, 0.0), mask, LayerTarget(0.6), counted_per)
    with pytest.raises(RuntimeError, match=r"up_proj: \d+ pruned weights are not zero"):
        check_sparsity("up_proj", weight, mask, LayerTarget(0.6), counted_per)
