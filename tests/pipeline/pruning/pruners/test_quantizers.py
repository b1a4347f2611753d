"""Rounding to grids, against the definition, plain loops in float64 and an exhaustive search."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.gptq import quantize_by_gptq
from pipeline.pruning.pruners.grids import grid_of
from pipeline.pruning.pruners.rtn import round_to_nearest
from pipeline.pruning.pruners.sparsegpt import prune_by_sparsegpt
from pipeline.specs import GPTQ, RTN, SparseGPT

DENSE = LayerTarget(0.0)


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns))).float()


def correlated(columns: int, seed: int = 0) -> Tensor:
    """A Hessian of inputs that share a few directions, and have scales of their own."""
    draws = np.random.default_rng(seed)
    mixed = draws.normal(size=(400, 3)) @ draws.normal(size=(3, columns))
    inputs = (mixed + 0.3 * draws.normal(size=(400, columns))) * draws.uniform(0.2, 3.0, columns)
    return torch.from_numpy(inputs.T @ inputs / 400).float()


def error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return the squared error of the outputs, tr(D H D^T)."""
    missed = (weight - rounded).double()
    return float((missed @ hessian.double() * missed).sum())


def gptq(weight: Tensor, hessian: Tensor, sparsity: float = 0.0, **options: object) -> Tensor:
    target, asked = LayerTarget(sparsity), GPTQ.model_validate(options)
    found = quantize_by_gptq(weight, {"hessian": hessian}, target, asked).weight
    assert found is not None
    return found


