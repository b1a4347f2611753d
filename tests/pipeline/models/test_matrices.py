"""The matrices of a decoder layer, found by form alone."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from pipeline.errors import InputError
from pipeline.models.matrices import decoder_layers, is_finite, kept_dense, matrices
from tests.pipeline.tiny_models import random_model

GATED: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def names(layer: nn.Module) -> list[str]:
    return [matrix.name.removeprefix("layer.") for matrix in matrices("layer", layer)]


class Experts(nn.Module):
    def __init__(self, count: int, hidden: int, width: int, transposed: bool) -> None:
        super().__init__()
        shape = (hidden, 2 * width) if transposed else (2 * width, hidden)
        self.gate_up_proj = nn.Parameter(torch.randn(count, *shape))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(count, 2 * width))
        self.is_transposed = transposed


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)


class Mixture(nn.Module):
    """A block with experts and the modules next to them."""

    def __init__(self, experts: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        for name, module in others.items():
            self.add_module(name, module)


class Router(nn.Module):
    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, hidden))


# ----------------------------------------------------------------------------------------- found


def test_names_are_those_of_the_model_and_nothing_outside_the_layers_is_found() -> None:
    model = random_model(transformers.LlamaConfig(**GATED))
    root, layers = decoder_layers(model)
    assert root == "model.layers"
    modules = dict(model.named_modules())
    found = [each for n, layer in enumerate(layers) for each in matrices(f"{root}.{n}", layer)]
    assert len(found) == 4 * 7
    for matrix in found:
        assert matrix.weight.data_ptr() == modules[matrix.name].weight.data_ptr()
        assert matrix.weight.shape == modules[matrix.name].weight.shape


@pytest.mark.parametrize("transposed", [False, True])
def test_writing_to_an_experts_matrix_writes_to_that_expert_in_the_models_tensor(
    transposed: bool,
) -> None:
    layer = Mixture(Experts(3, 8, 5, transposed), router=Router(8, 3))
    found = matrices("layer", layer)
    assert [each.name for each in found] == [f"layer.experts.gate_up_proj.{n}" for n in range(3)]
    assert all(each.is_expert and each.weight.shape == (10, 8) for each in found)
    before = layer.experts.gate_up_proj.detach().clone()
    found[1].weight[4, 7] = 0.0
    changed = (layer.experts.gate_up_proj != before).nonzero().tolist()
    assert changed == [[1, 7, 4] if transposed else [1, 4, 7]]


def test_a_weight_that_two_modules_share_is_found_once() -> None:
    layer = MLP(8, 8)
    layer.down_proj.weight = layer.up_proj.weight
    assert names(layer) == ["up_proj"]


# -------------------------------------------------------------------------------------- left alone


@pytest.mark.parametrize("transposed", [False, True])
def test_routers_and_gates_stay_dense_in_every_place(transposed: bool) -> None:
    nested = nn.Module()
    nested.add_module("layer", nn.Linear(8, 3))
    layer = Mixture(
        Experts(3, 8, 5, transposed),
        gate=nn.Linear(8, 3, bias=False),
        router=Router(8, 3),
        nested=nested,
        with_more_choices=nn.Linear(8, 5 + 2),  # some classes add experts that do nothing
        shared_expert_gate=nn.Linear(8, 1),
        shared_expert=MLP(8, 6),
    )
    assert [name for name in names(layer) if "experts." not in name] == [
        "shared_expert.up_proj",
        "shared_expert.down_proj",
    ]


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router() -> None:
    layer = Mixture(Experts(6, 8, 5, False), gate=nn.Linear(8, 6), shared_expert=MLP(8, 6))
    assert [name for name in names(layer) if "experts." not in name] == [
        "shared_expert.up_proj",
        "shared_expert.down_proj",
    ]


def test_projections_to_and_from_the_experts_own_width_are_no_routers() -> None:
    layer = Mixture(
        Experts(3, 4, 5, False),
        gate=nn.Linear(8, 3),
        to_latent=nn.Linear(8, 4),
        from_latent=nn.Linear(4, 8),
    )
    assert [name for name in names(layer) if "experts." not in name] == ["to_latent", "from_latent"]


def test_a_layer_without_experts_has_no_routers_however_few_the_outputs() -> None:
    layer = nn.ModuleDict({"one": nn.Linear(8, 1), "three": nn.Linear(8, 3)})
    assert names(layer) == ["one", "three"]


def test_experts_in_a_list_are_experts_if_something_chooses_from_them() -> None:
    listed = Mixture(nn.ModuleList([MLP(8, 5) for _ in range(3)]), gate=nn.Linear(8, 3))
    found = matrices("layer", listed)
    assert [each.name for each in found] == [
        f"layer.experts.{number}.{name}" for number in range(3) for name in ("up_proj", "down_proj")
    ]
    assert all(each.is_expert for each in found)
    unlisted = Mixture(nn.ModuleList([MLP(8, 5) for _ in range(2)]), other=nn.Linear(8, 3))
    assert names(unlisted)[-1] == "other"
    assert not any(each.is_expert for each in matrices("layer", unlisted))


def test_embeddings_convolutions_norms_and_states_are_left_alone_and_listed() -> None:
    class HeadLayerNorm(Router):
        """A weight `[heads, head size]`."""

    layer = MLP(8, 16)
    layer.up_proj.bias = nn.Parameter(torch.zeros(16))
    layer.add_module("positions", nn.Embedding(30, 8))
    layer.add_module("norm", HeadLayerNorm(4, 4))
    layer.add_module("convolution", nn.Conv1d(8, 8, 3, bias=False))
    layer.add_module("mixer", nn.Module())
    layer.mixer.A_log = nn.Parameter(torch.zeros(16, 4))
    assert names(layer) == ["up_proj", "down_proj"]
    assert {(each.name, each.shape, each.why) for each in kept_dense("layer", layer)} == {
        ("layer.up_proj.bias", (16,), "vector"),
        ("layer.positions.weight", (30, 8), "embedding"),
        ("layer.norm.weight", (4, 4), "norm"),
        ("layer.convolution.weight", (8, 8, 3), "convolution"),
        ("layer.mixer.A_log", (16, 4), "state of a recurrence"),
    }


def test_a_router_of_several_layers_is_left_alone_by_its_class() -> None:
    class SkippingRouter(nn.Sequential):
        """The last layer has one output more than there are experts."""

    router = SkippingRouter(nn.Linear(8, 6), nn.Linear(6, 4))
    layer = Mixture(Experts(3, 8, 5, False), gate=router, shared_expert=MLP(8, 6))
    assert [name for name in names(layer) if "experts." not in name] == [
        "shared_expert.up_proj",
        "shared_expert.down_proj",
    ]


# --------------------------------------------------------------------------------------- refusals


def test_experts_of_unknown_layout_are_refused_by_name() -> None:
    layer = Mixture(Experts(3, 8, 5, False), gate=nn.Linear(8, 3))
    del layer.experts.is_transposed
    with pytest.raises(InputError, match=r"layer\.experts\.gate_up_proj.*layout"):
        matrices("layer", layer)


@pytest.mark.parametrize("shape", [(3 * 16, 8), (4, 2), (8, 8, 3), (1, 1, 8)])
def test_a_tensor_that_no_rule_names_is_refused_by_name(shape: tuple[int, ...]) -> None:
    layer = MLP(8, 16)
    layer.add_module("novelty", nn.Module())
    layer.novelty.coefficients = nn.Parameter(torch.zeros(shape))
    with pytest.raises(InputError, match=r"layer\.novelty\.coefficients.*cannot be pruned"):
        matrices("layer", layer)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_by_name(dtype: torch.dtype) -> None:
    layer = MLP(8, 16)
    packed = layer.up_proj.weight.detach().to(dtype)
    layer.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(InputError, match=r"layer\.up_proj\.weight.*unquantized"):
        matrices("layer", layer)


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no list of decoder layers"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_a_layer_without_linear_layers_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"blocks\.3.*no linear layer"):
        matrices("blocks.3", nn.LayerNorm(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_values_with_an_infinite_sum_count_as_finite(dtype: torch.dtype) -> None:
    largest = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest)
    assert is_finite(torch.zeros(0, 4, dtype=dtype))
    for wrong in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]):
        values = torch.ones(3, 5, dtype=dtype)
        values[1, : len(wrong)] = torch.tensor(wrong, dtype=dtype)
        assert not is_finite(values)
