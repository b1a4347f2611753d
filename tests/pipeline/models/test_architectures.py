"""Pruning small, randomly initialised models of real classes: dense decoders and mixtures."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.matrices import STARVED_TOKENS, Matrix, decoder_layers, matrices
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.prune import prune_model, run
from pipeline.pruning.walk import walk
from pipeline.pruning.window_groups import Memory
from pipeline.specs import (
    FileCorpus,
    LocalModel,
    Magnitude,
    Pattern,
    PruneSpec,
    SparseGPT,
    Wanda,
    WindowsSpec,
)

SMALL: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LONG = {"max_position_embeddings": 64}
GATED = {**SMALL, **SIZES, **LONG, "intermediate_size": 64, "num_key_value_heads": 2}
MIXED = {**GATED, "num_experts_per_tok": 2}
GPT: dict[str, Any] = {**SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
LATENT = {
    **MIXED,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
DENSE: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**GATED),
    "llama-with-biases": transformers.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True),
    "llama-with-wide-heads": transformers.LlamaConfig(**GATED, head_dim=12),
    "llama-tied": transformers.LlamaConfig(**GATED, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**GATED, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**GATED),
    "qwen3": transformers.Qwen3Config(**GATED, head_dim=8),
    "gemma2": transformers.Gemma2Config(**GATED, head_dim=8, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=8),
    "gemma4": transformers.Gemma4TextConfig(  # layers hand keys and values to later ones
        **GATED,
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "cohere": transformers.CohereConfig(**GATED, use_qk_norm=True),  # norms of several heads
    "phi3": transformers.Phi3Config(**GATED, pad_token_id=0),  # fused q, k, v and gate, up
    "olmo": transformers.OlmoConfig(**GATED),
    "olmo2": transformers.Olmo2Config(**GATED),
    "opt": transformers.OPTConfig(**SMALL, **SIZES, **LONG, ffn_dim=64, word_embed_proj_dim=32),
    "opt-projected": transformers.OPTConfig(
        **SMALL, **SIZES, **LONG, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "neox": transformers.GPTNeoXConfig(**SMALL, **SIZES, **LONG, intermediate_size=64),
    "gpt2": transformers.GPT2Config(**GPT),  # matrices are stored [in_features, out_features]
    "gptj": transformers.GPTJConfig(**GPT, rotary_dim=4),
    "falcon": transformers.FalconConfig(**SMALL, **SIZES),  # layers return tuples
    "bloom": transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=3, n_head=4),
    "mpt": transformers.MptConfig(vocab_size=96, d_model=32, n_layers=3, n_heads=4, max_seq_len=64),
}
MIXTURES: dict[str, Any] = {
    "mixtral": transformers.MixtralConfig(**MIXED, num_local_experts=4),
    "qwen2-moe": transformers.Qwen2MoeConfig(
        **MIXED, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=48
    ),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **MIXED, num_experts=4, moe_intermediate_size=24, head_dim=8
    ),
    "olmoe": transformers.OlmoeConfig(**MIXED, num_experts=4),
    "deepseek-v2": transformers.DeepseekV2Config(**LATENT),
    "deepseek-v3": transformers.DeepseekV3Config(**LATENT),
    "granite": transformers.GraniteMoeConfig(**MIXED, num_local_experts=4),
    "gpt-oss": transformers.GptOssConfig(  # experts are stored [in_features, out_features]
        **MIXED,
        num_local_experts=4,
        head_dim=8,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
    "gemma4-moe": transformers.Gemma4TextConfig(  # experts stand next to attention in the layer
        **GATED,
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
    ),
}
CONFIGS = {**DENSE, **MIXTURES}
LEFT = (
    "norm.weight",
    "mlp.gate.weight",  # a router in classes with experts; in the others it is called gate_proj
    "router.weight",
    "router.proj.weight",
    "shared_expert_gate.weight",
    "_bias",
)
"""Endings of the names of parameters with several dimensions that must stay dense."""


@functools.cache
def dense_model(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, sinks and routers start at zero
            if not bool(parameter.any()):
                parameter.normal_(std=0.02)
    return model


def model_of(name: str) -> Any:
    model = type(dense_model(name))(dense_model(name).config).eval()
    model.load_state_dict(dense_model(name).state_dict())
    return model


@functools.cache
def pruned_by_wanda(name: str) -> Any:
    model = model_of(name)
    report = prune_model(
        model, windows(), Wanda(), ModelTarget(LayerTarget(0.5)), memory=Memory(batch_size=4)
    )
    assert report.sparsity == 0.5
    return model


def windows(count: int = 10, seqlen: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 96, (count, seqlen), generator=generator)


def to_be_pruned(model: Any) -> dict[str, Tensor]:
    """Return matrices `[..., out_features, in_features]` by name, found by names alone."""
    root, _ = decoder_layers(model)
    transposed = model.config.model_type == "gpt2"
    return {
        name: weight.mT if transposed or _is_gpt_oss_expert(model, name) else weight
        for name, weight in model.named_parameters()
        if name.startswith(f"{root}.") and weight.dim() > 1 and not name.endswith(LEFT)
    }


def _is_gpt_oss_expert(model: Any, name: str) -> bool:
    return model.config.model_type == "gpt_oss" and ".experts." in name


@pytest.mark.parametrize("name", CONFIGS)
def test_half_of_every_row_of_every_matrix_is_zero_and_all_else_is_unchanged(name: str) -> None:
    pruned = pruned_by_wanda(name)
    weights = to_be_pruned(pruned)
    assert len(weights) >= 3 * 4
    for key, weight in weights.items():
        assert set((weight == 0).sum(-1).flatten().tolist()) == {weight.shape[-1] // 2}, key
    dense = dict(dense_model(name).named_parameters())
    for key, after in pruned.named_parameters():
        assert torch.equal(dense[key], after) == (key not in weights), key
    for (key, before), (_, after) in zip(
        dense_model(name).named_buffers(), pruned.named_buffers(), strict=True
    ):
        assert torch.equal(before, after), key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_gives_the_same_logits_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = pruned_by_wanda(name)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        before, after = (each(input_ids=windows(2)).logits for each in (model, again))
    assert torch.equal(before, after)
    assert bool(after.isfinite().all())


# ------------------------------------------------------------------------------------- statistics

Activation = Callable[[Tensor], Tensor]


def gated_by_silu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gated_by_gelu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def gated_like_gpt_oss(both: Tensor) -> Tensor:
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


ACTIVATIONS: dict[str, Activation] = {
    "gpt-oss": gated_like_gpt_oss,
    "gemma4-moe": gated_by_gelu,
}


def inputs_of(model: Any, prefix: str, data: Tensor, activation: Activation) -> dict[str, Tensor]:
    """Return the inputs of each matrix of a layer, `[tokens, in_features]` in float64, one window
    at a time through the whole model. Linear layers have hooks. For experts only the routing is
    seen, as their module gets it; their inputs are computed from it."""
    seen: dict[str, list[Tensor]] = {}
    routed: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def linear(name: str) -> Callable[..., None]:
        return lambda module, given: seen.setdefault(name, []).append(given[0].flatten(0, -2))

    def experts(name: str) -> Callable[..., None]:
        return lambda module, given: routed.setdefault(name, []).append((given[0], given[1]))

    handles = [
        module.register_forward_pre_hook((experts if name.endswith(".experts") else linear)(name))
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix)
        if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D))
        or name.endswith(".experts")
    ]
    for window in data:
        model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    given = {name: torch.cat(parts).double() for name, parts in seen.items()}
    for name, parts in routed.items():
        module = model.get_submodule(name)
        states = torch.cat([states for states, _ in parts]).double()
        chosen = torch.cat([chosen for _, chosen in parts])
        for expert in range(len(module.gate_up_proj)):
            mine = states[(chosen == expert).any(dim=1)]
            gate_up = module.gate_up_proj[expert].double()
            if _is_gpt_oss_expert(model, f"{name}."):
                both = mine @ gate_up + module.gate_up_proj_bias[expert].double()
            else:
                both = mine @ gate_up.T
            given[f"{name}.gate_up_proj.{expert}"] = mine
            given[f"{name}.down_proj.{expert}"] = activation(both)
    return given


@pytest.mark.parametrize("name", CONFIGS)
def test_the_walk_sees_what_a_full_forward_pass_of_the_pruned_model_sees(name: str) -> None:
    """Each layer's inputs are those of the model with all earlier layers pruned and this one still
    dense. Batches of 4, 4 and 2 windows are compared with one window at a time."""
    model, data = model_of(name), windows()
    root, _ = decoder_layers(model)
    visited: list[int] = []

    def visit(number: int, found: list[Matrix]) -> None:
        visited.append(number)
        activation = ACTIVATIONS.get(name, gated_by_silu)
        full = inputs_of(model, f"{root}.{number}", data, activation)
        assert {matrix.name for matrix in found} <= set(full)
        for matrix in found:
            inputs = full[matrix.name]
            assert matrix.tokens == len(inputs)
            assert matrix.starved == (".experts." in matrix.name and len(inputs) < STARVED_TOKENS)
            if not matrix.starved:
                squares = inputs.square().sum(0)
                scale = float(squares.max())
                norms, hessian = matrix.statistics["squared_norms"], matrix.statistics["hessian"]
                torch.testing.assert_close(norms.double(), squares, rtol=1e-4, atol=1e-6 * scale)
                torch.testing.assert_close(
                    hessian.double(), inputs.T @ inputs, rtol=1e-4, atol=1e-5 * scale
                )
            matrix.weight[:, ::2] = 0.0

    walk(model, data, ("squared_norms", "hessian"), visit, Memory(batch_size=4))
    assert visited == [0, 1, 2]


# --------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_implementation_is_the_models_own_again_afterwards(name: str) -> None:
    model = model_of(name)
    before = model.config._experts_implementation
    during: list[str] = []

    def visit(number: int, found: list[Matrix]) -> None:
        during.append(model.config._experts_implementation)

    walk(model, windows(2), ("squared_norms",), visit)
    assert during == ["eager"] * 3
    assert model.config._experts_implementation == before != "eager"


def starve(model: Any, layer: int, expert: int) -> None:
    """Route no token to an expert: its logit is far below the others'."""
    router = model.model.layers[layer].mlp.router
    router.bias.data[expert] = -1e4


