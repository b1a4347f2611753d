"""The walk through small models of real classes, randomly initialised."""

import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.errors import InputError, NonFiniteError
from pipeline.matrices import Matrix, decoder_layers, matrices
from pipeline.walk import walk

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GATED = {
    **SMALL,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**GATED),
    "wide-heads": transformers.LlamaConfig(**GATED, head_dim=12),
    "mistral": transformers.MistralConfig(**GATED, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**GATED),
    "qwen3": transformers.Qwen3Config(**GATED, head_dim=8),
    "gemma2": transformers.Gemma2Config(**GATED, head_dim=8, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=8),
    # embeddings of each layer and keys and values of earlier layers are passed to the layers
    "gemma4": transformers.Gemma4TextConfig(
        **GATED,
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "cohere": transformers.CohereConfig(**GATED, use_qk_norm=True, bos_token_id=1, eos_token_id=2),
    "phi3": transformers.Phi3Config(**GATED, pad_token_id=0),
    "olmo2": transformers.Olmo2Config(**GATED),
    "neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=64, max_position_embeddings=64),
    "opt": transformers.OPTConfig(
        **SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64
    ),
    "falcon": transformers.FalconConfig(**SMALL),  # its layers return tuples
    "bloom": transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=4, n_head=4),
}


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def windows(count: int = 10, seqlen: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, 96, (count, seqlen), generator=generator)


