"""The two implementations of each pruner, ours and the plain one, on the same models; and the plain
DSnoT, row by row, against its rules in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.agreement import compare_masks
from benchmarks.baseline import METHODS, dsnot, masks
from benchmarks.baseline.choice import PlainChoice
from benchmarks.baseline.walk import linears, prune_plainly
from benchmarks.geometry import Geometry
from benchmarks.measure import PRUNER_NAMES, pruner_spec
from benchmarks.replay import replay
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.prune import prune_model
from pipeline.specs import Pattern

SMALL = Geometry("small", 64, 160, 3, 4, 2, 96, nsamples=6, seqlen=40)
UNSTRUCTURED_OR_PATTERN = pytest.mark.parametrize(
    ("sparsity", "pattern"), [(0.6, None), (0.5, Pattern(2, 4))], ids=["unstructured", "2:4"]
)


def model() -> Any:
    return SMALL.model(torch.device("cpu"), torch.float32)


def pruned_by_pipeline(name: str, sparsity: float, pattern: Pattern | None) -> Any:
    pruned = model()
    pruner = pruner_spec(name)
    windows = SMALL.windows() if pruner.calibrated else None
    prune_model(pruned, windows, pruner, ModelTarget(LayerTarget(sparsity, pattern)))
    return pruned


@UNSTRUCTURED_OR_PATTERN
@pytest.mark.parametrize("name", PRUNER_NAMES)
def test_the_pipelines_masks_equal_the_plain_ones_up_to_float32_ties(
    name: str, sparsity: float, pattern: Pattern | None
) -> None:
    pruned = pruned_by_pipeline(name, sparsity, pattern)
    agreement = compare_masks(name, model(), pruned, SMALL.windows(), sparsity, pattern)
    assert agreement.weights == sum(each.weight.numel() for each in linears(pruned.model).values())
    assert agreement.differing <= 1e-3 * agreement.weights
    assert agreement.largest_gap < 1e-4


@UNSTRUCTURED_OR_PATTERN
@pytest.mark.parametrize("name", METHODS)
def test_the_plain_walk_prunes_exactly_the_share_asked_for(
    name: str, sparsity: float, pattern: Pattern | None
) -> None:
    pruned = model()
    prune_plainly(pruned, SMALL.windows(), METHODS[name], sparsity, pattern)
    for linear in linears(pruned.model).values():
        zero = linear.weight == 0
        if pattern is not None:
            assert bool((zero.view(-1, pattern[1]).sum(1) == pattern[1] - pattern[0]).all())
        elif name in ("wanda", "dsnot"):
            assert bool((zero.sum(1) == math.floor(sparsity * linear.in_features)).all())
        else:
            assert int(zero.sum()) == math.floor(sparsity * zero.numel())


def test_sparsegpts_update_equals_the_plain_one() -> None:
    ours, plain = pruned_by_pipeline("sparsegpt", 0.6, None), model()
    prune_plainly(plain, SMALL.windows(), METHODS["sparsegpt"], 0.6, None)
    for name, linear in linears(ours.model.layers[0]).items():
        expected = linears(plain.model.layers[0])[name].weight
        torch.testing.assert_close(linear.weight, expected, rtol=1e-3, atol=1e-4)


def test_a_comparison_counts_differing_weights_and_their_distance_from_a_tie() -> None:
    other = pruned_by_pipeline("magnitude", 0.6, None)
    agreement = compare_masks("wanda", model(), other, SMALL.windows(), 0.6, None)
    assert agreement.differing > 100
    assert agreement.largest_gap > 0.01


# --------------------------------------------------------------------------------- DSnoT on rows


def moments_of(inputs: Tensor) -> dsnot.Moments:
    """Statistics of windows `[windows, tokens, columns]`."""
    moments = dsnot.Moments(inputs.shape[-1], inputs.device)
    for window in inputs:
        moments.update(window)
    return moments


def row_problem() -> tuple[Tensor, Tensor]:
    """Weights `[rows, columns]` and inputs `[windows, tokens, columns]` of unequal means."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(48, 32, generator=generator)
    inputs = torch.randn(5, 20, 32, generator=generator) * torch.rand(32, generator=generator)
    return weight, inputs + 0.2 * torch.randn(32, generator=generator)


def test_dsnots_moments_are_the_mean_sum_and_variance_of_a_window() -> None:
    _, inputs = row_problem()
    moments = moments_of(inputs)
    tokens = inputs.double().flatten(0, 1)
    torch.testing.assert_close(moments.sums.double(), tokens.sum(0) / 5, rtol=1e-4, atol=1e-5)
    variance = inputs.double().var(1, correction=0).mean(0)
    torch.testing.assert_close(moments.variance.double(), variance, rtol=1e-5, atol=0)


@UNSTRUCTURED_OR_PATTERN
def test_plain_dsnot_follows_its_rules_in_every_row(
    sparsity: float, pattern: Pattern | None
) -> None:
    weight, inputs = row_problem()
    moments = moments_of(inputs)
    initial = METHODS["wanda"].choose(
        "self_attn.q_proj", weight, moments.squared_norms, sparsity, pattern
    )
    choice = METHODS["dsnot"].choose("self_attn.q_proj", weight, moments, sparsity, pattern)
    assert int((choice.mask != initial.mask).any(dim=1).sum()) > 30  # rows do swap
    tokens = inputs.double().flatten(0, 1)
    scores = weight.double().abs() * tokens.square().sum(0).sqrt()
    contributions = weight.double() * tokens.sum(0) / len(inputs)
    variances = inputs.double().var(1, correction=0).mean(0).tolist()
    zeros = masks.zero_count(sparsity, weight.shape[1])
    for row, mask in enumerate(choice.mask):
        expected = replay(
            scores[row].tolist(), contributions[row].tolist(), variances, zeros, pattern
        )
        zeroed = set(mask.nonzero().flatten().tolist())
        assert zeroed == expected.zeroed or expected.closest < 1e-5, row


def test_dsnot_lowers_the_expected_error_of_most_rows() -> None:
    weight, inputs = row_problem()
    moments = moments_of(inputs)

    def error(choice: PlainChoice) -> Tensor:
        return (weight * moments.sums * choice.mask).sum(dim=1).abs()

    name = "self_attn.q_proj"
    before = METHODS["wanda"].choose(name, weight, moments.squared_norms, 0.6, None)
    after = METHODS["dsnot"].choose(name, weight, moments, 0.6, None)
    assert float(error(after).median()) < 0.5 * float(error(before).median())


def test_dsnot_keeps_wandas_mask_in_the_mlp() -> None:
    weight, inputs = row_problem()
    moments = moments_of(inputs)
    initial = METHODS["wanda"].choose("mlp.up_proj", weight, moments.squared_norms, 0.6, None)
    choice = METHODS["dsnot"].choose("mlp.up_proj", weight, moments, 0.6, None)
    assert choice.mask.equal(initial.mask)
