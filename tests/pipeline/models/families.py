"""Small configurations of the model types that transformers loads as causal language models."""

import copy
import dataclasses
import functools
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("n_positions", "n_ctx"), 64),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    "num_key_value_heads": 2,
    "head_dim": 8,
    # mixtures
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 24),
    "shared_expert_intermediate_size": 48,
    "first_k_dense_replace": 1,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    # latent and sparse attention
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    # recurrences
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "mamba_d_ssm": 64,
    "mamba_head_dim": 16,
}
"""Sizes by field name; each type takes the fields that it has."""

ATTENTION_BETWEEN = ["linear_attention", "full_attention", "linear_attention"]
CONVOLUTIONS = ["conv", "full_attention", "conv"]
SLIDING = ["sliding_attention", "full_attention", "full_attention"]
PER_LAYER = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "dots1": {"n_shared_experts": 1, "routed_scaling_factor": 1.0},
    "gemma3n_text": {
        **PER_LAYER,
        "layer_types": SLIDING,
        "num_kv_shared_layers": 1,
        "laurel_rank": 8,
    },
    "gemma4": {"vision_config": {**VISION, "head_dim": 8, "num_key_value_heads": 2}},
    "gemma4_text": {
        **PER_LAYER,
        "layer_types": SLIDING,
        "num_kv_shared_layers": 1,
        "global_head_dim": 8,
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"shared_intermediate_size": 48},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": CONVOLUTIONS},
    "lfm2_moe": {"layer_types": CONVOLUTIONS, "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 2,
        "num_hidden_layers": None,
        "head_dim": 8,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": None,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 48,
    },
    "qwen4_exp": {"vision_config": {**VISION, "depth": 1, "out_hidden_size": 32}},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "reformer": {
        "axial_pos_shape": [4, 6],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local", "lsh"],
        "feed_forward_size": 64,
    },
    "roc_bert": {"pronunciation_vocab_size": 96, "shape_vocab_size": 96},
    "rwkv": {"rescale_every": 2},  # of real models it is 6
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""By model type, further or other fields; None removes a field."""
for each in ("granitemoehybrid", "kimi_linear", "minimax", "olmo_hybrid", "qwen3_next"):
    OWN.setdefault(each, {})["layer_types"] = ATTENTION_BETWEEN
for each in ("qwen3_5_text", "qwen3_5_moe_text"):
    OWN[each] = {"layer_types": ATTENTION_BETWEEN}
for each in ("gemma3", "git"):
    OWN[each] = {"vision_config": VISION}

NOT_BUILT = {
    "blt": "three transformers, of bytes and of patches of them",
    "gemma3n": "needs timm for its vision tower; gemma3n_text is tested",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "got_ocr2": "reads images",
    "musicgen": "speaks in codes of sound",
    "musicgen_melody": "speaks in codes of sound",
    "phi4_multimodal": "towers for images and sound cannot be made small",
}
"""By model type, the reason why no small model is tested."""

FAMILIES = [each for each in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if each not in NOT_BUILT]


def config_of(family: str) -> Any:
    """Return a configuration with a few thousand weights; for a model with towers, that of its text
    model."""
    kind = CONFIG_MAPPING[family]
    own = OWN.get(family, {})
    text = kind.sub_configs.get("text_config")
    if text is not None and getattr(text, "model_type", "") in CONFIG_MAPPING:
        return kind(text_config=config_of(text.model_type), **own)
    known = {each.name for each in dataclasses.fields(kind)}
    other_names = kind.attribute_map
    fields = {
        name: value
        for name, value in SMALL.items()
        if name in known or (name in other_names and other_names[name] not in SMALL)
    }
    if "qk_rope_head_dim" in known:
        fields["num_key_value_heads"] = 4
        fields.pop("head_dim", None)
    fields |= own
    return kind(**{name: value for name, value in fields.items() if value is not None})


@functools.cache
def dense_model(family: str) -> Any:
    """Return a randomly initialised model of the type, in float32 and evaluation mode; it must not
    be changed."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, sinks and routers start at zero
            if not bool(parameter.any()):
                parameter.normal_(std=0.02)
    return model


def model_of(family: str) -> Any:
    """Return a copy of `dense_model`, which a test may change."""
    return copy.deepcopy(dense_model(family))


def windows(count: int = 5, seqlen: int = 24) -> Tensor:
    """Return token ids `[count, seqlen]`, the same on every call."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 96, (count, seqlen), generator=generator)