@pytest.mark.parametrize(("pruner", "per_row"), [(Wanda(), True), (SparseGPT(), False)])
def test_a_starved_expert_is_pruned_by_its_weights_alone_and_reported(
    pruner: Wanda | SparseGPT, per_row: bool
) -> None:
    model = model_of("gpt-oss")
    starve(model, layer=1, expert=2)
    before = {number: each.weight.clone() for number, each in enumerate(layer_one(model))}
    report = prune_model(
        model, windows(), pruner, ModelTarget(LayerTarget(0.5)), memory=Memory(batch_size=4)
    )
    experts = "model.layers.1.mlp.experts"
    starved = {
        name: facts["starved_tokens"]
        for name, facts in report.facts.items()
        if name.startswith(experts) and "starved_tokens" in facts
    }
    assert starved == {f"{experts}.gate_up_proj.2": 0.0, f"{experts}.down_proj.2": 0.0}
    for number, matrix in enumerate(layer_one(model)):
        if matrix.name in starved:
            scores = before[number].abs()
            if per_row:
                expected = scores < scores.sort(dim=1).values[:, scores.shape[1] // 2, None]
            else:  # the smallest of each block of 128 columns, here all
                expected = scores < scores.flatten().sort().values[scores.numel() // 2]
            assert torch.equal(matrix.weight == 0, expected)
            assert torch.equal(matrix.weight[~expected], before[number][~expected])


def layer_one(model: Any) -> list[Matrix]:
    return matrices("model.layers.1", model.model.layers[1])


@pytest.mark.parametrize("tokens", [STARVED_TOKENS - 1, STARVED_TOKENS])
def test_an_expert_is_starved_below_the_stated_number_of_tokens(tokens: int) -> None:
    """All experts but one are excluded, and it gets one token too few or just enough."""
    model = model_of("gpt-oss")
    model.model.layers[0].mlp.router.top_k = 1
    for expert in (1, 2, 3):
        starve(model, layer=0, expert=expert)
    seen: list[dict[str, Any]] = []

    def visit(number: int, found: list[Matrix]) -> None:
        seen.append({each.name.split("experts.")[-1]: each for each in found})

    walk(model, windows(1, tokens), ("squared_norms",), visit)
    first, other = seen[0]["gate_up_proj.0"], seen[0]["gate_up_proj.1"]
    assert (first.tokens, other.tokens) == (tokens, 0)
    assert first.starved == (tokens < STARVED_TOKENS)
    assert other.starved
    assert not seen[0]["model.layers.0.self_attn.q_proj"].starved
    assert torch.equal(other.statistics["squared_norms"], torch.ones(32))
    assert torch.equal(first.statistics["squared_norms"], torch.ones(32)) == first.starved


def test_without_data_no_expert_counts_as_starved() -> None:
    report = prune_model(model_of("mixtral"), None, Magnitude(), ModelTarget(LayerTarget(0.5)))
    assert not any(report.facts.values())


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss"])
def test_patterns_hold_along_the_inputs_of_matrices_that_are_stored_transposed(name: str) -> None:
    model = model_of(name)
    prune_model(model, windows(), Wanda(), ModelTarget(LayerTarget(0.5, Pattern(2, 4))))
    for weight in to_be_pruned(model).values():
        groups = (weight != 0).unflatten(-1, (-1, 4)).sum(-1)
        assert set(groups.flatten().tolist()) == {2}


def test_the_stage_reports_starved_experts_with_their_tokens(tmp_path: Path) -> None:
    source, data, output = (tmp_path / name for name in ("dense", "windows", "output"))
    for folder in (data, output):
        folder.mkdir()
    model = model_of("gpt-oss")
    starve(model, layer=1, expert=2)
    model.save_pretrained(source)
    vocabulary = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(source)
    ids = pa.array(windows().tolist(), pa.list_(pa.int32()))
    pq.write_table(pa.table({"token_ids": ids}), data / "windows.parquet")
    dense = LocalModel(path=str(source), dtype="float32")
    calibration = WindowsSpec(source=FileCorpus(path="unread"), model=dense)
    spec = PruneSpec(model=dense, pruner=Wanda(), sparsity=0.5, calibration=calibration)
    report = run(spec, {calibration.key: data}, output)
    experts = "model.layers.1.mlp.experts"
    starved = report["starved_experts"]
    assert {name: count for name, count in starved.items() if name.startswith(experts)} == {
        f"{experts}.gate_up_proj.2": 0,
        f"{experts}.down_proj.2": 0,
    }
    assert report["sparsity"] == 0.5
    assert report["matrices"] == 3 * (4 + 4 * 2)
