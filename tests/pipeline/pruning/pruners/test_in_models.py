"""Pruners in whole models: names, windows, reports."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.prune import PruneReport, prune_model
from pipeline.pruning.sparsity_check import SparsityError, check_sparsity
from pipeline.pruning.walk import walk
from pipeline.pruning.window_groups import Memory
from pipeline.specs import ALPS, AWQ, GPTQ, RIA, RTN, DSnoT, Pattern, Pruner, Wanda
from tests.pipeline.tiny_models import random_model, windows

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=64),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
}


def model_of(name: str) -> Any:
    return random_model(CONFIGS[name])


def pruned(
    name: str, pruner: Pruner, sparsity: float = 0.5, pattern: Pattern | None = None
) -> tuple[dict[str, Tensor], PruneReport]:
    """Return the pruned weights by name, and the report."""
    model = model_of(name)
    report = prune_model(
        model,
        windows(),
        pruner,
        ModelTarget(LayerTarget(sparsity, pattern)),
        memory=Memory(batch_size=3),
    )
    weights = dict(model.named_parameters())
    return {each.matrix: weights[f"{each.matrix}.weight"] for each in report.matrices}, report


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_dsnot_swaps_in_attention_and_leaves_wandas_mask_elsewhere(
    name: str, pattern: Pattern | None
) -> None:
    dsnot, wanda = DSnoT(update_threshold=0.0), Wanda()
    swapped, report = pruned(name, dsnot, 0.5, pattern)
    plain, _ = pruned(name, wanda, 0.5, pattern)
    first = [matrix for matrix in swapped if ".0." in matrix]  # their inputs are the same
    assert any("att" in matrix for matrix in first)
    for matrix in first:
        same = torch.equal(swapped[matrix] == 0, plain[matrix] == 0)
        # what the first layer's later matrices are given is the dense layer's, too
        assert same != ("att" in matrix)
        assert ("swaps" in report.facts[matrix]) == ("att" in matrix)
    everywhere, report = pruned(name, DSnoT(update_threshold=0.0, scope="all"), 0.5, pattern)
    assert all(facts["swaps"] > 0 for facts in report.facts.values())
    for matrix in first:
        assert not torch.equal(everywhere[matrix] == 0, plain[matrix] == 0)


def test_a_model_without_attention_is_refused_before_any_forward_pass() -> None:
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mixer = layer.self_attn
        del layer.self_attn
    model.register_forward_pre_hook(lambda module, given: pytest.fail("it was run"))
    with pytest.raises(InputError, match="set scope: all"):
        prune_model(model, windows(), DSnoT(), ModelTarget(LayerTarget(0.5)))


def test_window_sums_and_variances_do_not_depend_on_the_batches() -> None:
    names = ("window_sums", "variances", "pooled_variances")

    def values(batch_size: int) -> list[Tensor]:
        found: list[Tensor] = []
        walk(
            model_of("llama"),
            windows(),
            names,
            lambda number, matrices: found.extend(
                matrix.statistics[name] for matrix in matrices for name in names
            ),
            Memory(batch_size=batch_size),
        )
        return found

    one = values(1)
    for batch_size in (3, 10):
        for found, expected in zip(values(batch_size), one, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_windows_sum_is_that_of_the_first_layers_own_inputs() -> None:
    model, seen = model_of("llama"), []
    query = model.model.layers[0].self_attn.q_proj
    handle = query.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(input_ids=windows())
    handle.remove()
    inputs = seen[0].detach().double()  # [windows, seqlen, hidden_size]
    found: dict[str, Tensor] = {}

    def visit(number: int, matrices: list[Any]) -> None:
        if number == 0:
            found.update(matrices[0].statistics)

    walk(
        model,
        windows(),
        ("window_sums", "variances", "pooled_variances"),
        visit,
        Memory(batch_size=4),
    )
    expected = {
        "window_sums": inputs.sum(dim=1).mean(dim=0),
        "variances": inputs.flatten(0, 1).var(dim=0, correction=0),
        "pooled_variances": inputs.var(dim=1, correction=0).mean(dim=0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5)


def test_rias_permutations_are_in_the_report_and_the_pattern_holds_in_them() -> None:
    weights, report = pruned("llama", RIA(permutation=True), 0.5, Pattern(2, 4))
    assert set(report.permutations) == set(weights)
    for matrix, weight in weights.items():
        order = report.permutations[matrix]
        assert order.sort().values.equal(torch.arange(weight.shape[1]))
        zeros = (weight[:, order] == 0).view(len(weight), -1, 4).sum(dim=2)
        assert set(zeros.flatten().tolist()) == {2}
        assert report.facts[matrix]["retained_score"] >= 1
    assert not pruned("llama", RIA(), 0.5, Pattern(2, 4))[1].permutations


def test_a_pattern_is_checked_in_the_order_in_which_it_should_hold() -> None:
    order = torch.tensor([0, 4, 1, 5, 2, 3, 6, 7])
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[:, order] = torch.tensor([[True, True, False, False] * 2])  # columns 0, 2, 3 and 4
    weight = (~mask).float()
    check_sparsity("up_proj", weight, mask, LayerTarget(0.5, Pattern(2, 4)), "row", order)
    with pytest.raises(SparsityError, match="3 weights of a group of 4 are pruned, not 2"):
        check_sparsity("up_proj", weight, mask, LayerTarget(0.5, Pattern(2, 4)), "row")


def test_wandas_variant_reports_the_sparsity_that_it_reached() -> None:
    weights, report = pruned("llama", Wanda(variant=True), 0.5)
    assert 0.45 < report.sparsity < 0.55
    for matrix in report.matrices:
        assert matrix.zeros == int((weights[matrix.matrix] == 0).sum())
        assert 0 < report.facts[matrix.matrix]["share"] < 0.8


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_alps_prunes_a_model_and_its_outputs_differ_less_than_wandas(
    pattern: Pattern | None,
) -> None:
    dense = model_of("llama")(input_ids=windows()).logits

    def distance(pruner: Pruner) -> float:
        model: nn.Module = model_of("llama")
        prune_model(model, windows(), pruner, ModelTarget(LayerTarget(0.5, pattern)))
        return float((model(input_ids=windows()).logits - dense).detach().square().sum())

    assert distance(ALPS()) < distance(Wanda())


@pytest.mark.parametrize(
    ("pruner", "pattern", "error"),
    [
        (Wanda(variant=True), Pattern(2, 4), "variant has no N:M pattern"),
        (RIA(permutation=True), None, "permutation serves N:M patterns"),
        (RTN(), Pattern(2, 4), "rtn prunes nothing: leave the pattern out"),
        (AWQ(), Pattern(2, 4), "awq prunes nothing: leave the pattern out"),
        (GPTQ(), Pattern(2, 4), "gptq takes a pattern's columns in their own order"),
    ],
)
def test_options_that_do_not_go_with_a_pattern_or_without_one_are_refused(
    pruner: Pruner, pattern: Pattern | None, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        prune_model(model_of("llama"), windows(), pruner, ModelTarget(LayerTarget(0.5, pattern)))