def rtn(weight: Tensor, **options: object) -> Tensor:
    found = round_to_nearest(weight, {}, DENSE, RTN.model_validate(options)).weight
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_is_at_most_half_a_step_from_one_of_few_numbers(
    bits: int, symmetric: bool
) -> None:
    weight = drawn(5, 40)
    rounded = rtn(weight, bits=bits, group_size=16, symmetric=symmetric)
    for start in (0, 16, 32):  # the last group has 8
        for own, new in zip(
            weight[:, start : start + 16], rounded[:, start : start + 16], strict=True
        ):
            span = float(2 * own.abs().max() if symmetric else own.max() - own.min())
            assert (own - new).abs().max() <= span / (2**bits - 1) / 2 * (1 + 1e-3)
            assert len(new.unique()) <= 2**bits
            if not symmetric:  # up to the whole number that stands for 0
                assert new.max() - new.min() == pytest.approx(span, rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_stays_zero_and_a_group_of_zeros_as_well(symmetric: bool) -> None:
    weight = drawn(4, 32)
    weight[:, ::3] = 0
    weight[1, :16] = 0
    rounded = rtn(weight, bits=3, group_size=16, symmetric=symmetric)
    assert (rounded[weight == 0] == 0).all()
    assert rounded.isfinite().all()


def test_a_symmetric_grid_is_that_of_gptqs_code() -> None:
    weight = torch.tensor([[-1.5, 0.12, 0.75, 1.0]])
    grid = grid_of(weight, RTN(bits=4, group_size=4))
    assert grid.scale.item() == pytest.approx(2 * 1.5 / 15)
    assert (grid.zero.item(), grid.levels) == (8.0, 16)
    assert rtn(weight, bits=4, group_size=4)[0].tolist() == pytest.approx([-1.6, 0.2, 0.8, 1.0])


# ------------------------------------------------------------------------------------------- gptq


def plain_gptq(weight: Tensor, hessian: Tensor, order: list[int], options: GPTQ) -> np.ndarray:
    """The paper's equations one column at a time, the inverse by elimination in float64."""
    damping = options.damping * float(hessian.diagonal().mean())
    inverse = np.linalg.inv(hessian.double().numpy() + damping * np.eye(len(hessian)))
    left, scales, zeros = weight.double().numpy().copy(), *spacing(weight, options)
    levels = 2**options.bits
    for place, column in enumerate(order):
        rest = order[place + 1 :]
        number = np.round(left[:, column] / scales[:, column]) + zeros[:, column]
        rounded = (np.clip(number, 0, levels - 1) - zeros[:, column]) * scales[:, column]
        missed = (left[:, column] - rounded) / inverse[column, column]
        left[:, rest] -= np.outer(missed, inverse[column, rest])
        left[:, column] = rounded
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return left


def spacing(weight: Tensor, options: GPTQ) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of every weight, by the definition."""
    scales, zeros = np.empty(weight.shape), np.empty(weight.shape)
    for row, start in itertools.product(
        range(len(weight)), range(0, weight.shape[1], options.group_size)
    ):
        part = slice(start, start + options.group_size)
        own = weight[row, part].double().numpy()
        low, high = min(own.min(), 0.0), max(own.max(), 0.0)
        if options.symmetric:
            high = max(high, -low)
            low = -high
        scales[row, part] = (high - low) / (2**options.bits - 1)
        half = 2 ** (options.bits - 1)
        zeros[row, part] = half if options.symmetric else np.round(-low / scales[row, part])
    return scales, zeros


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_is_the_papers_loop(bits: int, act_order: bool, symmetric: bool) -> None:
    weight, hessian = drawn(6, 48), correlated(48)
    options = GPTQ(bits=bits, act_order=act_order, symmetric=symmetric, group_size=16, block_size=8)
    diagonal = hessian.diagonal().numpy()
    order = np.argsort(-diagonal, kind="stable").tolist() if act_order else list(range(48))
    found = gptq(weight, hessian, **options.model_dump()).numpy()
    expected = plain_gptq(weight, hessian, order, options)
    equal = np.isclose(found, expected, rtol=1e-4, atol=1e-5)
    assert equal.mean() > 0.98  # a weight between two numbers may go the other way, and then others
    assert equal[:, order[:8]].all()


def test_with_independent_inputs_gptq_rounds_to_nearest() -> None:
    weight = drawn(6, 32)
    hessian = torch.diag(torch.linspace(0.1, 4.0, 32))
    for act_order in (True, False):
        assert torch.equal(gptq(weight, hessian, act_order=act_order), rtn(weight))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_than_rounding_to_nearest_and_act_order_less_still(bits: int) -> None:
    losses = np.zeros(3)
    for seed in range(5):
        weight, hessian = drawn(16, 64, seed), correlated(64, seed)
        options = {"bits": bits, "group_size": 32}
        losses += [
            error(weight, found, hessian)
            for found in (
                rtn(weight, **options),
                gptq(weight, hessian, act_order=False, **options),
                gptq(weight, hessian, act_order=True, **options),
            )
        ]
    assert losses[1] < 0.5 * losses[0]
    assert losses[2] < losses[1]


def test_no_choice_of_numbers_beats_an_exhaustive_search() -> None:
    """Of one row with five weights and four numbers each; GPTQ comes close to the best."""
    ratios = []
    for seed in range(8):
        weight, hessian = drawn(1, 5, seed), correlated(5, seed)
        grid = grid_of(weight, RTN(bits=2, group_size=5))
        numbers = (torch.arange(4) - grid.zero[0]) * grid.scale[0]
        best = min(
            error(weight, torch.stack(chosen)[None], hessian)
            for chosen in itertools.product(numbers, repeat=5)
        )
        ours = error(weight, gptq(weight, hessian, bits=2, group_size=5), hessian)
        assert best <= ours * (1 + 1e-6)
        ratios.append(error(weight, rtn(weight, bits=2, group_size=5), hessian) / ours)
    assert np.median(ratios) >= 1


def test_a_column_without_input_is_rounded_and_disturbs_no_other() -> None:
    weight, hessian = drawn(4, 32), correlated(32)
    dead = hessian.clone()
    dead[7], dead[:, 7] = 0, 0
    without = [place for place in range(32) if place != 7]
    alone = gptq(weight[:, without], dead[without][:, without], group_size=1, act_order=False)
    found = gptq(weight, dead, group_size=1, act_order=False)
    assert torch.allclose(found[:, without], alone, atol=1e-5)


# --------------------------------------------------------------------------------- prune and round


def test_pruned_and_rounded_at_once_has_the_zeros_of_sparsegpt_and_makes_up_for_both() -> None:
    weight, hessian = drawn(16, 64), correlated(64)
    options = {"act_order": False, "block_size": 16, "group_size": 32}
    both = gptq(weight, hessian, sparsity=0.5, bits=4, **options)
    pruned = prune_by_sparsegpt(
        weight, {"hessian": hessian}, LayerTarget(0.5), SparseGPT(block_size=16)
    )
    assert pruned.weight is not None
    assert (both == 0).sum() >= both.numel() // 2
    first = pruned.mask[:, :16]
    assert (both[:, :16][first] == 0).all()  # later blocks depend on what was rounded before
    afterwards = rtn(pruned.weight, bits=4, group_size=32)
    assert error(weight, both, hessian) < error(weight, afterwards, hessian)


def test_many_numbers_leave_what_sparsegpt_leaves() -> None:
    weight, hessian = drawn(8, 32), correlated(32)
    both = gptq(weight, hessian, sparsity=0.5, bits=8, group_size=8, act_order=False)
    pruned = prune_by_sparsegpt(weight, {"hessian": hessian}, LayerTarget(0.5), SparseGPT())
    assert pruned.weight is not None
    assert torch.equal(both == 0, pruned.mask | (both == 0))
    assert (both - pruned.weight).abs().mean() < 0.05 * weight.abs().mean()