def inputs_of(model: Any, linears: dict[str, nn.Linear], data: Tensor) -> dict[str, Tensor]:
    """What each linear layer is given `[tokens, in_features]` in float64, one window at a time
    through the whole model."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    handles = [
        linear.register_forward_pre_hook(
            lambda module, given, name=name: seen[name].append(given[0])
        )
        for name, linear in linears.items()
    ]
    for window in data:
        model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([part.flatten(0, -2) for part in seen[name]]).double() for name in seen}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_walk_sees_what_a_full_forward_pass_of_the_pruned_model_sees(name: str) -> None:
    """Each layer's inputs are those of the model with all layers below pruned and itself still
    dense. Batches of 4, 4 and 2 windows against one window at a time."""
    model, data = model_of(CONFIGS[name]), windows()
    visited: list[int] = []

    def visit(number: int, found: list[Matrix]) -> None:
        visited.append(number)
        full = inputs_of(model, {each.name: model.get_submodule(each.name) for each in found}, data)
        for matrix in found:
            inputs = full[matrix.name]
            norms, hessian = matrix.statistics["squared_norms"], matrix.statistics["hessian"]
            scale = float(inputs.square().sum(0).max())
            torch.testing.assert_close(
                norms.double(), inputs.square().sum(0), rtol=1e-4, atol=1e-6 * scale
            )
            torch.testing.assert_close(
                hessian.double(), inputs.T @ inputs, rtol=1e-4, atol=1e-5 * scale
            )
            matrix.weight[:, ::2] = 0.0

    walk(model, data, ("squared_norms", "hessian"), visit, batch_size=4)
    assert visited == [0, 1, 2, 3]


def test_names_are_those_of_the_model_and_nothing_outside_the_layers_is_visited() -> None:
    model = model_of(CONFIGS["llama"])
    root, layers = decoder_layers(model)
    assert root == "model.layers"
    modules = dict(model.named_modules())
    found = [each for n, layer in enumerate(layers) for each in matrices(f"{root}.{n}", layer)]
    assert len(found) == 4 * 7
    for matrix in found:
        assert modules[matrix.name].weight.data_ptr() == matrix.weight.data_ptr()


def test_matrices_that_read_the_same_tensor_share_their_statistics() -> None:
    def visit(number: int, found: list[Matrix]) -> None:
        shared: dict[int, set[str]] = {}
        for matrix in found:
            identity = id(matrix.statistics["hessian"])
            shared.setdefault(identity, set()).add(matrix.name.rsplit(".", 1)[1])
        assert sorted(map(sorted, shared.values())) == [
            ["down_proj"],
            ["gate_proj", "up_proj"],
            ["k_proj", "q_proj", "v_proj"],
            ["o_proj"],
        ]

    walk(model_of(CONFIGS["llama"]), windows(), ("hessian",), visit, batch_size=4)


@pytest.mark.parametrize("batch_size", [None, 3, 10, 99])
def test_statistics_do_not_depend_on_the_batch_size(batch_size: int | None) -> None:
    def norms(size: int | None) -> list[Tensor]:
        totals: list[Tensor] = []

        def visit(number: int, found: list[Matrix]) -> None:
            totals.extend(matrix.statistics["squared_norms"] for matrix in found)

        walk(model_of(CONFIGS["llama"]), windows(), ("squared_norms",), visit, size)
        return totals

    for found, expected in zip(norms(batch_size), norms(1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("data", "asked"), [(None, ("hessian",)), (windows(), ())])
def test_without_data_or_statistics_the_model_is_never_run(
    data: Tensor | None, asked: tuple[str, ...]
) -> None:
    model, runs, visited = model_of(CONFIGS["opt"]), [], []
    model.register_forward_pre_hook(lambda module, given: runs.append(given))
    walk(model, data, asked, lambda number, found: visited.append((number, len(found))))
    assert visited == [(number, 6) for number in range(4)]
    assert not runs


def test_a_batch_of_inputs_is_let_go_as_soon_as_the_pruned_layer_has_passed_it_on() -> None:
    model, seen = model_of(CONFIGS["llama"]), []
    alive: list[bool] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(weakref.ref(given[0]))
        if len(seen) == 5 + 2:  # the pruned layer's second batch
            alive.extend(seen[place]() is not None for place in (0, 1))

    def visit(number: int, found: list[Matrix]) -> None:
        if number == 0:
            model.model.layers[1].register_forward_pre_hook(look)

    walk(model, windows(), ("squared_norms",), visit, batch_size=2)
    assert len(seen) == 2 * 5
    assert alive == [False, True]


def test_hooks_do_not_outlive_the_walk_even_when_it_fails() -> None:
    def fail(number: int, found: list[Matrix]) -> None:
        raise RuntimeError("stop here")

    model = model_of(CONFIGS["llama"])
    with pytest.raises(RuntimeError, match="stop here"):
        walk(model, windows(), ("hessian",), fail)
    assert not any(module._forward_pre_hooks for module in model.modules())


# --------------------------------------------------------------------------------------- refusals


def refused(model: nn.Module) -> None:
    root, layers = decoder_layers(model)
    for number, layer in enumerate(layers):
        matrices(f"{root}.{number}", layer)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_experts_in_one_tensor_are_refused_by_name(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")
    model = model_of(config(**GATED, num_experts_per_tok=1))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj.*experts"):
        refused(model)


def test_matrices_that_are_stored_the_other_way_round_are_refused_by_name() -> None:
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(InputError, match=r"transformer\.h\.0\.attn\.c_attn\.weight.*\[32, 96\]"):
        refused(model_of(config))


def test_layers_of_more_than_one_kind_are_no_reason_to_prune_another_list() -> None:
    """Jamba alternates attention and state-space layers; the latter have convolutions."""
    config = transformers.JambaConfig(**GATED, attn_layer_period=2, attn_layer_offset=1)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mamba\.conv1d\.weight"):
        refused(model_of(config))


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no list of decoder layers"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_a_layer_without_linear_layers_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"blocks\.3.*no linear layer"):
        matrices("blocks.3", nn.LayerNorm(4))


def test_layers_that_are_called_twice_are_refused() -> None:
    model = model_of(CONFIGS["llama"])
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*once each"):
        walk(model, windows(), ("hessian",), lambda number, found: None)


def test_a_matrix_that_the_model_never_uses_is_refused_by_name() -> None:
    model = model_of(CONFIGS["llama"])
    model.model.layers[1].spare = nn.Linear(32, 32)
    with pytest.raises(InputError, match=r"layers\.1\.spare.*takes no part"):
        walk(model, windows(), ("hessian",), lambda number, found: None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("asked", ["squared_norms", "hessian"])
def test_an_activation_that_is_not_finite_is_an_error_that_names_its_matrix(
    value: float, asked: str
) -> None:
    model = model_of(CONFIGS["llama"])
    model.model.layers[1].input_layernorm.weight.data[3] = value
    visited: list[int] = []
    with pytest.raises(NonFiniteError, match=rf"layers\.1\.self_attn\.q_proj: its input.*{asked}"):
        walk(model, windows(), (asked,), lambda number, found: visited.append(number))
    assert visited == [0]
