"""Logits of a few positions at a time, from a model's hidden states.

All logits of a batch, `[tokens, vocabulary]` in float32, take gigabytes, and every pass over them
waits for memory. So they are computed in parts that fit a processor's cache, each used before the
next.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.models.positions import forget_longer_texts, length_dependence

MOST_NATS = math.log(np.finfo(np.float64).max)
"""Largest loss with a perplexity in float64. A model that has collapsed has about 10 to 20."""

PROBE_TOKENS = 16
"""Number of tokens, with ids from 0, that a model is probed with."""

MOVED = 0.05
"""Mean change of logits, as a share of their standard deviation, that no rounding explains."""

LAYER_LOGITS = 2**23
"""Logits per call of the output layer on a CPU: with a quarter a call takes 1.3 times as long."""

PART_LOGITS = 2**19
"""Logits per part on a CPU: 2 MiB in float32, which stay in its cache. In parts of `LAYER_LOGITS`
scores took 1.14 times the CPU time in float32 and 1.6 times in bfloat16, losses 1.0 and 1.13 times
(hidden size 576, 49,152 entries, one thread with AVX-512)."""

ACCELERATOR_LOGITS = 2**25
"""Logits per call and per part on a GPU, which fewer do not keep busy."""


@torch.inference_mode()
def check_causal(model: Any) -> None:
    """Check that a model predicts a token only from those before it.

    Raises:
        InputError: if later tokens change the logits of earlier ones, as in an encoder (BERT).
    """
    half = PROBE_TOKENS // 2
    ids = torch.arange(PROBE_TOKENS, device=model.device)
    pair = torch.stack([ids, torch.cat([ids[:half], ids[half:].flip(0)])])
    first, other = model(pair, use_cache=False).logits[:, :half].float()
    if (first - other).abs().mean() > MOVED * first.std():
        name = type(model).__name__
        remedy = "its logits depend on later tokens: take a causal language model, not an encoder"
        raise InputError("model", name, remedy)


@torch.inference_mode()
def head_is_linear(model: Any) -> bool:
    """Return whether the output layer alone turns hidden states into the model's logits.

    It does not if logits are capped or scaled; then the whole forward pass must give them.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    input_ids = torch.arange(PROBE_TOKENS, device=model.device)[None]
    hidden = getattr(model.base_model(input_ids, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        return False
    expected = model(input_ids, use_cache=False).logits
    return torch.allclose(
        head(hidden).float(), expected.float(), rtol=1e-5, atol=1e-6, equal_nan=True
    )


class OutputLayer:
    """A model's forward pass, and its logits at chosen positions.

    Args:
        model: a causal language model.
        chunked: take hidden states from the forward pass and logits from the output layer; if
            false, all logits from the forward pass. By default what `head_is_linear` returns.
    """

    def __init__(self, model: Any, chunked: bool | None = None) -> None:
        self.chunked = head_is_linear(model) if chunked is None else chunked
        self.device = model.device
        self.lengths = length_dependence(model.config)
        self._body = model.base_model if self.chunked else model
        self._head = model.get_output_embeddings() if self.chunked else nn.Identity()
        self._vocabulary = model.config.get_text_config().vocab_size

    def forward(self, **inputs: Any) -> tuple[Tensor, Any]:
        """Run the model on texts of one group of `lengths`.

        Returns:
            States `[rows, tokens, hidden]`, or logits `[rows, tokens, vocabulary]` if not
            `chunked`; and keys and values, if the model returns them.
        """
        if self.lengths.grows_beyond is not None:
            forget_longer_texts(self._body)
        output = self._body(**inputs)
        states = output.last_hidden_state if self.chunked else output.logits
        return states, output.get("past_key_values")

    def logits(
        self, states: Tensor, rows: Tensor, columns: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the logits of some positions, part by part.

        Args:
            states: what `forward` returned.
            rows: row of each position in `states`, `[positions]`.
            columns: token of each position in its row, `[positions]`.

        Yields:
            The positions of a part, and their logits `[part, vocabulary]` in float32, which the
            caller may overwrite.
        """
        cpu = states.device.type == "cpu"
        layer, part = (
            max(1, limit // self._vocabulary)
            for limit in ((LAYER_LOGITS, PART_LOGITS) if cpu else (ACCELERATOR_LOGITS,) * 2)
        )
        for start in range(0, len(rows), layer):
            chosen = slice(start, start + layer)
            logits = self._head(states[rows[chosen], columns[chosen]])
            for place, own in enumerate(logits.split(part)):
                first = start + place * part
                yield slice(first, first + len(own)), own.float()
