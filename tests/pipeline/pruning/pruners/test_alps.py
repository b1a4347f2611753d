"""ALPS against exact least squares on the mask that it found, and against other pruners."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.alps import prune_by_alps
from pipeline.pruning.pruners.base import Pruned
from pipeline.pruning.pruners.sparsegpt import prune_by_sparsegpt
from pipeline.specs import ALPS, Pattern, SparseGPT

Floats = NDArray[np.float64]


def example(rows: int, columns: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight `[rows, columns]` and correlated inputs `[tokens, columns]`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3
    scale = torch.rand(columns, generator=generator) * 3 + 0.1
    return weight, torch.randn(tokens, columns, generator=generator) @ mixing * scale


def damped(inputs: Tensor, damping: float) -> Floats:
    exact = inputs.double().numpy()
    hessian = exact.T @ exact
    return hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))


def best_on(mask: NDArray[np.bool_], weight: Floats, hessian: Floats) -> Floats:
    """Each row's least squares solution on the weights that are not masked."""
    fitted = np.zeros_like(weight)
    for row, (masked, dense) in enumerate(zip(mask, weight, strict=True)):
        kept = np.flatnonzero(~masked)
        gram = hessian[np.ix_(kept, kept)]
        fitted[row, kept] = np.linalg.lstsq(gram, hessian[kept] @ dense, rcond=None)[0]
    return fitted


def loss(weight: Floats, pruned: Floats, hessian: Floats) -> float:
    apart = pruned - weight
    return float(np.einsum("ij,jk,ik->", apart, hessian, apart))


def textbook(weight: Floats, hessian: Floats, kept: int) -> tuple[NDArray[np.bool_], int, float]:
    """Algorithm 1 and the steps of rho in section 3.2 of the paper, one linear system at a time.

    Returns:
        The mask, the iterations, and the last rho.
    """
    scale = np.sqrt(np.diag(hessian))
    gram, dense = hessian / np.outer(scale, scale), weight * scale

    def largest(values: Floats) -> NDArray[np.bool_]:
        support = np.zeros(values.size, dtype=bool)
        support[np.argsort(-np.abs(values), axis=None)[:kept]] = True
        return support.reshape(values.shape)

    rho, support = 0.1, largest(dense)
    sparse, dual, earlier = dense * support, np.zeros_like(dense), support
    for iteration in itertools.count(1):
        right = dense @ gram - dual + rho * sparse
        fitted = np.linalg.solve(gram + rho * np.eye(len(gram)), right.T).T
        support = largest(fitted + dual / rho)
        sparse = (fitted + dual / rho) * support
        dual = dual + rho * (fitted - sparse)
        if iteration % 3 == 0:
            changed = int((support != earlier).sum())
            if changed == 0:
                return ~support, iteration, rho
            rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
            earlier = support
    raise AssertionError


def updated(pruned: Pruned) -> Floats:
    assert pruned.weight is not None
    return pruned.weight.double().numpy()


@pytest.mark.parametrize(
    ("sparsity", "pattern"),
    [
        (0.5, None),
        (0.7, None),
        (0.9, None),
        (0.5, Pattern(2, 4)),
        (0.75, Pattern(1, 4)),
        (0.5, Pattern(4, 8)),
    ],
)
def test_the_weights_are_all_but_the_best_ones_for_the_mask(
    sparsity: float, pattern: Pattern | None
) -> None:
    for seed in range(3):
        weight, inputs = example(24, 64, 300, seed)
        pruned = prune_by_alps(
            weight, {"hessian": inputs.T @ inputs}, LayerTarget(sparsity, pattern), ALPS()
        )
        exact, hessian = weight.double().numpy(), damped(inputs, 0.01)
        best = loss(exact, best_on(pruned.mask.numpy(), exact, hessian), hessian)
        found = loss(exact, updated(pruned), hessian)
        assert best * (1 - 1e-4) <= found <= best * 1.01


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_the_mask_and_rho_are_those_of_the_papers_algorithm_in_float64(sparsity: float) -> None:
    for seed in range(3):
        weight, inputs = example(40, 64, 300, seed)
        hessian = inputs.T @ inputs
        pruned = prune_by_alps(weight, {"hessian": hessian}, LayerTarget(sparsity), ALPS())
        kept = weight.numel() - math.floor(sparsity * weight.numel())
        mask, iterations, rho = textbook(weight.double().numpy(), damped(inputs, 0.01), kept)
        assert (pruned.mask.numpy() == mask).mean() > 0.999
        assert pruned.facts["iterations"] == iterations
        assert pruned.facts["rho"] == pytest.approx(rho)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 10), st.integers(1, 30), st.integers(0, 999))
def test_small_matrices_of_any_shape_have_the_exact_weights_for_the_mask(
    rows: int, columns: int, tokens: int, seed: int
) -> None:
    """At most as many columns as steps: conjugate gradients end at the solution."""
    weight, inputs = example(rows, columns, tokens, seed)
    options = ALPS(damping=0.05)
    pruned = prune_by_alps(weight, {"hessian": inputs.T @ inputs}, LayerTarget(0.5), options)
    exact, hessian = weight.double().numpy(), damped(inputs, 0.05)
    best = best_on(pruned.mask.numpy(), exact, hessian)
    tolerance = 5e-3 * float(np.abs(best).max()) + 1e-5
    np.testing.assert_allclose(updated(pruned), best, rtol=5e-3, atol=tolerance)


