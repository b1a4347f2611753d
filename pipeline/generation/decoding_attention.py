"""Attention of one new token on a CPU, without a copy of keys and values for each query head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "calprune_grouped_sdpa"
"""The name of this attention in transformers."""


@contextmanager
def grouped_queries(model: Any) -> Iterator[None]:
    """Make a model on a CPU attend with its query heads grouped, within the block.

    transformers repeats the keys and values of a group for each of its query heads, in every layer
    and step, which takes as long as the rest of a step. The last bits differ. Models that do not
    attend by SDPA are left as they are.
    """
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(GROUPED_SDPA, _attend)
    AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
    model.set_attn_implementation(GROUPED_SDPA)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `sdpa_attention_forward` does.

    Args:
        query: [samples, heads, tokens, head_dim]
        key: [samples, groups, keys, head_dim]
        value: [samples, groups, keys, head_dim]
        attention_mask: [samples, 1, tokens, keys]

    Returns:
        [samples, tokens, heads, head_dim]
    """
    samples, heads, tokens, _ = query.shape
    groups = key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    if tokens > 1 or groups == heads or not one_mask or more.get("position_bias") is not None:
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **more
        )
        return attended, None
    # The heads of a group take the dimension of tokens: all of them see what the one token sees.
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.view(samples, groups, heads // groups, -1),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return attended.reshape(samples, 1, heads, -1), None
