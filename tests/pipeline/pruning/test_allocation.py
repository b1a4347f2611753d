"""Sparsity spread over decoder layers, and the outliers by which OWL spreads it."""

import copy
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import InputError, NonFiniteError
from pipeline.pruning import outliers, prune
from pipeline.pruning.allocation import Allocated, LayerTarget, ModelTarget, allocate
from pipeline.pruning.outliers import count_outliers
from pipeline.pruning.prune import prune_model
from pipeline.pruning.walk import layer_sizes
from pipeline.pruning.window_groups import Memory
from pipeline.specs import (
    OWL,
    Allocation,
    ArithmeticProgression,
    ByHand,
    FileCorpus,
    FirstLayers,
    LocalModel,
    Magnitude,
    Pattern,
    Pruner,
    PruneSpec,
    SparseGPT,
    Uniform,
    Wanda,
    WindowsSpec,
)
from tests.pipeline.tiny_models import UNEVEN


def shares(allocated: Allocated) -> list[float]:
    return [layer.sparsity for layer in allocated.layers]


def mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    return math.fsum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)


def alike(layers: int) -> list[int]:
    return [1000] * layers


# --------------------------------------------------------------------------------------- formulas


def test_uniform_gives_every_layer_the_models_own() -> None:
    allocated = allocate(Uniform(), LayerTarget(0.5, Pattern(2, 4)), [3, 50, 700])
    assert allocated.layers == [LayerTarget(0.5, Pattern(2, 4))] * 3


def test_the_first_layers_have_the_target_and_the_others_nothing() -> None:
    target = LayerTarget(0.5, Pattern(2, 4))
    found = allocate(FirstLayers(share=0.5), target, alike(5))
    assert found.layers == [target] * 3 + [LayerTarget(0.0)] * 2
    assert found.pruned_layers == 3
    assert allocate(FirstLayers(share=0.6), target, alike(5)).pruned_layers == 3  # not 3.0000001
    by_hand = allocate(ByHand(sparsities=(0.0, 0.9, 0.0)), LayerTarget(0.3), alike(3))
    assert by_hand.pruned_layers == 2


def test_owls_layers_with_most_and_fewest_outliers_are_two_lambda_apart() -> None:
    """Densities r = 0, 0.16, 0.04 above 1 - S, less their mean."""
    allocated = allocate(OWL(spread=0.08), LayerTarget(0.7), alike(3), [0.01, 0.05, 0.02])
    middle = (0 + 0.16 + 0.04) / 3
    assert shares(allocated) == pytest.approx([0.7 + middle, 0.54 + middle, 0.66 + middle])
    assert allocated.clamped == []


def test_owl_is_uniform_if_all_layers_have_equally_many_outliers() -> None:
    assert shares(allocate(OWL(), LayerTarget(0.6), [5, 7, 9], [0.02] * 3)) == [0.6] * 3


def test_an_arithmetic_progression_rises_by_its_difference_around_the_models_sparsity() -> None:
    allocated = allocate(ArithmeticProgression(difference=0.02), LayerTarget(0.5), alike(4))
    assert shares(allocated) == pytest.approx([0.47, 0.49, 0.51, 0.53])


def test_a_larger_layer_counts_for_more_in_a_progression() -> None:
    """The mean number of a layer is (0 * 1 + 1 * 3) / 4."""
    allocated = allocate(ArithmeticProgression(difference=0.1), LayerTarget(0.5), [1, 3])
    assert shares(allocated) == pytest.approx([0.5 - 0.075, 0.5 + 0.025])


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_the_largest_difference_is_that_of_the_paper(sparsity: float) -> None:
    """0 < beta <= min(2 S, 2 (1 - S)) / (L - 1); with equality a layer of 1 keeps nothing."""
    limit = 2 * min(sparsity, 1 - sparsity) / 31
    within = ArithmeticProgression(difference=0.999 * limit)
    assert min(shares(allocate(within, LayerTarget(sparsity), alike(32)))) > 0
    beyond = ArithmeticProgression(difference=1.001 * limit)
    with pytest.raises(InputError, match=f"take less than {limit:.4g}"):
        allocate(beyond, LayerTarget(sparsity), alike(32))


