"""Models with random weights, small enough for every test."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
"""The shape of `tiny_llama`, in fields that other model types have too."""

UNEVEN = transformers.Gemma4TextConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    global_head_dim=16,
    vocab_size_per_layer_input=96,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=0,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
"""Its layers have 9,728, 12,800, 9,728 and 12,800 weights."""


def seeded(make: Callable[[], Any]) -> Any:
    """Make a model from seed 0 without a change of torch's own state, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def tiny_llama(vocab_size: int, positions: int = 64, **options: Any) -> Any:
    """Return a Llama whose logits differ clearly from token to token."""
    config = LlamaConfig(
        **TINY, vocab_size=vocab_size, max_position_embeddings=positions, **options
    )
    return seeded(lambda: LlamaForCausalLM(config))


def random_model(config: Any) -> Any:
    """Return a model of a configuration with random weights, in float32 and evaluation mode."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def windows(count: int = 10, seqlen: int = 24) -> Tensor:
    """Return token ids `[count, seqlen]` below 96, the same on every call."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, 96, (count, seqlen), generator=generator)
