"""Gradients of a layer's output norm, against closed forms and differences."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipeline.models.matrices import Matrix, decoder_layers
from pipeline.pruning.gradients import GRADIENT_SQUARES
from pipeline.pruning.walk import walk
from tests.pipeline.pruning.test_prune import CONFIGS, GATED
from tests.pipeline.pruning.test_reconstruction import Decoder, Layer
from tests.pipeline.tiny_models import random_model, windows


def squares(model: Any, data: Tensor) -> dict[str, Tensor]:
    """Mean squared gradients by matrix, with every layer dense."""
    found: dict[str, Tensor] = {}

    def look(number: int, matrices: list[Matrix]) -> None:
        found.update({each.name: each.statistics[GRADIENT_SQUARES].clone() for each in matrices})

    walk(model, data, ("squared_norms", GRADIENT_SQUARES), look)
    return found


def test_of_a_linear_layer_it_is_the_output_times_the_input_over_the_norm() -> None:
    torch.manual_seed(0)
    model = Decoder([Layer(), Layer()]).eval()
    found = squares(model, windows())
    states = model.embeddings(windows()).detach().double()
    for number, layer in enumerate(model.layers):
        weight = layer.block.inner.weight.detach().double()  # type: ignore[union-attr, operator]
        outputs = states + states @ weight.T
        norms = outputs.flatten(1).norm(dim=1)
        gradients = torch.einsum("nto,nti->noi", outputs, states) / norms[:, None, None]
        expected = gradients.square().mean(dim=0)
        got = found[f"layers.{number}.block.inner"].double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-10)
        states = outputs


def norms(model: Any, data: Tensor) -> Tensor:
    """Norms of the first layer's output, one for each window."""
    hidden: Tensor = model(data, output_hidden_states=True).hidden_states[1]
    return hidden.double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_it_is_the_slope_of_the_norm_in_experts_and_in_transposed_weights(kind: str) -> None:
    config: Any = transformers.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=4)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4)
    model = random_model(config)
    data = windows(3)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def look(number: int, matrices: list[Matrix]) -> None:
        for each in matrices if number == 0 else ():
            found[each.name] = each.statistics[GRADIENT_SQUARES].clone(), each.weight

    walk(model, data, ("squared_norms", GRADIENT_SQUARES), look)
    for name in list(found)[:: 3 if kind == "gpt2" else 5]:
        mean, weight = found[name]
        row, column = divmod(int(mean.argmax()), mean.shape[1])
        slopes = []
        for step in (1e-2, -1e-2):
            weight[row, column] += step
            with torch.no_grad():
                slopes.append(norms(model, data))
            weight[row, column] -= step
        slope = (slopes[0] - slopes[1]) / 2e-2
        assert float(slope.square().mean()) == pytest.approx(float(mean[row, column]), rel=0.02)


def test_half_precision_comes_near_and_weights_stay_as_they_are() -> None:
    exact = squares(random_model(CONFIGS["llama"]), windows())
    model = random_model(CONFIGS["llama"]).bfloat16()
    before = [weight.clone() for weight in model.parameters()]
    half = squares(model, windows())
    for name, value in exact.items():
        assert half[name].dtype == torch.float32
        assert float((half[name] - value).norm() / value.norm()) < 0.1
    for one, other in zip(before, model.parameters(), strict=True):
        assert one.equal(other)


def test_every_window_counts_alike_in_any_number() -> None:
    model, data = random_model(CONFIGS["llama"]), windows(4)
    each = [squares(model, data[place : place + 1]) for place in range(4)]
    for name, mean in squares(model, data).items():
        expected = torch.stack([one[name] for one in each]).mean(dim=0)
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-9)


def test_experts_with_too_few_tokens_have_none() -> None:
    config = transformers.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=1)
    model = random_model(config)
    starved: dict[str, bool] = {}

    def look(number: int, matrices: list[Matrix]) -> None:
        for each in matrices:
            if each.is_expert:
                starved[each.name] = each.starved
                assert bool(each.statistics[GRADIENT_SQUARES].any()) != each.starved

    walk(model, windows(4), ("squared_norms", GRADIENT_SQUARES), look)
    assert set(starved.values()) == {True, False}
    assert decoder_layers(model)[0] == "model.layers"
