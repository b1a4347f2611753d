"""DSnoT against a slow version that handles one row and one swap at a time, in float64."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import InputError
from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.input_statistics import STATISTICS
from pipeline.pruning.pruners import pruner_for
from pipeline.pruning.pruners.base import Pruned
from pipeline.pruning.pruners.dsnot import options_by_matrix
from pipeline.specs import DSnoT, Pattern

Floats = NDArray[np.float64]


def example(rows: int, columns: int, seed: int, windows: int = 6) -> tuple[Tensor, Tensor]:
    """A weight `[rows, columns]` and inputs `[windows, 9, columns]` whose means differ from zero
    and from window to window."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mean = torch.randn(columns, generator=generator) * 0.3
    drift = torch.randn(windows, 1, columns, generator=generator) * 0.5
    scale = torch.rand(columns, generator=generator) + 0.2
    noise = torch.randn(windows, 9, columns, generator=generator)
    return weight, mean + drift + noise * scale


def prune(
    options: DSnoT,
    weight: Tensor,
    inputs: Tensor,
    sparsity: float = 0.5,
    pattern: Pattern | None = None,
) -> Pruned:
    matrix_pruner = pruner_for(options)
    sums = {
        name: STATISTICS[name](inputs.shape[2], len(inputs), inputs.device)
        for name in matrix_pruner.statistics
    }
    for part in inputs.split(2):
        for statistic in sums.values():
            statistic.update(part)
    results = {name: statistic.value for name, statistic in sums.items()}
    return matrix_pruner.prune(weight, results, LayerTarget(sparsity, pattern), options)


# -------------------------------------------------------------------------------------- the oracle


@dataclass
class Moments:
    """The terms of the formulas, from the inputs themselves in float64."""

    inputs: Floats
    wanda: Floats = field(init=False)
    sums: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.wanda = np.sqrt((self.inputs**2).sum(axis=(0, 1)))
        self.sums = self.inputs.sum(axis=1).mean(axis=0)

    def variance(self, kind: str) -> Floats:
        if kind == "pooled":
            return self.inputs.var(axis=1).mean(axis=0)
        return self.inputs.reshape(-1, self.inputs.shape[2]).var(axis=0)

    def obs_scale(self) -> Floats:
        """U_jj^2: the inverse Hessian's diagonal with all earlier columns gone."""
        tokens = self.inputs.reshape(-1, self.inputs.shape[2])
        hessian = tokens.T @ tokens
        hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
        return np.array([np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(len(hessian))])


def initial_scores(weight: Floats, moments: Moments, options: DSnoT) -> Floats:
    if options.initial == "magnitude":
        return np.abs(weight)
    if options.initial == "wanda":
        return np.abs(weight) * moments.wanda
    return weight**2 / moments.obs_scale()


def slow_row(
    row: Floats,
    initial: Floats,
    moments: Moments,
    options: DSnoT,
    zeros: int,
    group: int | None,
) -> list[bool]:
    """Run DSnoT on one output, section by section of its description."""
    width = group or len(row)
    pruned = set()
    for start in range(0, len(row), width):
        order = sorted(range(start, start + width), key=lambda j: (initial[j], j))
        pruned |= set(order[:zeros])
    g = row * moments.sums
    claim = g / moments.variance(options.variance) ** options.variance_power
    wanda = np.abs(row) * moments.wanda
    up = sorted((j for j in pruned if g[j] > 0), key=lambda j: (-claim[j], j))
    down = sorted((j for j in pruned if g[j] < 0), key=lambda j: (claim[j], j))
    negative = sorted(
        (j for j in range(len(row)) if j not in pruned and g[j] < 0), key=lambda j: (wanda[j], j)
    )
    positive = sorted(
        (j for j in range(len(row)) if j not in pruned and g[j] > 0), key=lambda j: (wanda[j], j)
    )
    movable = set(range(len(row))) - pruned
    first = error = sum(g[j] for j in pruned)
    masks = [(abs(error), set(pruned))]
    for _ in range(options.max_cycles):
        if abs(error) <= options.update_threshold:
            break
        claims = up if error > 0 else down
        if not claims:
            break
        back = claims.pop(0)
        if group is None:
            kept = negative if error > 0 else positive
            if not kept:
                continue
            gone = kept.pop(0)
        else:
            start = back // group * group
            there = [j for j in range(start, start + group) if j in movable]
            if not there:
                continue
            gone = min(there, key=lambda j: (initial[j], j))
        after = error + g[gone] - g[back]
        if (options.same_sign or group is not None) and np.sign(after) != np.sign(first):
            break
        movable.discard(gone)
        pruned = (pruned - {back}) | {gone}
        error = after
        masks.append((abs(error), set(pruned)))
    chosen = masks[-1][1] if options.keep == "all" else min(masks, key=lambda each: each[0])[1]
    return [j in chosen for j in range(len(row))]


