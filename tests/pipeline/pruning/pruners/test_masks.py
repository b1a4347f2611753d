import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.models.matrices import set_to_zero
from pipeline.pruning.pruners import masks
from pipeline.pruning.pruners.masks import (
    smallest,
    smallest_in_columns,
    smallest_in_groups,
    smallest_in_rows,
    zeros_in,
)


def scores(rows: int, columns: int, seed: int) -> Tensor:
    """Few distinct values, so that ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (rows, columns), generator=generator).float()


def brute_force(row: list[float], zeros: int) -> list[bool]:
    """Zero the smallest one at a time, the first of equal ones."""
    gone = [False] * len(row)
    for _ in range(zeros):
        left = [(value, place) for place, value in enumerate(row) if not gone[place]]
        gone[min(left)[1]] = True
    return gone


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 999), st.integers(1, 300_000_000))
def test_decimal_sparsities_are_counted_as_they_are_written(thousandths: int, count: int) -> None:
    exact = math.floor(Fraction(thousandths, 1000) * count)
    assert zeros_in(thousandths / 1000, count) == exact


@pytest.mark.parametrize(
    ("sparsity", "count", "zeros"),
    [(0.29, 100, 29), (0.7, 10, 7), (0.6, 128, 76), (0.95, 28672 * 8192, 223136972)],
)
def test_counts_where_floating_point_or_its_correction_could_be_off_by_one(
    sparsity: float, count: int, zeros: int
) -> None:
    assert zeros_in(sparsity, count) == zeros


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99), st.floats(0, 0.99))
def test_rows_and_matrices_lose_exactly_the_smallest_first_ones(
    rows: int, columns: int, seed: int, sparsity: float
) -> None:
    values = scores(rows, columns, seed)
    zeros = zeros_in(sparsity, columns)
    expected = [brute_force(row.tolist(), zeros) for row in values]
    assert smallest_in_rows(values, zeros).tolist() == expected
    zeros = zeros_in(sparsity, rows * columns)
    flat = brute_force(values.flatten().tolist(), zeros)
    assert smallest(values, zeros).flatten().tolist() == flat


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99), st.data())
def test_groups_keep_the_best_of_all_choices(
    rows: int, groups: int, group: int, seed: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, group))
    values = scores(rows, groups * group, seed)
    mask = smallest_in_groups(values, kept, group)
    for row, row_mask in zip(values, mask, strict=True):
        for start in range(0, groups * group, group):
            part, part_mask = row[start : start + group], row_mask[start : start + group]
            best = max(sum(choice) for choice in itertools.combinations(part.tolist(), kept))
            assert int((~part_mask).sum()) == kept
            assert float(part[~part_mask].sum()) == best


def test_infinite_scores_and_scores_of_zero_are_counted_like_others() -> None:
    values = torch.tensor([[0.0, float("inf"), 0.0, 0.0, float("inf"), 1.0]])
    assert smallest(values, 2).tolist() == [[True, False, True, False, False, False]]
    assert smallest(values, 5).tolist() == [[True, True, True, True, False, True]]


def test_a_transposed_matrix_is_read_in_its_own_row_order() -> None:
    values = torch.zeros(2, 3).T
    assert smallest(values, 3).tolist() == [[True, True], [True, False], [False, False]]


def test_columns_that_a_pattern_does_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="6 columns are no multiple of the pattern's 4"):
        smallest_in_groups(torch.ones(2, 6), 2, 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 300), st.integers(0, 99), st.data())
def test_groups_of_any_size_lose_the_same_as_rows_of_that_size(
    rows: int, groups: int, group: int, seed: int, data: st.DataObject
) -> None:
    """Short rows are ranked by another method than long ones."""
    kept = data.draw(st.integers(1, group))
    values = scores(rows, groups * group, seed)
    expected = smallest_in_rows(values.view(-1, group), group - kept).view(values.shape)
    assert smallest_in_groups(values, kept, group).equal(expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 99), st.data())
def test_columns_lose_the_same_as_rows_whether_in_an_array_or_a_tensor(
    few: int, columns: int, seed: int, data: st.DataObject
) -> None:
    """Arrays with few rows are ranked by another method than those with many, and than tensors."""
    zeros = data.draw(st.integers(0, few))
    values = scores(few, columns, seed)
    values[:, seed % columns] = float("inf")
    expected = [brute_force(column.tolist(), zeros) for column in values.T]
    assert smallest_in_columns(values.numpy(), zeros).T.tolist() == expected
    assert smallest_in_columns(values, zeros).T.tolist() == expected


def test_many_groups_are_ranked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = scores(7, 36, seed=1)
    whole = smallest_in_groups(values, 2, 4)
    monkeypatch.setattr(masks, "_CACHED", 20)  # five groups; 63 are no multiple of that
    assert smallest_in_groups(values, 2, 4).equal(whole)


@pytest.mark.parametrize("zeros", [0, 1, 5, 11, 12])
def test_the_order_of_a_stable_sort_decides(zeros: int) -> None:
    values = torch.cat([scores(40, 12, seed=2), torch.randn(40, 12), torch.zeros(40, 12)])
    expected = torch.zeros_like(values, dtype=torch.bool)
    expected.scatter_(1, values.argsort(dim=1, stable=True)[:, :zeros], True)
    assert smallest_in_rows(values, zeros).equal(expected)


@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_score_that_is_nan_is_an_error(place: int) -> None:
    values = torch.rand(3, 12)
    values[1, place] = float("nan")
    values[2, 3] = float("inf")
    for choose in (
        lambda: smallest(values, 4),
        lambda: smallest_in_rows(values, 4),
        lambda: smallest_in_groups(values, 2, 4),
    ):
        with pytest.raises(ValueError, match="a score is NaN"):
            choose()


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda: zeros_in(1.5, 8), "no share"),
        (lambda: zeros_in(-0.1, 8), "no share"),
        (lambda: zeros_in(float("nan"), 8), "no share"),
        (lambda: smallest(torch.rand(2, 4), 9), "9 zeros of 8 scores"),
        (lambda: smallest_in_rows(torch.rand(2, 4), 5), "5 zeros of 4 scores"),
        (lambda: smallest_in_rows(torch.rand(2, 4), -1), "-1 zeros of 4 scores"),
        (lambda: smallest_in_groups(torch.rand(2, 4), 5, 4), "5:4"),
        (lambda: smallest_in_groups(torch.rand(2, 4), -1, 4), "-1:4"),
        (lambda: smallest_in_groups(torch.rand(2, 4), 0, 0), "0:0"),
    ],
)
def test_a_count_that_cannot_be_is_an_error(choose: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_set_to_zero_is_a_positive_zero_and_the_rest_keeps_its_bits(
    dtype: torch.dtype,
) -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] = torch.tensor([-0.0, torch.nan, -torch.inf, 1e-45], dtype=dtype)
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0] = torch.tensor([False, True, True, False])
    before = weight.clone()
    expected = before.masked_fill(mask, 0.0)
    set_to_zero(weight.T, mask.T)  # a view with other strides, as experts may have
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(weight.view(bits), expected.view(bits))
    assert 0 < int(mask.sum()) < mask.numel()
