"""Kept weights fitted by gradients, against least squares and what must not change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.errors import InputError, NonFiniteError
from pipeline.models.matrices import decoder_layers, matrices
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.finished_layers import FinishedLayers
from pipeline.pruning.prune import PruneReport, _summary, prune_model
from pipeline.pruning.reconstruction import Fit, Reconstructor, _rate, parts_of
from pipeline.pruning.window_groups import Memory
from pipeline.specs import FirstLayers, Magnitude, Reconstruction, Wanda
from tests.pipeline.pruning.test_finished_layers import Kept, Stopped, Written
from tests.pipeline.pruning.test_prune import CONFIGS, GATED
from tests.pipeline.tiny_models import random_model, windows

HALF = ModelTarget(LayerTarget(0.5))
QUICK = Reconstruction(epochs=3, learning_rate=1e-3)


def prune(
    model: Any,
    reconstruction: Reconstruction | None = QUICK,
    fitted_to: Tensor | None = None,
    **options: Any,
) -> PruneReport:
    given = {"target": HALF, "pruner": Wanda(), **options}
    fitted_to = windows() if fitted_to is None else fitted_to
    fit = None if reconstruction is None else Fit(reconstruction, fitted_to)
    return prune_model(model, windows(), **given, fit=fit)


class Block(nn.Module):
    """A linear layer inside a module, so that it is fitted by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, states: Tensor) -> Any:
        return self.inner(states)


class Layer(nn.Module):
    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.block = Block()
        self.calls = calls

    def forward(self, states: Tensor) -> Tensor:
        for _ in range(self.calls):
            states = states + self.block(states)
        return states