def test_sparsities_by_hand_are_used_unchanged() -> None:
    hand = ByHand(sparsities=(0.2, 0.6, 0.7))
    assert shares(allocate(hand, LayerTarget(0.5), alike(3))) == [0.2, 0.6, 0.7]
    weighted = (0.2 * 4 + 0.6 + 0.7) / 6
    assert shares(allocate(hand, LayerTarget(weighted), [4, 1, 1])) == [0.2, 0.6, 0.7]


def test_sparsities_by_hand_with_another_mean_are_refused_with_their_mean() -> None:
    hand = ByHand(sparsities=(0.2, 0.6, 0.7))
    with pytest.raises(InputError, match=r"mean is 0\.500000 .*not 0\.6"):
        allocate(hand, LayerTarget(0.6), alike(3))
    with pytest.raises(InputError, match=r"mean is 0\.350000 .*not 0\.5"):
        allocate(hand, LayerTarget(0.5), [4, 1, 1])


def test_sparsities_by_hand_of_another_number_of_layers_are_refused() -> None:
    with pytest.raises(InputError, match=r"allocation\.sparsities.*3 entries.*4 decoder layers"):
        allocate(ByHand(sparsities=(0.5, 0.5, 0.5)), LayerTarget(0.5), alike(4))


def test_outlier_ratios_that_are_missing_or_of_another_model_are_refused() -> None:
    with pytest.raises(InputError, match="owl needs them"):
        allocate(OWL(), LayerTarget(0.5), alike(3))
    with pytest.raises(InputError, match="3 decoder layers, not 2"):
        allocate(OWL(), LayerTarget(0.5), alike(3), [0.1, 0.2])


def test_outlier_ratios_go_from_none_of_the_weights_to_all_of_them() -> None:
    allocated = allocate(OWL(spread=0.1), LayerTarget(0.5), alike(2), [0.0, 1.0])
    assert shares(allocated) == pytest.approx([0.6, 0.4])
    for beyond in (-0.01, 1.01, float("nan")):
        with pytest.raises(InputError, match="are no shares, 0 to 1"):
            allocate(OWL(), LayerTarget(0.5), alike(2), [0.5, beyond])


# ------------------------------------------------------------------------------------- properties

layer = st.tuples(st.floats(0, 0.2), st.integers(1, 10**9))
sparsities = st.floats(0.01, 0.98)


@settings(max_examples=300, deadline=None)
@given(st.lists(layer, min_size=1, max_size=40), sparsities, st.floats(0.01, 0.5))
def test_owl_keeps_the_mean_the_order_and_the_spread(
    layers: list[tuple[float, int]], sparsity: float, spread: float
) -> None:
    ratios, sizes = [ratio for ratio, _ in layers], [size for _, size in layers]
    allocated = allocate(OWL(spread=spread), LayerTarget(sparsity), sizes, ratios)
    found = shares(allocated)
    assert mean(found, sizes) == pytest.approx(sparsity, abs=1e-6)
    assert all(0 <= share < 1 for share in found)
    from_fewest = [found[layer] for layer in sorted(range(len(found)), key=ratios.__getitem__)]
    assert all(above <= below + 1e-12 for below, above in itertools.pairwise(from_fewest))
    if max(ratios) > min(ratios) and not allocated.clamped:
        assert max(found) - min(found) == pytest.approx(2 * spread, abs=1e-9)
        assert found[ratios.index(max(ratios))] == min(found)


@settings(max_examples=100, deadline=None)
@given(st.lists(layer, min_size=2, max_size=12), st.floats(0.01, 0.05))
def test_a_layer_beyond_a_bound_is_set_to_it_and_the_others_keep_the_mean(
    layers: list[tuple[float, int]], sparsity: float
) -> None:
    ratios, sizes = [ratio for ratio, _ in layers], [size for _, size in layers]
    allocated = allocate(OWL(spread=0.5), LayerTarget(sparsity), sizes, ratios)
    found = shares(allocated)
    assert mean(found, sizes) == pytest.approx(sparsity, abs=1e-6)
    assert all(found[number] in (0.0, pytest.approx(1.0)) for number in allocated.clamped)
    free = [number for number in range(len(found)) if number not in allocated.clamped]
    span = max(ratios) - min(ratios)
    for one in free:
        for other in free:
            if span > 0:
                expected = (ratios[other] - ratios[one]) / span
                assert found[one] - found[other] == pytest.approx(expected, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=2, max_size=80), sparsities)
