"""RIA against its formula, and the permutation against all others."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners import permutation
from pipeline.pruning.pruners.permutation import channel_permutation
from pipeline.pruning.pruners.ria import prune_by_ria, ria_scores
from pipeline.specs import RIA, Pattern


def example(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight `[rows, columns]` and squared norms `[columns]` of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(columns, generator=generator) + 0.1
    return weight, (torch.randn(columns, generator=generator) * 2).exp()


def retained(scores: Tensor, order: Tensor, kept: int, group: int) -> float:
    """The sum of the `kept` largest of every group, by sorting, in float64."""
    grouped = scores[:, order].double().numpy().reshape(len(scores), -1, group)
    return float(np.sort(grouped, axis=2)[:, :, group - kept :].sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 12), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_the_scores_are_the_formula_in_float64(
    rows: int, columns: int, power: float, seed: int
) -> None:
    weight, squares = example(rows, columns, seed)
    sizes = np.abs(weight.double().numpy())
    expected = np.empty_like(sizes)
    for i in range(rows):
        for j in range(columns):
            relative = sizes[i, j] / sizes[:, j].sum() + sizes[i, j] / sizes[i].sum()
            expected[i, j] = relative * np.sqrt(float(squares[j])) ** power
    found = ria_scores(weight, squares, power)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    mask = prune_by_ria(
        weight, {"squared_norms": squares}, LayerTarget(0.5), RIA(activation_power=power)
    ).mask
    chosen = set(np.argsort(expected.ravel())[: rows * columns // 2])
    assert set(np.flatnonzero(mask.numpy())) == chosen


def test_rows_and_columns_of_zeros_score_zero() -> None:
    weight, squares = example(4, 6, seed=1)
    weight[2], weight[:, 3] = 0.0, 0.0
    scores = ria_scores(weight, squares, 0.5)
    assert bool(scores.isfinite().all())
    assert bool((scores == 0).equal(weight == 0))


PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(4, 8), Pattern(1, 2)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(PATTERNS), st.integers(0, 999))
def test_a_permutation_never_retains_less(
    rows: int, groups: int, pattern: Pattern, seed: int
) -> None:
    kept, group = pattern
    scores = example(rows, groups * group, seed)[0].abs()
    order, gain = channel_permutation(scores, kept, group)
    own = torch.arange(groups * group)
    assert order.sort().values.equal(own)
    before, after = (retained(scores, each, kept, group) for each in (own, order))
    assert after >= before * (1 - 1e-9)
    assert gain == pytest.approx(after / before)
    if gain == 1.0:
        assert order.equal(own)


def test_a_permutation_is_near_the_best_of_all() -> None:
    """8 columns can be parted into two groups of 4 in 35 ways."""
    reached = []
    for seed in range(40):
        scores = example(5, 8, seed)[0].abs()
        best = max(
            retained(scores, torch.tensor([0, *rest, *sorted(set(range(1, 8)) - set(rest))]), 2, 4)
            for rest in itertools.combinations(range(1, 8), 3)
        )
        start = retained(scores, torch.arange(8), 2, 4)
        found = retained(scores, channel_permutation(scores, 2, 4)[0], 2, 4)
        assert found <= best * (1 + 1e-6)
        reached.append((found - start) / (best - start) if best > start else 1.0)
    assert np.mean(reached) > 0.8


def by_trying_all(scores: Tensor, start: Tensor, kept: int, group: int) -> float:
    """Return where one round of the search ends: at each place it tries every way to deal the
    columns."""
    groups = start.view(-1, group)
    for place in range(group):
        ways = []
        for way in itertools.permutations(groups[:, place].tolist()):
            ways.append(groups.clone())
            ways[-1][:, place] = torch.tensor(way)
        groups = max(ways, key=lambda way: retained(scores, way.flatten(), kept, group))
    return retained(scores, groups.flatten(), kept, group)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 2)])
def test_the_better_end_of_both_starts_is_taken(
    pattern: Pattern,
) -> None:
    kept, group = pattern
    better = set()
    for seed in range(12):
        scores = example(32, 4 * group, seed)[0].abs()  # so many that no two ways are alike
        dealt = scores.sum(dim=0).argsort().view(group, 4)
        dealt[1::2] = dealt[1::2].flip(1)
        ends = [
            by_trying_all(scores, start, kept, group)
            for start in (torch.arange(4 * group), dealt.T.flatten())
        ]
        better.add(ends[0] > ends[1])
        found = retained(scores, channel_permutation(scores, kept, group)[0], kept, group)
        assert found == pytest.approx(max(ends))
    if pattern == Pattern(2, 4):  # here now the one, now the other
        assert better == {True, False}


def test_strong_neighbouring_columns_get_into_different_groups() -> None:
    """Groups of four strong and four weak columns: two strong ones of each should be kept."""
    scores = torch.ones(3, 8)
    scores[:, 4:] = 0.01
    order, gain = channel_permutation(scores, 2, 4)
    assert retained(scores, order, 2, 4) == pytest.approx(3 * 4)
    assert gain == pytest.approx(3 * 4 / (3 * 2.02))


def test_large_matrices_are_refined_in_blocks_and_retain_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = example(32, 256, seed=3)[0].abs()
    whole, gain = channel_permutation(scores, 2, 4)
    monkeypatch.setattr(permutation, "BLOCK_GROUPS", 8)
    parts, smaller_gain = channel_permutation(scores, 2, 4)
    assert not whole.equal(parts)
    assert gain > smaller_gain > 1.03
    assert parts.sort().values.equal(torch.arange(256))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_mask_holds_in_the_permuted_order_and_keeps_the_best_there(
    pattern: Pattern,
) -> None:
    kept, group = pattern
    weight, squares = example(6, 32, seed=4)
    given = {"squared_norms": squares}
    pruned = prune_by_ria(
        weight, given, LayerTarget(1 - kept / group, pattern), RIA(permutation=True)
    )
    plain = prune_by_ria(weight, given, LayerTarget(1 - kept / group, pattern), RIA())
    assert pruned.permutation is not None
    assert pruned.permutation.dtype == torch.int64
    assert plain.permutation is None
    grouped = pruned.mask[:, pruned.permutation].view(6, -1, group)
    assert bool((grouped.sum(dim=2) == group - kept).all())
    scores = ria_scores(weight, squares, 0.5).double()
    sums = [float(scores[~each.mask].sum()) for each in (pruned, plain)]
    assert sums[0] == pytest.approx(retained(scores, pruned.permutation, kept, group))
    assert sums[0] > sums[1]
    assert pruned.facts["retained_score"] == pytest.approx(sums[0] / sums[1])
