import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pipeline.pruning.input_statistics import HESSIAN_ROWS, STATISTICS, Statistic

CPU = torch.device("cpu")


def windows(count: int, seqlen: int, columns: int, seed: int, offset: float = 1.0) -> Tensor:
    """`[count, seqlen, columns]`, each window with a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, seqlen, columns, generator=generator) * 3
    return noise + torch.randn(count, 1, columns, generator=generator) + offset


def gathered(name: str, parts: list[Tensor], count: int) -> Statistic:
    statistic = STATISTICS[name](parts[0].shape[-1], count, CPU)
    for part in parts:
        statistic.update(part)
    return statistic


def exact(name: str, inputs: Tensor) -> NDArray[np.float64]:
    """Each statistic of `[windows, seqlen, columns]` by its definition, in float64."""
    by_window = inputs.double().numpy()
    tokens = by_window.reshape(-1, inputs.shape[-1])
    match name:
        case "squared_norms":
            return (tokens**2).sum(axis=0)
        case "window_sums":
            return by_window.sum(axis=1).mean(axis=0)
        case "hessian":
            return tokens.T @ tokens
        case "variances":
            return tokens.var(axis=0)
        case "pooled_variances":
            return by_window.var(axis=1).mean(axis=0)
    raise AssertionError(f"{name} has no definition in this test")


def close(found: Tensor, name: str, inputs: Tensor) -> None:
    """Compare to the definition, within the rounding of the terms: their sum may be near zero."""
    assert found.dtype == torch.float32
    expected = exact(name, inputs)
    scale = float(np.abs([expected, exact(name, inputs.abs())]).max()) + 1e-9
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("name", STATISTICS)
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99)
)
def test_every_statistic_equals_its_definition_in_batches_of_any_size(
    name: str, count: int, seqlen: int, columns: int, batch: int, seed: int
) -> None:
    inputs = windows(count, seqlen, columns, seed)
    for parts in (inputs.split(batch), inputs.split(1)):
        close(gathered(name, list(parts), count).value, name, inputs)


@pytest.mark.parametrize("name", STATISTICS)
@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(1, 11), st.integers(0, 99))
def test_statistics_of_parts_of_the_windows_merge_to_those_of_all(
    name: str, count: int, cut: int, seed: int
) -> None:
    inputs = windows(count, 5, 4, seed)
    cut = min(cut, count - 1)
    one, two = gathered(name, [inputs[:cut]], count), gathered(name, [inputs[cut:]], count)
    before = two.value.clone()
    one.merge(two)
    close(one.value, name, inputs)
    assert torch.equal(two.value, before)


@pytest.mark.parametrize("beyond", [-1, 0, 1, HESSIAN_ROWS + 1])
def test_a_hessian_of_several_strips_is_whole_after_every_batch(beyond: int) -> None:
    inputs = windows(4, 5, HESSIAN_ROWS + beyond, seed=4)
    statistic, other = (gathered("hessian", [inputs[[part]]], 4) for part in (0, 1))
    close(statistic.value, "hessian", inputs[:1])
    statistic.update(inputs[2:])
    statistic.merge(other)
    close(statistic.value, "hessian", inputs)


@pytest.mark.parametrize("name", STATISTICS)
def test_parts_that_saw_no_token_change_nothing(name: str) -> None:
    inputs = windows(3, 5, 4, seed=1)
    statistic = gathered(name, [inputs, inputs[0, :0], inputs[:0]], 3)
    statistic.merge(STATISTICS[name](4, 3, CPU))
    close(statistic.value, name, inputs)
    other = STATISTICS[name](4, 3, CPU)
    assert not bool(other.value.any())
    other.merge(statistic)
    close(other.value, name, inputs)


@pytest.mark.parametrize("name", STATISTICS)
def test_routed_tokens_count_as_tokens_and_only_the_windows_of_the_whole_set_as_windows(
    name: str,
) -> None:
    """An expert sees 7 tokens of 3 windows. Its statistics are those with all other tokens at zero,
    but its variances are those of its own tokens."""
    tokens = windows(1, 7, 4, seed=2)[0]
    found = gathered(name, [tokens], 3).value
    if name == "window_sums":
        found = found * 3
    close(found, "variances" if "variances" in name else name, tokens[None])


@pytest.mark.parametrize("name", STATISTICS)
def test_the_inputs_stay_as_they_were(name: str) -> None:
    inputs = windows(2, 9, 5, seed=2)
    before = inputs.clone()
    gathered(name, [inputs, inputs], 4)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("name", ["squared_norms", "window_sums", "hessian"])
def test_sums_are_updated_in_place(name: str) -> None:
    statistic = STATISTICS[name](5, 2, CPU)
    place = statistic.value.data_ptr()
    for part in windows(2, 9, 5, seed=2):
        statistic.update(part[None])
        assert statistic.value.data_ptr() == place


@pytest.mark.parametrize("name", ["variances", "pooled_variances"])
@pytest.mark.parametrize("offset", [1e4, -3e5])
def test_a_small_variance_around_a_large_mean_is_exact(name: str, offset: float) -> None:
    """In float32 the mean's square would lose all digits of the variance, and the mean too many."""
    inputs = windows(16, 64, 6, seed=3) * 0.5 + offset
    expected = exact(name, inputs)
    assert float(expected.max()) < 5
    for parts in (inputs.split(16), inputs.split(3), inputs.split(1)):
        found = gathered(name, list(parts), 16).value.double().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_windows_with_means_far_apart_have_a_large_variance_but_a_small_pooled_one() -> None:
    inputs = torch.randn(8, 32, 3) * 0.1 + torch.arange(8.0)[:, None, None] * 1000
    total, pooled = (
        gathered(name, list(inputs.split(3)), 8).value for name in ("variances", "pooled_variances")
    )
    close(total, "variances", inputs)
    assert bool((total > 1e6).all())
    assert bool((pooled < 0.02).all())


@pytest.mark.parametrize("name", ["variances", "pooled_variances"])
def test_constant_inputs_have_no_variance_at_all(name: str) -> None:
    inputs = torch.tensor([0.1, -7.3, 1e6, 0.0]).expand(4, 50, 4)
    assert gathered(name, list(inputs.split(3)), 4).value.tolist() == [0.0] * 4


@pytest.mark.parametrize("name", ["squared_norms", "window_sums", "variances"])
def test_a_large_calibration_set_loses_no_precision_that_matters(name: str) -> None:
    """As many tokens as 128 windows of 2048, of a mean far from zero."""
    part = windows(8, 2048, 4, seed=3, offset=30)
    found = gathered(name, [part] * 16, 128).value.double().numpy()
    expected = exact(name, part) * (16 if name == "squared_norms" else 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