def test_a_progression_keeps_mean_and_difference(sizes: list[int], sparsity: float) -> None:
    difference = 0.9 * min(sparsity, 1 - sparsity) / len(sizes)
    found = shares(
        allocate(ArithmeticProgression(difference=difference), LayerTarget(sparsity), sizes)
    )
    assert mean(found, sizes) == pytest.approx(sparsity, abs=1e-9)
    steps = [above - below for below, above in itertools.pairwise(found)]
    assert steps == pytest.approx([difference] * len(steps), abs=1e-12)


# --------------------------------------------------------------------------------------- patterns


def test_zeros_of_a_group_go_to_the_largest_remainders() -> None:
    """Of 4 weights 1.1, 1.7, 2.4 and 2.8 zeros: 6 for the whole ones and 2 for the remainders."""
    hand = ByHand(sparsities=(1.1 / 4, 1.7 / 4, 2.4 / 4, 2.8 / 4))
    allocated = allocate(hand, LayerTarget(0.5, Pattern(2, 4)), alike(4))
    assert [str(target.pattern) for target in allocated.layers] == ["3:4", "2:4", "2:4", "1:4"]
    assert shares(allocated) == [0.25, 0.5, 0.5, 0.75]


def test_of_equal_remainders_the_first_layers_get_the_zeros() -> None:
    hand = ByHand(sparsities=(0.375, 0.625, 0.375, 0.625))
    allocated = allocate(hand, LayerTarget(0.5, Pattern(2, 4)), alike(4))
    assert [str(target.pattern) for target in allocated.layers] == ["2:4", "1:4", "3:4", "2:4"]


def test_a_layer_whose_share_is_a_whole_number_of_weights_keeps_it() -> None:
    hand = ByHand(sparsities=(2.1 / 4, 2 / 4, 1 / 4))
    allocated = allocate(hand, LayerTarget(0.5, Pattern(2, 4)), [100, 10, 10])
    assert [str(target.pattern) for target in allocated.layers] == ["2:4", "2:4", "3:4"]


def test_of_two_means_equally_near_the_one_with_fewer_zeros_is_taken() -> None:
    """2 or 3 zeros in the larger layer: the mean is 5/3 or 7/3 zeros, and should be 2."""
    hand = ByHand(sparsities=(2.5 / 4, 1 / 4))
    allocated = allocate(hand, LayerTarget(0.5, Pattern(2, 4)), [100, 50])
    assert [str(target.pattern) for target in allocated.layers] == ["2:4", "3:4"]


def test_every_group_keeps_one_weight_and_loses_one() -> None:
    hand = ByHand(sparsities=(0.0, 0.9, 0.5, 0.6))
    allocated = allocate(hand, LayerTarget(0.5, Pattern(2, 4)), alike(4))
    assert [str(target.pattern) for target in allocated.layers] == ["3:4", "1:4", "2:4", "2:4"]
    assert allocated.clamped == [0, 1]


def test_a_pattern_that_prunes_nothing_is_the_same_in_every_layer() -> None:
    with pytest.raises(InputError, match=r"'4:4'.*take uniform"):
        allocate(OWL(), LayerTarget(0.0, Pattern(4, 4)), alike(2), [0.0, 0.1])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(layer, min_size=1, max_size=24),
    st.sampled_from(["2:4", "1:4", "4:8", "5:8", "1:3", "3:7", "16:32", "1:2"]).map(Pattern.parse),
    st.floats(0.01, 0.5),
    st.booleans(),
)
def test_patterns_have_the_models_mean_up_to_rounding_to_whole_weights(
    layers: list[tuple[float, int]], pattern: Pattern, spread: float, same_size: bool
) -> None:
    kept, group = pattern
    ratios = [ratio for ratio, _ in layers]
    sizes = [1000 if same_size else size for _, size in layers]
    sparsity = 1 - kept / group
    allocation = OWL(spread=spread)
    allocated = allocate(allocation, LayerTarget(sparsity, pattern), sizes, ratios)
    zeros = []
    for target in allocated.layers:
        assert target.pattern is not None
        assert target.pattern[1] == group
        zeros.append(group - target.pattern[0])
        assert 1 <= zeros[-1] <= group - 1
        assert target.sparsity == zeros[-1] / group
    error = Fraction(sum(count * size for count, size in zip(zeros, sizes, strict=True)))
    error -= (group - kept) * sum(sizes)
    if same_size:
        assert error == 0
    else:
        assert abs(error) <= Fraction(max(sizes), 2) * (1 + Fraction(1, 10**6))
    if not allocated.clamped:
        for share, count in zip(
            shares(allocate(allocation, LayerTarget(sparsity), sizes, ratios)), zeros, strict=True
        ):
            assert abs(group * share - count) < 1 + 1e-6
    assert allocate(allocation, LayerTarget(sparsity, pattern), sizes, ratios) == allocated


