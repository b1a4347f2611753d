import math
from fractions import Fraction
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.gradients import GRADIENT_SQUARES
from pipeline.pruning.input_statistics import STATISTICS
from pipeline.pruning.pruners import pruner_for, sparsegpt
from pipeline.pruning.pruners.base import Pruned
from pipeline.pruning.pruners.sparsegpt import inverse_factor
from pipeline.specs import ALPS, Magnitude, Pattern, Pruner, Quantizer, SparseGPT, Wanda

CLASSES = get_args(get_args(Pruner)[0])


def variants() -> list[Any]:
    """Every pruner with its defaults, and with every other value of its switches and choices."""
    found = []
    for kind in CLASSES:
        found.append(kind())
        for name, field in kind.model_fields.items():
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            values = (False, True) if field.annotation is bool else choices
            found += [kind(**{name: value}) for value in values if value != field.default]
    return found


VARIANTS = variants()


def takes(options: Any, pattern: Pattern | None) -> bool:
    try:
        options.check_pattern(pattern is not None)
    except ValueError:
        return False
    return True


def label(value: object) -> str | None:
    if not isinstance(value, CLASSES):
        return None
    options = value.model_dump(exclude={"name"}, exclude_defaults=True)
    return "-".join([value.name, *(f"{name}={choice}" for name, choice in options.items())])


EXACT = pytest.mark.parametrize(
    "options",
    [each for each in VARIANTS if takes(each, None) and pruner_for(each).counted_per],
    ids=label,
)
PATTERNED = pytest.mark.parametrize(
    "options", [each for each in VARIANTS if takes(each, Pattern(2, 4))], ids=label
)


def test_there_are_a_pruner_and_an_estimate_for_every_spec() -> None:
    assert len(VARIANTS) > len(CLASSES) + 5
    for options in VARIANTS:
        assert bool(pruner_for(options).statistics) == options.calibrated
        assert (GRADIENT_SQUARES in pruner_for(options).statistics) == options.gradients
        assert (options.forward_passes > 0) == options.calibrated


