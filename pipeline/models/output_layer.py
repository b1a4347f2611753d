"""Logits of a few positions at a time, from a model's hidden states.

All logits of a batch, `[tokens, vocabulary]` in float32, take gigabytes, and every pass over them
waits for memory. So they are computed in parts that fit a processor's cache, each used before the
next.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.models.layer_calls import skipped_layers
from pipeline.models.layerwise import layerwise_outputs
from pipeline.models.matrices import decoder_layers
from pipeline.models.memory import (
    ACCELERATOR_LOGITS,
    BATCH_TOKENS,
    LAYER_LOGITS,
    PART_LOGITS,
)
from pipeline.models.positions import forget_longer_texts, length_dependence
from pipeline.models.streaming import is_streamed, memory_of

MOST_NATS = math.log(np.finfo(np.float64).max)
"""Largest loss with a perplexity in float64. A model that has collapsed has about 10 to 20."""

PROBE_TOKENS = 16
"""Number of tokens, with ids from 0, that a model is probed with."""

MOVED = 0.05
"""Mean change of logits, as a share of their standard deviation, that no rounding explains."""


def joined(parts: Iterable[tuple[Tensor, ...]], positions: int) -> list[Tensor]:
    """Return values of all positions, each kind `[positions]`, from those of part after part.

    They are written to tensors that exist from the first part on. Small results that are kept one
    by one come to lie where the part's logits were, so that the next ones need a new place: the
    process grew by all logits of a batch.

    Raises:
        ValueError: if the parts have another number of positions.
    """
    whole: list[Tensor] = []
    start = 0
    for values in parts:
        whole = whole or [torch.empty(positions, dtype=v.dtype, device=v.device) for v in values]
        end = start + len(values[0])
        for all_values, own in zip(whole, values, strict=True):
            all_values[start:end] = own
        start = end
    if start != positions:
        raise ValueError(f"there are values of {start} positions instead of {positions}")
    return whole


@torch.inference_mode()
def check_causal(model: Any) -> None:
    """Check that a model predicts a token only from those before it.

    Raises:
        InputError: if later tokens change the logits of earlier ones, as in an encoder (BERT).
    """
    half = PROBE_TOKENS // 2
    ids = torch.arange(PROBE_TOKENS, device=model.device)
    pair = torch.stack([ids, torch.cat([ids[:half], ids[half:].flip(0)])])
    (logits,) = OutputLayer(model, chunked=False).states([{"input_ids": pair}])
    first, other = logits[:, :half].float()
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
    with _files_unread(model, input_ids):
        hidden = getattr(model.base_model(input_ids, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return False
        expected = model(input_ids, use_cache=False).logits
    return torch.allclose(
        head(hidden).float(), expected.float(), rtol=1e-5, atol=1e-6, equal_nan=True
    )


def _files_unread(model: Any, input_ids: Tensor) -> AbstractContextManager[None]:
    """Skip decoder layers that are in files: what comes after them takes any hidden states."""
    if not is_streamed(model):
        return nullcontext()
    return skipped_layers(model, decoder_layers(model)[1], {"input_ids": input_ids})


class OutputLayer:
    """A model's forward pass, and its logits at chosen positions.

    Args:
        model: a causal language model.
        chunked: take hidden states from the forward pass and logits from the output layer; if
            false, all logits from the forward pass. By default what `head_is_linear` returns.
    """

    def __init__(self, model: Any, chunked: bool | None = None) -> None:
        self.model = model
        self.streamed = is_streamed(model)
        self.chunked = head_is_linear(model) if chunked is None else chunked
        self.device = model.device
        self.lengths = length_dependence(model.config)
        self._body = model.base_model if self.chunked else model
        self._head = model.get_output_embeddings() if self.chunked else nn.Identity()
        self._vocabulary = model.config.get_text_config().vocab_size

    def batch_tokens(self, asked: int) -> int:
        """Return how many tokens to pass at a time where a stage may pass so many."""
        is_small = self.streamed and self.device.type == "cpu"
        return min(asked, BATCH_TOKENS) if is_small else asked

    def states(self, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Tensor]:
        """Yield the states of each batch, as `forward` returns them.

        A model with its decoder layers in files reads each layer once for as many batches as there
        is memory for their hidden states.

        Args:
            batches: token ids `[rows, tokens]` as `input_ids`, and an attention mask of the same
                shape if the model is to have one; the texts of a batch are of one group of
                `lengths`.
        """
        on_device = ({name: each.to(self.device) for name, each in it.items()} for it in batches)
        if not self.streamed:
            for inputs in on_device:
                yield self.forward(**inputs, use_cache=False)[0]
            return
        for output in layerwise_outputs(self._body, list(on_device), memory_of(self.model)):
            yield self._states(output)

    def forward(self, **inputs: Any) -> tuple[Tensor, Any]:
        """Run a model in memory on texts of one group of `lengths`.

        Returns:
            States `[rows, tokens, hidden]`, or logits `[rows, tokens, vocabulary]` if not
            `chunked`; and keys and values, if the model returns them.
        """
        if self.lengths.grows_beyond is not None:
            forget_longer_texts(self._body)
        output = self._body(**inputs)
        return self._states(output), output.get("past_key_values")

    @torch.inference_mode()
    def logits_dtype(self) -> torch.dtype:
        """Return the type in which the model gives its logits."""
        input_ids = torch.arange(PROBE_TOKENS, device=self.device)[None]
        with _files_unread(self.model, input_ids):
            dtype: torch.dtype = self.model(input_ids, use_cache=False).logits.dtype
        return dtype

    def _states(self, output: Any) -> Tensor:
        states: Tensor = output.last_hidden_state if self.chunked else output.logits
        return states

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
            del logits, own  # before the next ones are made
