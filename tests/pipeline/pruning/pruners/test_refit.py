"""Refitted weights against least squares in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.base import Pruned
from pipeline.pruning.pruners.magnitude import prune_by_magnitude
from pipeline.pruning.pruners.refit import refit
from pipeline.pruning.pruners.wanda import prune_by_wanda
from pipeline.specs import Magnitude, Refit, Wanda

HALF = LayerTarget(0.5)
TOKENS = 200


def inputs(columns: int, seed: int = 0) -> Tensor:
    """Inputs `[tokens, columns]` that share a few directions."""
    draws = np.random.default_rng(seed)
    mixed = draws.normal(size=(TOKENS, 4)) @ draws.normal(size=(4, columns))
    own = draws.normal(size=(TOKENS, columns)) * draws.uniform(0.3, 2.0, columns)
    return torch.from_numpy(mixed + own).float()


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed + 50).normal(size=(rows, columns))).float()


def refitted(weight: Tensor, x: Tensor, target: LayerTarget = HALF, **options: object) -> Pruned:
    return refit(weight, {"hessian": x.T @ x}, target, Refit.model_validate(options))


def error(weight: Tensor, x: Tensor, found: Tensor | None) -> float:
    assert found is not None
    return float(((x.double() @ (found - weight).double().T) ** 2).sum())


@pytest.mark.parametrize("target", [HALF, LayerTarget.parse(0.5, "2:4")])
def test_many_steps_are_the_least_squares_of_every_row(target: LayerTarget) -> None:
    x, weight, damping = inputs(24), drawn(6, 24), 0.01
    found = refitted(weight, x, target, steps=200, damping=damping)
    extra = damping * float((x.T @ x).diagonal().mean())
    damped = np.vstack([x.double().numpy(), np.sqrt(extra) * np.eye(24)])
    assert found.weight is not None
    for row in range(6):
        kept = ~found.mask[row].numpy()
        wanted = damped @ weight[row].double().numpy()
        expected = np.linalg.lstsq(damped[:, kept], wanted, rcond=None)[0]
        assert found.weight[row].numpy()[kept] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert (found.weight[row].numpy()[~kept] == 0).all()


def test_masks_are_those_of_the_named_pruner_and_no_steps_leave_its_weights() -> None:
    x, weight = inputs(32), drawn(8, 32)
    wanda = prune_by_wanda(weight, {"squared_norms": x.square().sum(0)}, HALF, Wanda())
    unmoved = refitted(weight, x, steps=0)
    assert torch.equal(unmoved.mask, wanda.mask)
    assert unmoved.weight is not None
    assert torch.allclose(unmoved.weight, weight.masked_fill(wanda.mask, 0.0), rtol=1e-6)
    pattern = LayerTarget.parse(0.5, "2:4")
    magnitude = refitted(weight, x, pattern, initial="magnitude")
    assert torch.equal(magnitude.mask, prune_by_magnitude(weight, {}, pattern, Magnitude()).mask)


def test_more_steps_lower_the_error() -> None:
    for seed in range(4):
        x, weight = inputs(64, seed), drawn(16, 64, seed)
        errors = [
            error(weight, x, refitted(weight, x, steps=steps, damping=1e-6).weight)
            for steps in (0, 1, 2, 5, 10, 40)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.6 * errors[0]


def test_a_column_without_input_keeps_its_weights() -> None:
    x, weight = inputs(16), drawn(4, 16)
    x[:, 3] = 0
    found = refitted(weight, x, LayerTarget(0.05))
    assert found.weight is not None
    kept = ~found.mask[:, 3]
    assert torch.equal(found.weight[kept, 3], weight[kept, 3])
    assert found.facts["dead_columns"] == 1
    with pytest.raises(ValueError, match="NaN or infinite"):
        refitted(weight, torch.full((4, 16), torch.inf))