def slow(
    options: DSnoT,
    weight: Tensor,
    inputs: Tensor,
    sparsity: float,
    pattern: Pattern | None,
) -> list[list[bool]]:
    exact, moments = weight.double().numpy(), Moments(inputs.double().numpy())
    initial = initial_scores(exact, moments, options)
    zeros = int(sparsity * exact.shape[1] + 1e-9) if pattern is None else pattern[1] - pattern[0]
    group = None if pattern is None else pattern[1]
    return [
        slow_row(row, scores, moments, options, zeros, group)
        for row, scores in zip(exact, initial, strict=True)
    ]


OPTIONS = [
    {},
    {"keep": "all"},
    {"same_sign": True},
    {"initial": "magnitude"},
    {"initial": "sparsegpt", "keep": "all"},
    {"variance": "pooled", "keep": "all"},
    {"variance_power": 0.0, "keep": "all"},
    {"variance_power": 0.5},
    {"max_cycles": 3},
    {"update_threshold": 2.0, "keep": "all"},
]


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "pattern", [None, Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(3, 4)]
)
def test_the_mask_is_that_of_the_slow_version(
    fields: dict[str, Any], pattern: Pattern | None
) -> None:
    options = DSnoT(**fields)
    moved = 0.0
    for seed in range(6):
        weight, inputs = example(12, 32, seed)
        sparsity = (0.3, 0.6, 0.8)[seed % 3] if pattern is None else 1 - pattern[0] / pattern[1]
        pruned = prune(options, weight, inputs, sparsity, pattern)
        assert pruned.mask.tolist() == slow(options, weight, inputs, sparsity, pattern)
        moved += pruned.facts["swaps"]
    assert moved > 20


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 24),
    st.sampled_from([0.1, 0.5, 0.9]),
    st.sampled_from(OPTIONS),
    st.integers(0, 9999),
)
def test_any_shape_has_the_mask_of_the_slow_version(
    rows: int, columns: int, sparsity: float, fields: dict[str, Any], seed: int
) -> None:
    options = DSnoT(**fields)
    weight, inputs = example(rows, columns, seed)
    mask = prune(options, weight, inputs, sparsity).mask
    assert mask.tolist() == slow(options, weight, inputs, sparsity, None)


# -------------------------------------------------------------------------------------- properties


def errors(weight: Tensor, mask: Tensor, inputs: Tensor) -> Tensor:
    """|eps| of each row: the mean over windows of the summed error of its output."""
    lost = inputs.double() @ (weight.double() * mask).T  # [windows, tokens, rows]
    return lost.sum(dim=1).mean(dim=0).abs()


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(1, 4)])
@pytest.mark.parametrize("same_sign", [False, True])
def test_no_rows_error_grows_and_most_errors_shrink(
    pattern: Pattern | None, same_sign: bool
) -> None:
    for seed in range(5):
        weight, inputs = example(64, 128, seed)
        sparsity = 0.6 if pattern is None else 1 - pattern[0] / pattern[1]
        options = DSnoT(same_sign=same_sign)
        pruned = prune(options, weight, inputs, sparsity, pattern)
        start = prune(DSnoT(max_cycles=0), weight, inputs, sparsity, pattern)
        before, after = (errors(weight, each.mask, inputs) for each in (start, pruned))
        assert bool((after <= before + 1e-6).all())
        assert float(after.median()) < 0.5 * float(before.median())
        unsettled = int((after > options.update_threshold).sum())
        assert abs(pruned.facts["rows_unsettled"] - unsettled) <= 1


