"""Top-k and top-p for vLLM on a CPU, where its own sort the whole vocabulary.

vLLM imports this module by name. Nothing else may, since it imports vLLM.
"""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from pipeline.generation.sampling import nucleus, scatter_logits, top_k_logits
from pipeline.generation.vllm_engine import TOP_K_TOP_P


class TopKTopP(LogitsProcessor):  # type: ignore[misc]  # vLLM has no types here
    """Keep the logits that vLLM would keep, but sort only those that top-k kept.

    It runs where vLLM's own top-k and top-p do, after penalties and temperature. What vLLM then
    draws depends on each token's logit alone, so the texts are the same.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.top_k_top_p: tuple[int, float] | None = None

    def is_argmax_invariant(self) -> bool:
        """Return True: the likeliest token is always kept."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take the settings of new requests; those of one shard have the same."""
        for _, request, _, _ in batch_update.added if batch_update else ():
            self.top_k_top_p = (request.extra_args or {}).get(TOP_K_TOP_P)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return `logits` [requests, vocabulary] with -inf where a token is dropped."""
        return logits if self.top_k_top_p is None else keep_top_k_top_p(logits, *self.top_k_top_p)


def keep_top_k_top_p(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Return what vLLM's `apply_top_k_top_p` makes of `logits` [requests, vocabulary]."""
    requests, vocabulary = logits.shape
    k = torch.full((requests,), min(top_k, vocabulary), dtype=torch.int32)
    p = torch.full((requests,), top_p)
    tokens, likeliest = top_k_logits(logits, top_k)
    if likeliest.shape[1] == vocabulary:
        whole: torch.Tensor = apply_top_k_top_p(logits, k, p)
        return whole
    kept, tied = nucleus(likeliest, float(p[0]))  # rounded to float32, as vLLM does
    scores = scatter_logits(tokens, kept, vocabulary)
    scores[tied] = apply_top_k_top_p(logits[tied], k[tied], p[tied])
    return scores