# ---------------------------------------------------------------------------------------- outliers

CONFIG = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def small_model(layers: int = 4) -> Any:
    """A random Llama with a few large weights, and layers that are unlike each other."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = layers
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    for number, layer in enumerate(model.model.layers):
        for linear in layer.modules():
            if isinstance(linear, nn.Linear):
                chosen = torch.rand(linear.weight.shape, generator=generator) < 0.04 / (number + 1)
                linear.weight.data[chosen] *= 20
    return model


def windows(count: int = 8, seqlen: int = 24) -> Tensor:
    return torch.randint(1, 96, (count, seqlen), generator=torch.Generator().manual_seed(3))


def linears_by_layer(model: Any) -> list[dict[str, nn.Linear]]:
    return [
        {
            f"model.layers.{number}.{name}": module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        for number, layer in enumerate(model.model.layers)
    ]


def outlier_ratios_by_brute_force(model: Any, data: Tensor, threshold: float) -> list[float]:
    """All scores |W_ij| ||X_j||_2 of a layer in one float64 vector, inputs from one forward pass of
    the whole dense model a window."""
    model = model.double()
    ratios = []
    for linears in linears_by_layer(model):
        seen: dict[str, list[Tensor]] = {name: [] for name in linears}
        handles = [
            linear.register_forward_pre_hook(
                lambda module, given, inputs=seen[name]: inputs.append(given[0][0])
            )
            for name, linear in linears.items()
        ]
        for window in data:
            model(input_ids=window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        scores = torch.cat(
            [
                (linear.weight.abs() * torch.cat(seen[name]).norm(dim=0)).flatten()
                for name, linear in linears.items()
            ]
        )
        limit = threshold * scores.mean()
        assert not bool(((scores / limit - 1).abs() < 1e-5).any())  # none that rounding decides
        ratios.append(float((scores > limit).double().mean()))
    return ratios


@pytest.mark.parametrize("threshold", [5.0, 2.5])
def test_outlier_ratios_are_those_of_all_scores_of_a_layer_together(threshold: float) -> None:
    found = count_outliers(small_model(), windows(), threshold, Memory(batch_size=3))
    expected = outlier_ratios_by_brute_force(small_model(), windows(), threshold)
    assert [layer.ratio for layer in found] == expected
    assert len(set(expected)) == 4
    assert [layer.weights for layer in found] == layer_sizes(small_model())
    assert found[0].weights == 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64


def test_counting_outliers_leaves_the_model_as_it_is() -> None:
    model = small_model()
    count_outliers(model, windows(), 5.0)
    for before, after in zip(small_model().parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_half_precision_counts_in_single_precision() -> None:
    half = small_model().bfloat16()
    widened = small_model().bfloat16().float()
    ratios = [layer.ratio for layer in count_outliers(half, windows(), 5.0)]
    wide = [layer.ratio for layer in count_outliers(widened, windows(), 5.0)]
    assert ratios == pytest.approx(wide, rel=0.1)


def test_a_weight_that_is_not_finite_is_an_error_that_names_its_matrix() -> None:
    model = small_model()
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.3\.mlp\.down_proj: the weight"):
        count_outliers(model, windows(), 5.0)


def test_windows_that_are_too_long_for_the_model_are_refused() -> None:
    with pytest.raises(InputError, match="seqlen: 65"):
        count_outliers(small_model(), windows(1, 65), 5.0)


# ----------------------------------------------------------------------------------- whole models

ALLOCATIONS: list[Allocation] = [
    Uniform(),
    OWL(spread=0.15, threshold=3.5),
    ArithmeticProgression(difference=0.07),
    ByHand(sparsities=(0.25, 0.41, 0.59, 0.75)),
]
PRUNERS: list[Pruner] = [Magnitude(), Wanda(), SparseGPT()]


def expected_shares(allocation: Allocation, ratios: list[float]) -> list[float]:
    """By the formulas, for four layers of one size at a half."""
    match allocation:
        case OWL():
            raised = [0.3 * (d - min(ratios)) / (max(ratios) - min(ratios)) for d in ratios]
            return [0.5 - r + sum(raised) / 4 for r in raised]
        case ArithmeticProgression():
            return [0.395, 0.465, 0.535, 0.605]
        case ByHand():
            return [0.25, 0.41, 0.59, 0.75]
        case _:
            return [0.5] * 4


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.name)
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda allocation: allocation.name)
def test_every_layer_of_a_pruned_model_has_its_own_share(
    allocation: Allocation, pruner: Pruner
) -> None:
    model, data = small_model(), windows()
    ratios = [layer.ratio for layer in count_outliers(model, data, 3.5)]
    given = data if pruner.calibrated else None
    report = prune_model(model, given, pruner, ModelTarget(LayerTarget(0.5), allocation, ratios))
    for share, linears in zip(
        expected_shares(allocation, ratios), linears_by_layer(model), strict=True
    ):
        for linear in linears.values():
            zeros = linear.weight == 0
            if isinstance(pruner, Wanda):
                counts = set(zeros.sum(dim=1).tolist())
                assert counts == {math.floor(share * linear.in_features + 1e-9)}
            else:
                assert int(zeros.sum()) == math.floor(share * zeros.numel() + 1e-9)
    step = 1 / 32 if isinstance(pruner, Wanda) else 1 / 512  # of the smallest row or matrix
    assert 0.5 - step < report.sparsity <= 0.5


def zeros_of_fours(shares: list[float]) -> tuple[int, ...]:
    """Of all whole zeros of a group with the mean of a half, those nearest to the shares."""
    combinations = itertools.product((1, 2, 3), repeat=len(shares))
    return min(
        (each for each in combinations if sum(each) == 2 * len(shares)),
        key=lambda each: sum(abs(z - 4 * s) for z, s in zip(each, shares, strict=True)),
    )


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.name)
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda allocation: allocation.name)
def test_every_layer_of_a_model_has_its_own_pattern(allocation: Allocation, pruner: Pruner) -> None:
    model, data = small_model(), windows()
    ratios = [layer.ratio for layer in count_outliers(model, data, 3.5)]
    given = data if pruner.calibrated else None
    report = prune_model(
        model, given, pruner, ModelTarget(LayerTarget(0.5, Pattern(2, 4)), allocation, ratios)
    )
    zeros_of_layers = []
    for linears in linears_by_layer(model):
        counts = {
            count
            for linear in linears.values()
            for count in (linear.weight == 0).view(-1, 4).sum(dim=1).tolist()
        }
        assert len(counts) == 1
        zeros_of_layers.append(counts.pop())
    assert report.sparsity == 0.5
    assert tuple(zeros_of_layers) == zeros_of_fours(expected_shares(allocation, ratios))
    assert (len(set(zeros_of_layers)) > 1) == (allocation.name in ("owl", "by-hand"))


@pytest.mark.parametrize("allocation", ALLOCATIONS[:3], ids=lambda allocation: allocation.name)
def test_a_model_with_layers_of_different_sizes_has_the_requested_sparsity(
    allocation: Allocation,
) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(UNEVEN).float().eval()
    ratios = [0.01, 0.03, 0.02, 0.05]
    report = prune_model(
        model, None, Magnitude(), ModelTarget(LayerTarget(0.6), allocation, ratios)
    )
    weights = sum(each.rows * each.columns for each in report.matrices)
    zeros = sum(each.zeros for each in report.matrices)
    assert weights == 2 * 9728 + 2 * 12800
    assert 0 <= 0.6 * weights - zeros < len(report.matrices)  # each matrix has its floor


# ------------------------------------------------------------------------------------------ stages


@pytest.fixture
def dense(tmp_path: Path) -> LocalModel:
    from tokenizers import Tokenizer, models

    small_model().save_pretrained(tmp_path / "dense")
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="b")
    tokenizer.save_pretrained(tmp_path / "dense")
    return LocalModel(path=str(tmp_path / "dense"), dtype="float32")


def run_stages(spec: PruneSpec, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Count the outliers, prune with only the inputs that the spec names, and return the report and
    the table of sparsities."""
    assert spec.calibration is not None
    assert spec.outliers is not None
    artifacts = {stage.key: folder / stage.kind for stage in (spec.calibration, spec.outliers)}
    for path in artifacts.values():
        path.mkdir()
    ids = pa.array(windows().tolist(), pa.list_(pa.int32()))
    pq.write_table(pa.table({"token_ids": ids}), folder / "windows" / "windows.parquet")
    outliers.run(spec.outliers, artifacts, folder / "outliers")
    output = folder / "output"
    output.mkdir()
    inputs = {stage.key: artifacts[stage.key] for stage in spec.inputs()}
    report = prune.run(spec, inputs, output)
    return report, pq.read_table(output / "sparsity.parquet").to_pylist()


