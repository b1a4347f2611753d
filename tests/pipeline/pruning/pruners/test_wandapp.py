"""Wanda++'s score against its formula, and its two limits."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.wanda import prune_by_wanda
from pipeline.pruning.pruners.wandapp import prune_by_wandapp
from pipeline.specs import Wanda, WandaPlusPlus

HALF = LayerTarget(0.5)
DRAWS = np.random.default_rng(0)
WEIGHT = torch.from_numpy(DRAWS.normal(size=(6, 16))).float()
SQUARES = torch.from_numpy(DRAWS.uniform(0.1, 4.0, size=16)).float()
GRADIENTS = torch.from_numpy(DRAWS.uniform(0.0, 1e-3, size=(6, 16))).float()


def mask(alpha: float, target: LayerTarget = HALF) -> Tensor:
    statistics = {"squared_norms": SQUARES, "gradient_squares": GRADIENTS}
    return prune_by_wandapp(WEIGHT, statistics, target, WandaPlusPlus(alpha=alpha)).mask


@pytest.mark.parametrize("alpha", [1.0, 100.0])
def test_the_smallest_scores_of_each_row_go(alpha: float) -> None:
    found = mask(alpha).numpy()
    norms, gradients = np.sqrt(SQUARES.numpy()), np.sqrt(GRADIENTS.numpy())
    for row in range(6):
        scores = [
            abs(float(WEIGHT[row, place])) * (alpha * gradients[row, place] + norms[place])
            for place in range(16)
        ]
        assert set(np.flatnonzero(found[row])) == set(np.argsort(scores)[:8])


def test_without_the_gradient_it_is_wanda_and_with_nothing_else_the_gradient() -> None:
    wanda = prune_by_wanda(WEIGHT, {"squared_norms": SQUARES}, HALF, Wanda()).mask
    assert torch.equal(mask(0.0), wanda)
    order = (WEIGHT.abs() * GRADIENTS.sqrt()).argsort(dim=1)[:, :8]
    assert torch.equal(mask(1e9), torch.zeros_like(wanda).scatter_(1, order, value=True))
    assert not torch.equal(mask(1e9), wanda)


def test_a_pattern_is_kept_in_every_group() -> None:
    found = mask(100.0, LayerTarget.parse(0.5, "2:4"))
    assert (found.view(6, 4, 4).sum(dim=-1) == 2).all()
