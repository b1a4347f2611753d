import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.statistics import STATISTICS, RunningSum

CPU = torch.device("cpu")


def tokens(count: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator) * 3 + 1


def total(name: str, parts: list[Tensor]) -> RunningSum:
    statistic = STATISTICS[name](parts[0].shape[1], CPU)
    for part in parts:
        statistic.update(part)
    return statistic


def exact(name: str, inputs: Tensor) -> Tensor:
    gram = inputs.double().T @ inputs.double()
    return {"squared_norms": gram.diagonal(), "hessian": gram}[name]


@pytest.mark.parametrize("name", STATISTICS)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 60), st.integers(0, 99))
def test_sums_are_those_of_float64_however_the_tokens_are_batched(
    name: str, count: int, columns: int, batch: int, seed: int
) -> None:
    inputs = tokens(count, columns, seed)
    expected = exact(name, inputs)
    for parts in (inputs.split(batch), inputs.split(1)):
        found = total(name, list(parts)).total
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", STATISTICS)
def test_sums_over_parts_of_the_tokens_merge_to_the_sum_over_all(name: str) -> None:
    inputs = tokens(50, 7, seed=1)
    one, two = total(name, [inputs[:20]]), total(name, [inputs[20:]])
    before = two.total.clone()
    one.merge(two)
    torch.testing.assert_close(one.total.double(), exact(name, inputs), rtol=1e-5, atol=1e-3)
    assert torch.equal(two.total, before)


@pytest.mark.parametrize("name", STATISTICS)
def test_the_sum_stays_in_its_place_and_the_inputs_stay_as_they_were(name: str) -> None:
    inputs = tokens(9, 5, seed=2)
    before = inputs.clone()
    statistic = STATISTICS[name](5, CPU)
    place = statistic.total.data_ptr()
    statistic.update(inputs)
    statistic.update(inputs)
    assert statistic.total.data_ptr() == place
    assert torch.equal(inputs, before)


def test_a_large_calibration_set_loses_no_precision_that_matters() -> None:
    """As many tokens as 128 windows of 2048, of a mean far from zero."""
    part = tokens(16_384, 4, seed=3) + 30
    found = total("squared_norms", [part] * 16).total.double()
    torch.testing.assert_close(found, 16 * exact("squared_norms", part), rtol=1e-5, atol=0)