def test_magnitude_with_owl_reads_the_outliers_and_no_windows(
    dense: LocalModel, tmp_path: Path
) -> None:
    calibration = WindowsSpec(source=FileCorpus(path="unread"), model=dense)
    spec = PruneSpec(
        model=dense,
        pruner=Magnitude(),
        sparsity=0.6,
        allocation=OWL(threshold=3.5),
        calibration=calibration,
    )
    report, rows = run_stages(spec, tmp_path)
    found = pq.read_table(tmp_path / "outliers" / "outliers.parquet").to_pydict()
    assert found["layer"] == [0, 1, 2, 3]
    assert found["weights"] == layer_sizes(small_model())
    ratios = found["outlier_ratio"]
    assert ratios == outlier_ratios_by_brute_force(small_model(), windows(), 3.5)
    expected = shares(allocate(OWL(), LayerTarget(0.6), alike(4), ratios))
    assert report["layer_sparsity"] == expected
    assert report["layer_pattern"] == ["unstructured"] * 4
    assert report["allocation_warnings"] == []
    for row in rows:
        assert row["layer"] == int(row["matrix"].split(".")[2])
        assert row["layer_sparsity"] == expected[row["layer"]]
        assert row["layer_pattern"] == "unstructured"
        assert 0 <= row["layer_sparsity"] - row["sparsity"] < 1 / 512


