"""Rounding to grids, against the definition, plain loops in float64 and an exhaustive search."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.awq import quantize_by_awq
from pipeline.pruning.pruners.gptq import quantize_by_gptq
from pipeline.pruning.pruners.grids import RoundingError, grid_of, whole_numbers
from pipeline.pruning.pruners.rtn import round_to_nearest
from pipeline.pruning.pruners.sparsegpt import prune_by_sparsegpt
from pipeline.specs import AWQ, GPTQ, RTN, Quantizer, SparseGPT

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
            step = span / (2**bits - 1) * (1 + 2**-7)  # rounded up to eight bits
            assert (own - new).abs().max() <= step / 2 * (1 + 1e-3)
            assert len(new.unique()) <= 2**bits
            if not symmetric:  # up to the whole number that stands for 0
                assert abs(float(new.max() - new.min()) - span) <= step


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_stays_zero_and_a_group_of_zeros_as_well(symmetric: bool) -> None:
    weight = drawn(4, 32)
    weight[:, ::3] = 0
    weight[1, :16] = 0
    rounded = rtn(weight, bits=3, group_size=16, symmetric=symmetric)
    assert (rounded[weight == 0] == 0).all()
    assert rounded.isfinite().all()


def test_a_symmetric_grid_is_that_of_gptqs_code() -> None:
    weight = torch.tensor([[-1.875, 0.15, 0.9375, 1.25]])
    grid = grid_of(weight, RTN(bits=4, group_size=4))
    assert grid.scale.item() == 2 * 1.875 / 15
    assert (grid.zero.item(), grid.levels) == (8.0, 16)
    assert rtn(weight, bits=4, group_size=4)[0].tolist() == [-2.0, 0.25, 1.0, 1.25]


def test_a_scale_has_eight_bits_and_no_weight_is_beyond_the_grid() -> None:
    weight = drawn(64, 128)
    scale = grid_of(weight, RTN(bits=8, group_size=32)).scale
    exact = 2 * weight.unflatten(1, (4, 32)).abs().amax(dim=2).T / 255
    assert torch.equal(scale.bfloat16().float(), scale)
    assert (scale >= exact).all()
    assert (scale <= exact * (1 + 2**-7)).all()


# -------------------------------------------------------------------------------------------- awq


def awq(weight: Tensor, hessian: Tensor, **options: object) -> tuple[Tensor, dict[str, float]]:
    found = quantize_by_awq(weight, {"hessian": hessian}, DENSE, AWQ.model_validate(options))
    assert found.weight is not None
    return found.weight, dict(found.facts)


def salient(columns: int, seed: int) -> Tensor:
    """Inputs `[tokens, columns]` of which every eighth is fifty times as large as the others."""
    inputs = np.random.default_rng(seed).normal(size=(300, columns))
    inputs[:, ::8] *= 50
    return torch.from_numpy(inputs).float()


def test_awq_chooses_the_power_whose_outputs_change_least() -> None:
    """Against outputs in float64, with every weight rounded by itself."""
    inputs, weight = salient(32, 0), drawn(4, 32)
    hessian = inputs.T @ inputs / len(inputs)
    found, facts = awq(weight, hessian, group_size=16, steps=10)
    size = (inputs.double() ** 2).mean(0).sqrt()
    losses = []
    for power in range(10):
        scale = (size ** (power / 10)).numpy()
        scaled = torch.from_numpy(weight.double().numpy() * scale)
        steps, zeros = spacing(scaled, RTN(group_size=16))
        numbers = np.clip(np.round(scaled.numpy() / steps) + zeros, 0, 15)
        rounded = torch.from_numpy((numbers - zeros) * steps / scale)
        change = inputs.double() @ (rounded - weight.double()).T
        losses.append(float((change**2).sum()))
    assert facts["power"] == np.argmin(losses) / 10 > 0
    assert facts["error_share"] == pytest.approx(min(losses) / losses[0], rel=1e-3)
    own = float(((inputs.double() @ (found - weight).double().T) ** 2).sum())
    assert own == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.parametrize("bits", [3, 4])
def test_awq_protects_salient_inputs_and_never_loses_more_than_plain_rounding(bits: int) -> None:
    for seed in range(5):
        weight, inputs = drawn(16, 64, seed), salient(64, seed)
        hessian = inputs.T @ inputs / len(inputs)
        plain = error(weight, rtn(weight, bits=bits, group_size=32), hessian)
        assert (
            error(weight, awq(weight, hessian, bits=bits, group_size=32)[0], hessian) < 0.75 * plain
        )
        alike = torch.eye(64)
        scaled, facts = awq(weight, alike, bits=bits, group_size=32)
        assert torch.equal(scaled, rtn(weight, bits=bits, group_size=32))
        assert facts == {"power": 0.0, "error_share": 1.0}


def test_awq_scales_no_input_that_never_comes() -> None:
    weight, hessian = drawn(4, 32), correlated(32)
    hessian[7], hessian[:, 7] = 0, 0
    assert awq(weight, hessian)[0].isfinite().all()


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


def spacing(weight: Tensor, options: Quantizer) -> tuple[np.ndarray, np.ndarray]:
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
        mantissa, exponent = np.frexp((high - low) / (2**options.bits - 1))
        scales[row, part] = np.ldexp(np.ceil(mantissa * 2**8), exponent - 8)
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


# ----------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_rounded_weight_is_whole_numbers_times_scales(
    dtype: torch.dtype, bits: int, sparsity: float
) -> None:
    """In the weight's type, to the bit, as readers of packed checkpoints multiply."""
    options = {"bits": bits, "group_size": 16}
    weight = 0.02 * drawn(64, 64)
    weight[3, :16] = 0
    rounded = gptq(weight, correlated(64), sparsity=sparsity, **options).to(dtype)
    numbers, scale = whole_numbers("w", rounded, GPTQ.model_validate(options))
    assert (numbers.dtype, scale.dtype, scale.shape) == (torch.int8, dtype, (64, 4))
    assert -(2 ** (bits - 1)) <= int(numbers.min()) < int(numbers.max()) < 2 ** (bits - 1)
    product = numbers.to(dtype) * scale.repeat_interleave(16, dim=1)
    assert torch.equal(product, rounded)


def test_what_is_not_rounded_has_no_whole_numbers() -> None:
    with pytest.raises(RoundingError, match=r"w: 8 of 8 groups are no multiples"):
        whole_numbers("w", drawn(2, 64), GPTQ(group_size=16))
    one = rtn(drawn(2, 64), group_size=16)
    one[1, 5] *= 1.01
    with pytest.raises(RoundingError, match=r"w: 1 of 8 groups are no multiples"):
        whole_numbers("w", one, GPTQ(group_size=16))