def test_the_mask_is_near_the_best_of_all_masks() -> None:
    """One row of 8 inputs has 70 masks of half its weights."""
    ratios = []
    for seed in range(30):
        weight, inputs = example(1, 8, 100, seed)
        pruned = prune_by_alps(weight, {"hessian": inputs.T @ inputs}, LayerTarget(0.5), ALPS())
        exact, hessian = weight.double().numpy(), damped(inputs, 0.01)
        losses = []
        for gone in itertools.combinations(range(8), 4):
            mask = np.isin(np.arange(8), gone)[None]
            losses.append(loss(exact, best_on(mask, exact, hessian), hessian))
        ratios.append(loss(exact, updated(pruned), hessian) / min(losses))
    assert np.median(ratios) < 1.2
    assert sum(ratio < 1.001 for ratio in ratios) >= 10


@pytest.mark.parametrize("tokens", [40, 400])
@pytest.mark.parametrize(
    ("sparsity", "pattern"),
    [(0.6, None), (0.8, None), (0.95, None), (0.5, Pattern(2, 4)), (0.75, Pattern(1, 4))],
)
def test_the_outputs_error_is_smaller_than_sparsegpts(
    tokens: int, sparsity: float, pattern: Pattern | None
) -> None:
    for seed in range(5):
        weight, inputs = example(48, 96, tokens, seed)
        statistics = {"hessian": inputs.T @ inputs}
        exact, hessian = weight.double().numpy(), damped(inputs, 0.0)
        alps, surgeon = (
            loss(exact, updated(pruned), hessian)
            for pruned in (
                prune_by_alps(weight, statistics, LayerTarget(sparsity, pattern), ALPS()),
                prune_by_sparsegpt(weight, statistics, LayerTarget(sparsity, pattern), SparseGPT()),
            )
        )
        assert alps < surgeon


def test_with_inputs_of_no_correlation_little_more_is_lost_than_the_smallest_scores() -> None:
    """No weight can make up for another: the least loss is that of the smallest |W| * ||X||, and
    the kept weights stay as they are."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(12, 20, generator=generator)
        hessian = torch.diag(torch.rand(20, generator=generator) + 0.1)
        pruned = prune_by_alps(weight, {"hessian": hessian}, LayerTarget(0.5), ALPS(damping=1e-6))
        losses = weight.square() * hessian.diagonal()
        least = float(losses.flatten().sort().values[:120].sum())
        assert least * (1 - 1e-5) <= float(losses[pruned.mask].sum()) < least * 1.05
        assert pruned.weight is not None
        torch.testing.assert_close(pruned.weight, weight.masked_fill(pruned.mask, 0.0))


def test_the_scale_of_the_hessian_does_not_matter_even_with_dead_columns() -> None:
    weight, inputs = example(6, 12, 60, seed=11)
    inputs[:, [2, 7, 8]] = 0.0
    hessian = inputs.T @ inputs
    one, two = (
        prune_by_alps(weight, {"hessian": scale * hessian}, LayerTarget(0.5), ALPS())
        for scale in (1.0, 2.0**-12)
    )
    assert one.facts["dead_columns"] == 3
    assert torch.equal(one.mask, two.mask)
    assert one.weight is not None
    assert two.weight is not None
    torch.testing.assert_close(one.weight, two.weight)


def test_dead_columns_beyond_the_count_keep_their_weights() -> None:
    weight, inputs = example(4, 8, 60, seed=12)
    inputs[:, 1:5] = 0.0
    pruned = prune_by_alps(weight, {"hessian": inputs.T @ inputs}, LayerTarget(0.25), ALPS())
    assert not bool(pruned.mask[:, [0, 5, 6, 7]].any())
    assert pruned.weight is not None
    torch.testing.assert_close(pruned.weight[~pruned.mask], weight[~pruned.mask])


def test_the_iterations_end_when_the_mask_no_longer_changes() -> None:
    weight, inputs = example(24, 64, 300, seed=1)
    facts = prune_by_alps(weight, {"hessian": inputs.T @ inputs}, LayerTarget(0.6), ALPS()).facts
    assert 6 <= facts["iterations"] < 300
    assert facts["iterations"] % 3 == 0
    updates = facts["iterations"] / 3 - 1
    assert 0.1 * 1.1**updates <= facts["rho"] <= 0.1 * 1.3**updates * (1 + 1e-9)
    nothing = prune_by_alps(weight, {"hessian": inputs.T @ inputs}, LayerTarget(0.0), ALPS())
    assert nothing.facts["iterations"] == 3
    assert nothing.weight is not None
    torch.testing.assert_close(nothing.weight, weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_an_error(value: float) -> None:
    hessian = torch.eye(4)
    hessian[1, 2] = hessian[2, 1] = value
    with pytest.raises(ValueError, match="the Hessian has NaN or infinite values"):
        prune_by_alps(torch.randn(2, 4), {"hessian": hessian}, LayerTarget(0.5), ALPS())
