"""Generation that chooses each token over the whole vocabulary, by transformers' own warpers.

The draw is the inverse CDF over all entries in vocabulary order, so calprune must draw the same
tokens from the same uniform numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def penalise(input_ids: Tensor, scores: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits `scores` [samples, vocabulary] of the tokens in
    `input_ids` [samples, length] (arXiv 1909.05858, section 4.1)."""
    logits = scores.gather(1, input_ids)
    return scores.scatter(1, input_ids, torch.where(logits < 0, logits * penalty, logits / penalty))


def draw_tokens(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Return the tokens [samples, 1] at which the cumulative probability of softmax(`scores`)
    [samples, vocabulary] passes `uniforms` [samples]."""
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)


@torch.inference_mode()
def generate_plainly(
    model: Any,
    prefixes: Sequence[Sequence[int]],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seqlen: int,
    seed: int,
) -> list[list[int]]:
    """Continue each prefix to `seqlen` ids, and return the new ids. Samples are numbered from 0.

    Args:
        prefixes: of one length.
    """
    length = len(prefixes[0])
    streams = [np.random.SeedSequence(seed, spawn_key=(number,)) for number in range(len(prefixes))]
    uniforms = torch.from_numpy(
        np.stack([np.random.default_rng(stream).random(seqlen) for stream in streams])
    ).to(model.device)
    warpers = [
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
    ]

    def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = penalise(input_ids, scores, repetition_penalty)
        for warper in warpers:
            scores = warper(input_ids, scores)
        drawn = draw_tokens(scores, uniforms[:, input_ids.shape[1] - length])
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)

    input_ids = torch.tensor(prefixes, device=model.device)
    written = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=seqlen - length,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([choose]),
    )
    return [row[length:] for row in written.tolist()]