def correlated(tokens: int, columns: int, seed: int) -> Tensor:
    """Inputs `[tokens, columns]` whose columns depend on each other and differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    scale = torch.rand(columns, generator=generator) * 3 + 0.1
    return torch.randn(tokens, columns, generator=generator) @ (mixing + 0.5) * scale


def weights(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def prune(
    options: Any,
    weight: Tensor,
    inputs: Tensor,
    sparsity: float,
    pattern: Pattern | None = None,
) -> Pruned:
    matrix_pruner = pruner_for(options)
    parts = inputs.split(7)
    sums = {
        key: STATISTICS[key](inputs.shape[1], len(parts), inputs.device)
        for key in matrix_pruner.statistics
        if key in STATISTICS
    }
    for part in parts:
        for statistic in sums.values():
            statistic.update(part[None])
    results = {key: statistic.value for key, statistic in sums.items()}
    if options.gradients:
        outputs = inputs @ weight.T
        slopes = outputs.T @ inputs / outputs.norm().clamp(min=1e-30)
        results[GRADIENT_SQUARES] = slopes.square()
    return matrix_pruner.prune(weight, results, LayerTarget(sparsity, pattern), options)


def after(weight: Tensor, pruned: Pruned) -> Tensor:
    return (weight if pruned.weight is None else pruned.weight).masked_fill(pruned.mask, 0.0)


def error(weight: Tensor, pruned: Pruned, inputs: Tensor) -> float:
    return float((inputs @ (weight - after(weight, pruned)).T).square().sum())


# ----------------------------------------------------------------------------- all of the pruners


def counted(options: Any, sparsity: str, rows: int, columns: int) -> int:
    """Zeros by exact arithmetic, in each row or in the whole matrix."""
    if pruner_for(options).counted_per == "row":
        return rows * math.floor(Fraction(sparsity) * columns)
    return math.floor(Fraction(sparsity) * rows * columns)


def in_order(values: Tensor, pruned: Pruned) -> Tensor:
    """Columns in the order in which a pattern holds."""
    return values if pruned.permutation is None else values[:, pruned.permutation]


@EXACT
@pytest.mark.parametrize("sparsity", ["0", "0.29", "0.5", "0.7", "0.99"])
@pytest.mark.parametrize("shape", [(24, 48), (1, 48), (48, 1), (7, 130), (1, 1)])
def test_the_mask_has_exactly_the_zeros_asked_for(
    options: Any, sparsity: str, shape: tuple[int, int]
) -> None:
    weight, inputs = weights(*shape, seed=1), correlated(64, shape[1], seed=1)
    pruned = prune(options, weight, inputs, float(sparsity))
    assert pruned.mask.shape == weight.shape
    assert pruned.mask.dtype == torch.bool
    assert int(pruned.mask.sum()) == counted(options, sparsity, *shape)
    zeros = int((after(weight, pruned) == 0).sum())
    rounded = isinstance(options, Quantizer)  # which makes zeros of small weights
    assert zeros >= int(pruned.mask.sum()) if rounded else zeros == int(pruned.mask.sum())


@PATTERNED
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(3, 3)])
@pytest.mark.parametrize("shape", [(24, 48), (1, 48), (48, 24)])
def test_every_group_of_a_pattern_keeps_exactly_its_share(
    options: Any, pattern: Pattern, shape: tuple[int, int]
) -> None:
    weight, inputs = weights(*shape, seed=1), correlated(64, shape[1], seed=1)
    pruned = prune(options, weight, inputs, 1 - pattern[0] / pattern[1], pattern)
    left_out = pruned.mask if isinstance(options, Quantizer) else after(weight, pruned) == 0
    kept = in_order(~left_out, pruned)
    assert set(kept.view(shape[0], -1, pattern[1]).sum(dim=2).flatten().tolist()) == {pattern[0]}
    assert bool((after(weight, pruned)[pruned.mask] == 0).all())


@EXACT
@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from(["0.1", "0.3", "0.55", "0.9"]),
    st.integers(0, 99),
)
def test_any_shape_with_any_number_of_tokens_gets_its_count_and_finite_weights(
    options: Any, rows: int, columns: int, tokens: int, sparsity: str, seed: int
) -> None:
    weight, inputs = weights(rows, columns, seed), correlated(tokens, columns, seed)
    pruned = prune(options, weight, inputs, float(sparsity))
    assert int(pruned.mask.sum()) == counted(options, sparsity, rows, columns)
    assert bool(after(weight, pruned).isfinite().all())


@PATTERNED
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99), st.data())
def test_any_pattern_holds_with_dead_columns_and_repeated_weights_too(
    options: Any, rows: int, groups: int, group: int, seed: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, group))
    columns = groups * group
    weight, inputs = weights(rows, columns, seed).round(), correlated(30, columns, seed)
    inputs[:, :: max(2, columns // 3)] = 0.0
    pruned = prune(options, weight, inputs, 1 - kept / group, Pattern(kept, group))
    chosen = in_order(pruned.mask, pruned).view(rows, groups, group).sum(dim=2)
    assert set(chosen.flatten().tolist()) == {group - kept}


@pytest.mark.parametrize("options", VARIANTS, ids=label)
def test_what_is_given_stays_as_it_was_and_the_same_comes_out_again(options: Any) -> None:
    pattern = None if takes(options, None) else Pattern(2, 4)
    weight, inputs = weights(8, 16, seed=2), correlated(40, 16, seed=2)
    given = weight.clone(), inputs.clone()
    one = prune(options, weight, inputs, 0.5, pattern)
    two = prune(options, weight, inputs, 0.5, pattern)
    assert torch.equal(weight, given[0])
    assert torch.equal(inputs, given[1])
    assert torch.equal(one.mask, two.mask)
    assert torch.equal(after(weight, one), after(weight, two))


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind.prunes])
def test_of_equal_scores_the_first_go(kind: Any) -> None:
    """All scores are equal, so the choice is by position within the compared group."""
    options = kind()
    weight, inputs = torch.ones(4, 8), torch.eye(8).repeat(4, 1)
    mask = prune(options, weight, inputs, 0.5).mask
    expected = {
        "matrix": ["11111111", "11111111", "00000000", "00000000"],
        "row": ["11110000", "11110000", "11110000", "11110000"],
    }[pruner_for(options).counted_per]
    assert ["".join("01"[value] for value in row) for row in mask.tolist()] == expected
    pairs = prune(options, weight, inputs, 0.5, Pattern(2, 4)).mask
    assert pairs.tolist() == [[True, True, False, False] * 2] * 4


LOOKING_AT_INPUTS = [
    each
    for each in VARIANTS
    if each.calibrated and each.prunes and getattr(each, "initial", "") != "magnitude"
]


@pytest.mark.parametrize("options", LOOKING_AT_INPUTS, ids=label)
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_columns_without_input_go_first(options: Any, pattern: Pattern | None) -> None:
    weight, inputs = weights(6, 8, seed=3) + 10, correlated(50, 8, seed=3)
    inputs[:, [1, 4]] = 0.0
    if takes(options, pattern):
        mask = prune(options, weight, inputs, 0.5, pattern).mask
        assert bool(mask[:, [1, 4]].all())


@EXACT
def test_fewer_tokens_than_columns_and_constant_inputs_are_no_trouble(options: Any) -> None:
    weight = weights(6, 32, seed=4)
    for inputs in (correlated(3, 32, seed=4), torch.ones(5, 32), torch.zeros(5, 32)):
        pruned = prune(options, weight, inputs, 0.5)
        assert int(pruned.mask.sum()) == 6 * 16
        assert bool(after(weight, pruned).isfinite().all())


@pytest.mark.parametrize("options", VARIANTS, ids=label)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_an_error_or_not_asked_for(
    options: Any, value: float
) -> None:
    weight, inputs = weights(6, 8, seed=5), correlated(40, 8, seed=5)
    weight[0, 3] = 0.0  # an infinite input that is multiplied by it is NaN
    inputs[3, 3] = value
    pattern = None if takes(options, None) else Pattern(2, 4)
    if options.calibrated:
        with pytest.raises(ValueError, match=r"NaN|cannot be inverted"):
            prune(options, weight, inputs, 0.5, pattern)
    else:
        prune(options, weight, inputs, 0.5, pattern)


@pytest.mark.parametrize(
    ("sparsity", "pattern"), [(0.5, None), (0.6, None), (0.8, None), (0.5, Pattern(2, 4))]
)
def test_more_careful_pruners_keep_the_layers_output_better(
    sparsity: float, pattern: Pattern | None
) -> None:
    for seed in range(8):
        weight, inputs = weights(32, 64, seed), correlated(256, 64, seed)
        errors = [
            error(weight, prune(options, weight, inputs, sparsity, pattern), inputs)
            for options in (ALPS(), SparseGPT(), Wanda(), Magnitude())
        ]
        assert errors == sorted(errors)
        assert errors[0] < 0.9 * errors[1] < 0.8 * errors[2]


# ---------------------------------------------------------------------- each against its own oracle


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 30), st.integers(0, 99))
def test_wanda_is_its_formula_in_float64(rows: int, columns: int, tokens: int, seed: int) -> None:
    weight, inputs = weights(rows, columns, seed), correlated(tokens, columns, seed)
    mask = prune(Wanda(), weight, inputs, 0.5).mask.numpy()
    norms = np.linalg.norm(inputs.double().numpy(), axis=0)
    score = np.abs(weight.double().numpy()) * norms
    for row, row_mask in zip(score, mask, strict=True):
        assert row_mask.sum() == columns // 2
        if columns // 2 > 0:
            # no kept score is smaller than a pruned one, beyond float32's resolution
            assert row[row_mask].max() <= row[~row_mask].min() * (1 + 1e-5)


def test_magnitude_is_one_threshold_over_the_whole_matrix() -> None:
    weight = weights(20, 30, seed=5)
    mask = prune(Magnitude(), weight, correlated(4, 30, seed=5), 0.6).mask
    assert weight.abs()[mask].max() < weight.abs()[~mask].min()


def damped_hessian(inputs: Tensor, damping: float = 0.01) -> np.ndarray:
    exact = inputs.double().numpy()
    hessian = exact.T @ exact
    dead = np.diag(hessian) == 0
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    hessian[dead, dead] = 1.0
    return hessian


def conditional_variances(hessian: np.ndarray) -> np.ndarray:
    """[H_j:,j:^-1]_jj for every column j."""
    return np.array([np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(len(hessian))])


def remove(weight: np.ndarray, hessian: np.ndarray, j: int, rows: np.ndarray) -> None:
    """Zero column j in some rows, and let the later columns minimise the error."""
    inverse = np.linalg.inv(hessian[j:, j:])
    weight[rows, j:] -= np.outer(weight[rows, j], inverse[0] / inverse[0, 0])
    weight[rows, j] = 0.0


def obs_by_inversion(
    weight: np.ndarray,
    hessian: np.ndarray,
    sparsity: float,
    pattern: Pattern | None,
    block_size: int = 128,
) -> np.ndarray:
    """SparseGPT's choice and update in float64, without Cholesky factors or delayed updates: the
    Hessian of each column and the later ones is inverted again."""
    weight = weight.astype(np.float64).copy()
    rows, columns = weight.shape
    scale = conditional_variances(hessian)
    mask = np.zeros((rows, columns), bool)
    for j in range(columns):
        if pattern is None and j % block_size == 0:
            end = min(j + block_size, columns)
            wanted = int(sparsity * rows * end + 1e-9) - int(mask.sum())
            order = np.argsort((weight[:, j:end] ** 2 / scale[j:end]).ravel(), kind="stable")
            slab = np.zeros(rows * (end - j), bool)
            slab[order[:wanted]] = True
            mask[:, j:end] = slab.reshape(rows, end - j)
        if pattern is not None and j % pattern[1] == 0:
            part = slice(j, j + pattern[1])
            for row in range(rows):
                order = np.argsort(weight[row, part] ** 2 / scale[part], kind="stable")
                mask[row, j + order[: pattern[1] - pattern[0]]] = True
        remove(weight, hessian, j, np.flatnonzero(mask[:, j]))
    return weight


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(4, 8), Pattern(1, 4)])
@pytest.mark.parametrize("shape", [(5, 16), (1, 8), (16, 24)])
@pytest.mark.parametrize("block_size", [128, 10, 8])
def test_sparsegpt_is_the_exact_surgeon_in_float64(
    pattern: Pattern | None, shape: tuple[int, int], block_size: int
) -> None:
    weight, inputs = weights(*shape, seed=6), correlated(200, shape[1], seed=6)
    sparsity = 0.6 if pattern is None else 1 - pattern[0] / pattern[1]
    exact = obs_by_inversion(weight.numpy(), damped_hessian(inputs), sparsity, pattern, block_size)
    options = SparseGPT(block_size=block_size)
    pruned = prune(options, weight, inputs, sparsity, pattern)
    assert pruned.weight is not None
    np.testing.assert_array_equal(pruned.mask.numpy(), exact == 0)
    np.testing.assert_allclose(pruned.weight.numpy(), exact, rtol=2e-3, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 14),
    st.integers(1, 40),
    st.integers(1, 16),
    st.sampled_from([0.2, 0.5, 0.7]),
    st.integers(0, 999),
    st.booleans(),
)
def test_with_sparsegpts_own_mask_the_weights_are_the_exact_surgeons(
    rows: int,
    columns: int,
    tokens: int,
    block_size: int,
    sparsity: float,
    seed: int,
    with_dead_column: bool,
) -> None:
    """Any shape, any block size, fewer tokens than columns too."""
    weight, inputs = weights(rows, columns, seed), correlated(tokens, columns, seed)
    if with_dead_column:
        inputs[:, columns // 2] = 0.0
    options = SparseGPT(block_size=block_size, damping=0.05)
    pruned = prune(options, weight, inputs, sparsity, None)
    hessian = damped_hessian(inputs, 0.05)
    exact = weight.double().numpy().copy()
    for j in range(columns):
        remove(exact, hessian, j, np.flatnonzero(pruned.mask[:, j].numpy()))
    assert pruned.weight is not None
    tolerance = 1e-3 * float(np.abs(exact).max()) + 1e-6
    np.testing.assert_allclose(pruned.weight.numpy(), exact, rtol=1e-3, atol=tolerance)


def test_with_one_column_pruned_the_surgeons_update_is_the_least_squares_one() -> None:
    """If only the first column is zeroed, the rest must equal ridge regression."""
    inputs = correlated(300, 6, seed=7)
    weight = weights(3, 6, seed=7)
    weight[:, 0] = 1e-6  # the smallest score by far
    weight[:, 1:] += 5
    pruned = prune(SparseGPT(), weight, inputs, 1 / 6)
    assert pruned.mask.sum(dim=0).tolist() == [3, 0, 0, 0, 0, 0]
    gram = damped_hessian(inputs)
    target = weight.double().numpy() @ gram[:, 1:]
    exact = np.linalg.solve(gram[1:, 1:], target.T).T
    assert pruned.weight is not None
    np.testing.assert_allclose(pruned.weight.numpy()[:, 1:], exact, rtol=1e-4)


def test_later_blocks_make_up_for_earlier_ones() -> None:
    """Blocks change when masks are chosen, not how errors are passed on: with a fixed pattern in
    which every group is a block, the result does not depend on the block size."""
    weight, inputs = weights(8, 32, seed=8), correlated(200, 32, seed=8)
    whole = prune(SparseGPT(block_size=128), weight, inputs, 0.5, Pattern(2, 4))
    small = prune(SparseGPT(block_size=4), weight, inputs, 0.5, Pattern(2, 4))
    odd = prune(SparseGPT(block_size=10), weight, inputs, 0.5, Pattern(2, 4))
    for other in (small, odd):
        assert torch.equal(whole.mask, other.mask)
        assert whole.weight is not None
        assert other.weight is not None
        torch.testing.assert_close(whole.weight, other.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(4, 8), Pattern(8, 16)])
def test_tensors_of_another_device_are_pruned_as_arrays_on_a_cpu_are(
    pattern: Pattern | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = weights(24, 160, seed=13), correlated(400, 160, seed=13)
    inputs[:, 9] = 0.0
    in_arrays = prune(SparseGPT(), weight, inputs, 0.5, pattern)
    monkeypatch.setattr(sparsegpt, "_as_array", lambda values: values)
    in_tensors = prune(SparseGPT(), weight, inputs, 0.5, pattern)
    assert in_arrays.mask.equal(in_tensors.mask)
    assert in_arrays.weight is not None
    torch.testing.assert_close(in_arrays.weight, in_tensors.weight)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(8, 16)])
def test_a_weight_that_is_nan_is_an_error_wherever_it_is(pattern: Pattern | None) -> None:
    weight, inputs = weights(4, 160, seed=14), correlated(400, 160, seed=14)
    weight[2, 150] = float("nan")
    with pytest.raises(ValueError, match="a score is NaN"):
        prune(SparseGPT(), weight, inputs, 0.5, pattern)


def test_block_sizes_that_do_not_divide_the_columns_keep_the_exact_count() -> None:
    weight, inputs = weights(7, 50, seed=9), correlated(200, 50, seed=9)
    for block in (1, 3, 16, 49, 50, 51):
        pruned = prune(SparseGPT(block_size=block), weight, inputs, 0.6, None)
        assert int(pruned.mask.sum()) == 210


def test_damping_that_had_to_be_raised_is_recorded() -> None:
    weight, inputs = weights(4, 16, seed=10), torch.ones(50, 16) * 1e3
    ordinary = prune(SparseGPT(damping=0.01), weight, correlated(99, 16, 1), 0.5, None)
    assert ordinary.facts == {"dead_columns": 0.0, "damping": 0.01, "damping_raises": 0.0}
    raised = prune(SparseGPT(damping=1e-9), weight, inputs, 0.5, None)
    raises = raised.facts["damping_raises"]
    assert raises >= 1
    assert raised.facts["damping"] == pytest.approx(1e-9 * 10**raises)
    assert bool(after(weight, raised).isfinite().all())


def test_the_scale_of_the_hessian_does_not_matter_even_with_dead_columns() -> None:
    weight, inputs = weights(6, 12, seed=11), correlated(60, 12, seed=11)
    inputs[:, [2, 7, 8]] = 0.0
    hessian = inputs.T @ inputs
    one, two = (
        pruner_for(SparseGPT()).prune(
            weight, {"hessian": scale * hessian}, LayerTarget(0.5), SparseGPT()
        )
        for scale in (1.0, 2.0**-12)
    )
    assert one.facts["dead_columns"] == 3
    assert torch.equal(one.mask, two.mask)
    assert one.weight is not None
    assert two.weight is not None
    torch.testing.assert_close(one.weight, two.weight)


def test_dead_columns_beyond_the_count_keep_their_weights() -> None:
    weight, inputs = weights(4, 8, seed=12), correlated(60, 8, seed=12)
    inputs[:, 1:5] = 0.0
    pruned = prune(SparseGPT(), weight, inputs, 0.25)
    assert not bool(pruned.mask[:, [0, 5, 6, 7]].any())
    assert pruned.weight is not None
    assert torch.equal(pruned.weight[~pruned.mask], weight[~pruned.mask])


def test_a_hessian_that_cannot_be_inverted_is_an_error() -> None:
    broken = {"hessian": -torch.eye(8) * torch.arange(1, 9)}
    with pytest.raises(ValueError, match="cannot be inverted"):
        pruner_for(SparseGPT()).prune(weights(2, 8, 1), broken, LayerTarget(0.5), SparseGPT())


def test_a_hessians_factor_is_computed_once_while_it_is_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = torch.randn(64, 12, generator=torch.Generator().manual_seed(5))
    hessian, dead = inputs.T @ inputs, torch.zeros(12, dtype=torch.bool)
    calls: list[Tensor] = []
    factorize = torch.linalg.cholesky_ex

    def counted(matrix: Tensor, upper: bool = False) -> Any:
        calls.append(matrix)
        return factorize(matrix, upper=upper)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    first = inverse_factor(hessian, dead, 0.01)[0]
    assert len(calls) == 1
    assert inverse_factor(hessian, dead, 0.01)[0] is first
    assert len(calls) == 1
    assert not inverse_factor(hessian, dead, 0.1)[0].equal(first)
    hessian.mul_(4.0)  # in place: the same tensor, another Hessian
    torch.testing.assert_close(inverse_factor(hessian, dead, 0.01)[0], first / 2)
    assert inverse_factor(inputs.T @ inputs, dead, 0.01)[0].equal(first)