def test_the_report_warns_of_layers_at_a_bound_and_of_an_allocation_without_effect(
    dense: LocalModel, tmp_path: Path
) -> None:
    spec = PruneSpec(
        model=dense,
        pruner=Wanda(),
        sparsity=0.25,
        pattern="3:4",
        allocation=OWL(threshold=3.5, spread=0.4),
        calibration=WindowsSpec(source=FileCorpus(path="unread"), model=dense),
    )
    report, rows = run_stages(spec, tmp_path)
    assert report["sparsity"] == 0.25
    assert report["layer_pattern"] == ["3:4"] * 4  # none can lose less, so none can lose more
    held, alike = report["allocation_warnings"]
    assert "decoder layers 1, 2, 3 " in held  # 0 has fewest outliers
    assert "what uniform gives" in alike
    assert {(row["layer_pattern"], row["layer_sparsity"]) for row in rows} == {("3:4", 0.25)}


def test_the_report_does_not_warn_of_a_model_that_has_only_one_layer(
    dense: LocalModel, tmp_path: Path
) -> None:
    small_model(layers=1).save_pretrained(dense.path)
    spec = PruneSpec(
        model=dense,
        pruner=Wanda(),
        sparsity=0.5,
        allocation=OWL(),
        calibration=WindowsSpec(source=FileCorpus(path="unread"), model=dense),
    )
    report, _ = run_stages(spec, tmp_path)
    assert report["layer_sparsity"] == [0.5]
    assert report["allocation_warnings"] == []