class Decoder(nn.Module):
    """A model whose layers' parts are linear: the best kept weights have a closed form."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(96, 8)
        self.layers = nn.ModuleList(layers)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        states: Tensor = self.embeddings(input_ids)
        for layer in self.layers:
            states = layer(states)
        return states


def test_a_linear_part_comes_to_the_least_squares_of_its_kept_weights() -> None:
    torch.manual_seed(0)
    model = Decoder([Layer(), Layer()]).eval()
    dense = [layer.block.inner.weight.detach().clone() for layer in model.layers]  # type: ignore[union-attr, operator]
    inputs = model.embeddings(windows()).reshape(-1, 8).detach().double()
    slow = Reconstruction(epochs=400, learning_rate=0.02, batch_size=10)
    prune(model, slow)
    below = inputs
    for weight, layer in zip(dense, model.layers, strict=True):
        found = layer.block.inner.weight.detach()  # type: ignore[union-attr, operator]
        outputs = below @ weight.double().T
        for row in range(8):
            kept = found[row] != 0
            assert int(kept.sum()) == 4
            solved = torch.linalg.lstsq(below[:, kept], outputs[:, row, None]).solution[:, 0]
            torch.testing.assert_close(found[row, kept].double(), solved, rtol=0, atol=2e-3)
        below = below + below @ found.double().T


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox", "opt", "phi3"])
def test_the_error_of_every_part_falls_and_nothing_else_changes(name: str) -> None:
    masked, fitted = random_model(CONFIGS[name]), random_model(CONFIGS[name])
    prune(masked, None)
    report = prune(fitted)
    root, layers = decoder_layers(fitted)
    assert report.sparsity == pytest.approx(0.5)
    for facts in report.facts.values():
        assert 0 < facts["error_after"] < facts["error_before"]
    pruned = {f"{name}.weight" for name in report.facts}
    for (path, one), other in zip(masked.named_parameters(), fitted.parameters(), strict=True):
        if path in pruned:
            assert not one.equal(other), path
        else:
            assert one.equal(other), path
    first = matrices(f"{root}.0", layers[0])
    for one, other in zip(matrices(f"{root}.0", decoder_layers(masked)[1][0]), first, strict=True):
        assert (one.weight == 0).equal(other.weight == 0)  # its inputs are the same


def test_attention_and_mlp_are_fitted_apart_and_a_layer_with_lone_matrices_as_one() -> None:
    def names(config: str) -> dict[str, int]:
        root, layers = decoder_layers(random_model(CONFIGS[config]))
        parts = parts_of(f"{root}.0", layers[0], matrices(f"{root}.0", layers[0]))
        for part in parts:
            assert len(part.parameters) == len(part.matrices)
        return {part.name: len(part.matrices) for part in parts}

    assert names("llama") == {"self_attn": 4, "mlp": 3}
    assert names("neox") == {"attention": 2, "mlp": 2}
    assert names("opt") == {"": 6}


def test_experts_of_a_mixture_are_fitted_and_its_router_stays() -> None:
    config = transformers.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2)
    masked, fitted = random_model(config), random_model(config)
    prune(masked, None)
    report = prune(fitted)
    _, layers = decoder_layers(fitted)
    for number, layer in enumerate(layers):
        for (path, one), other in zip(
            decoder_layers(masked)[1][number].named_parameters(), layer.parameters(), strict=True
        ):
            stays = "norm" in path or path.endswith("mlp.gate.weight")
            assert one.equal(other) == stays, path
    assert all(facts["error_after"] < facts["error_before"] for facts in report.facts.values())


def test_the_targets_are_what_the_dense_layer_makes_of_the_pruned_ones_outputs() -> None:
    model = random_model(CONFIGS["llama"])
    options = Reconstruction(epochs=1, learning_rate=1e-9, batch_size=10)
    report = prune(model, options)
    below = model(windows(), output_hidden_states=True).hidden_states[2]
    positions = model.model.rotary_emb(below, torch.arange(24)[None])
    outputs: list[Tensor] = []
    for layer in (model.model.layers[2], random_model(CONFIGS["llama"]).model.layers[2]):
        hook = layer.mlp.register_forward_hook(lambda module, given, out: outputs.append(out))
        layer(below, position_embeddings=positions)
        hook.remove()
    got, wanted = outputs
    expected = ((got - wanted).square().sum() / wanted.square().sum()).item()
    found = report.facts["model.layers.2.mlp.down_proj"]["error_after"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_rate_rises_for_a_tenth_of_the_steps_and_then_falls_to_zero() -> None:
    rates = [_rate(100, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == 0.0
    assert _rate(1, 0) == 1.0


def test_one_batch_takes_a_step_of_the_learning_rate() -> None:
    """Adam's first step moves every weight by the rate, whatever its gradient."""
    torch.manual_seed(0)
    model = Decoder([Layer()]).eval()
    before = model.layers[0].block.inner.weight.detach().clone()  # type: ignore[union-attr, operator]
    prune(model, Reconstruction(epochs=1, learning_rate=1e-3, batch_size=10))
    after = model.layers[0].block.inner.weight.detach()  # type: ignore[union-attr, operator]
    moved = (after - before)[after != 0].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)


def test_a_part_whose_error_would_rise_keeps_its_weights() -> None:
    masked, fitted = random_model(CONFIGS["llama"]), random_model(CONFIGS["llama"])
    prune(masked, None)
    report = prune(fitted, Reconstruction(epochs=1, learning_rate=10.0))
    assert all(facts["error_after"] == facts["error_before"] for facts in report.facts.values())
    for one, other in zip(masked.parameters(), fitted.parameters(), strict=True):
        assert one.equal(other)


def test_weights_that_become_infinite_are_an_error() -> None:
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.self_attn\..*diverged"):
        prune(random_model(CONFIGS["llama"]), Reconstruction(epochs=3, learning_rate=1e38))