def test_the_threshold_is_on_the_scale_of_a_windows_sum() -> None:
    """Twice the tokens in each window double the error; twice the windows do not change it."""
    weight, inputs = example(40, 64, seed=1)
    options = DSnoT(update_threshold=3.0)
    once = prune(options, weight, inputs).facts["rows_unsettled"]
    assert prune(options, weight, inputs.repeat(2, 1, 1)).facts["rows_unsettled"] == once
    longer = prune(options, weight, inputs.repeat(1, 2, 1))
    half = prune(options.model_copy(update={"update_threshold": 1.5}), weight, inputs)
    assert torch.equal(longer.mask, half.mask)
    assert not torch.equal(longer.mask, prune(options, weight, inputs).mask)


def test_inputs_without_variance_come_back_first_and_by_their_contribution() -> None:
    """One output, error positive. Columns 0 to 2 are pruned; 1 and 2 never vary."""
    inputs = torch.ones(4, 5, 6)
    inputs[:, ::2, 0] = 3.0
    weight = torch.tensor([[0.1, 0.02, 0.03, -1.0, -1.1, 5.0]])
    one = prune(DSnoT(initial="magnitude", max_cycles=1, keep="all"), weight, inputs)
    assert one.mask.tolist() == [[True, True, False, True, False, False]]
    two = prune(
        DSnoT(initial="magnitude", max_cycles=1, keep="all", variance_power=0), weight, inputs
    )
    assert two.mask.tolist() == [[False, True, True, True, False, False]]


def test_weights_that_contribute_nothing_are_never_moved() -> None:
    weight, inputs = example(20, 32, seed=2)
    inputs[:, :, 5] = 0.0  # pruned, since it scores nothing
    balanced = torch.randn(6, 4, 1, generator=torch.Generator().manual_seed(1)) * 9
    inputs[:, :8, 6:7] = torch.cat([balanced, -balanced], dim=1)  # kept, and sums to nothing
    inputs[:, 8, 6] = 0.0
    weight[:, 6] = 50.0
    mask = prune(DSnoT(keep="all"), weight, inputs).mask
    assert bool(mask[:, 5].all())
    assert not bool(mask[:, 6].any())


def test_a_row_without_a_weight_to_let_go_stays_as_it_was() -> None:
    """All contributions are positive, but a weight to zero would need a negative one."""
    weight, inputs = torch.rand(4, 8) + 0.5, torch.rand(3, 5, 8)
    pruned = prune(DSnoT(keep="all"), weight, inputs)
    assert torch.equal(pruned.mask, prune(DSnoT(max_cycles=0), weight, inputs).mask)
    assert pruned.facts == {"swaps": 0.0, "rows_unsettled": 4.0}


def test_sparsegpts_facts_are_there_when_its_hessian_is_used() -> None:
    weight, inputs = example(4, 8, seed=3)
    inputs[:, :, 2] = 0.0
    facts = prune(DSnoT(initial="sparsegpt"), weight, inputs).facts
    assert facts["dead_columns"] == 1
    assert facts["damping_raises"] == 0


# ------------------------------------------------------------------------------------------- scope


def test_outside_of_attention_nothing_is_swapped() -> None:
    paths = {
        "model.layers.0.self_attn.q_proj": "self_attn.q_proj",
        "h.0.self_attention.dense": "self_attention.dense",
        "transformer.attention_blocks.0.mlp.up_proj": "mlp.up_proj",
        "model.layers.0.mlp.experts.3": "mlp.experts.3",
        "h.0.attn_gate": "attn_gate",
    }
    cycles = [each.max_cycles for each in options_by_matrix(DSnoT(), paths).values()]
    assert cycles == [50, 50, 0, 0, 0]
    everywhere = options_by_matrix(DSnoT(scope="all"), paths)
    assert set(everywhere.values()) == {DSnoT(scope="all")}


def test_a_model_without_attention_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"scope: 'attention'.*set scope: all"):
        options_by_matrix(DSnoT(), {"layers.0.mixer.in_proj": "mixer.in_proj"})