def test_half_precision_is_fitted_in_single_and_stored_in_its_own_type() -> None:
    model = random_model(CONFIGS["llama"]).bfloat16()
    report = prune(model)
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert all(facts["error_after"] < facts["error_before"] for facts in report.facts.values())
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("budgets", [(0, 2**30), (0, 0)], ids=["host", "files"])
def test_the_bytes_do_not_depend_on_where_hidden_states_are(budgets: tuple[int, int]) -> None:
    one, other = random_model(CONFIGS["llama"]), random_model(CONFIGS["llama"])
    prune(one)
    memory = Memory(device_hidden_bytes=budgets[0], host_hidden_bytes=budgets[1])
    prune(other, memory=memory)
    for weight, same in zip(one.parameters(), other.parameters(), strict=True):
        assert weight.equal(same)


def test_it_goes_on_after_the_layers_that_an_earlier_attempt_finished(tmp_path: Path) -> None:
    straight = random_model(CONFIGS["llama"])
    whole = prune(straight)
    kept = Kept(2)
    files = FinishedLayers(tmp_path / "one", masks=False, keep=kept, checkpoint=Written())
    with pytest.raises(Stopped):
        prune(random_model(CONFIGS["llama"]), finished=files)
    kept.most = 99
    files = FinishedLayers(tmp_path / "two", masks=False, keep=kept, checkpoint=Written())
    resumed = random_model(CONFIGS["llama"])
    report = prune(resumed, finished=files)
    assert report.resumed_layers == 2
    assert report.facts == whole.facts
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert one.equal(other)


def test_another_set_is_fitted_to_while_the_mask_stays() -> None:
    other_set = torch.randint(96, (6, 16), generator=torch.Generator().manual_seed(5))
    one, other = random_model(CONFIGS["llama"]), random_model(CONFIGS["llama"])
    prune(one)
    prune(other, fitted_to=other_set)
    first, second = (model.model.layers[0].mlp.up_proj.weight for model in (one, other))
    assert not first.equal(second)
    assert (first == 0).equal(second == 0)


def test_a_pruner_without_data_is_fitted_to_the_set_as_well() -> None:
    model = random_model(CONFIGS["llama"])
    report = prune_model(model, None, Magnitude(), HALF, fit=Fit(QUICK, windows()))
    assert all(facts["error_after"] < facts["error_before"] for facts in report.facts.values())


def test_layers_that_an_allocation_leaves_dense_stay_so() -> None:
    model, dense = random_model(CONFIGS["llama"]), random_model(CONFIGS["llama"])
    prune(model, target=ModelTarget(LayerTarget(0.5), FirstLayers(share=0.3)))
    for number, (one, other) in enumerate(zip(model.model.layers, dense.model.layers, strict=True)):
        same = one.mlp.up_proj.weight.equal(other.mlp.up_proj.weight)
        assert same == (number > 0)


def test_a_part_that_is_called_twice_is_refused_by_name() -> None:
    model = Decoder([Layer(calls=2)]).eval()
    with pytest.raises(InputError, match=r"layers\.0\.block.*called 2 times"):
        prune(model)


def test_windows_that_do_not_suit_the_model_are_refused() -> None:
    with pytest.raises(InputError, match="token id"):
        prune(random_model(CONFIGS["llama"]), fitted_to=torch.full((2, 8), 96))


def test_the_report_has_the_mean_errors_over_matrices() -> None:
    facts = {
        "one": {"error_before": 0.4, "error_after": 0.1, "dead_columns": 0.0},
        "two": {"error_before": 0.2, "error_after": 0.2},
    }
    fitted = _summary(facts)["fitted"]
    assert fitted == pytest.approx({"error_before": 0.3, "error_after": 0.15})
    assert "fitted" not in _summary({"one": {"dead_columns": 0.0}})


def test_hidden_states_leave_with_the_context() -> None:
    model = random_model(CONFIGS["llama"])
    memory = Memory(device_hidden_bytes=0, host_hidden_bytes=0)
    with Reconstructor(model, Fit(QUICK, windows()), memory) as fitted:
        folder = fitted._store._folder
        assert folder is not None
        assert folder.exists()
    assert not folder.exists()
