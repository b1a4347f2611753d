"""Generation by transformers: the prefixes of one length are one batch.

So nothing is padded. Padding would use positions that some models do not have, enter the state of
recurrent layers, and make positions that depend on the length depend on other texts.
"""

import inspect
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from pipeline.generation.decoding_attention import grouped_queries
from pipeline.generation.sampling import Sampling, logits_processors, uniform_numbers
from pipeline.models.checkpoint import generation_settings
from pipeline.models.nonfinite import nonfinite_error
from pipeline.models.weight_files import unexpected_tensors
from pipeline.progress import TokenStream


class TransformersEngine:
    """A loaded model that generates."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.generation_config: GenerationConfig = model.generation_config

    @property
    def facts(self) -> dict[str, Any]:
        """Engine, version and device, and tensors of the checkpoint that the model does not use."""
        return {
            "backend": "transformers",
            "backend_version": metadata.version("transformers"),
            "device": device_name(self.model.device.type),
            **unexpected_tensors(self.model),
        }

    def write(
        self,
        prefixes: Sequence[Sequence[int]],
        sample_ids: Sequence[int],
        ends: Sequence[int],
        known: Sequence[int],
        *,
        sampling: Sampling,
        seqlen: int,
        seed: int,
    ) -> list[list[int]]:
        """Return what follows each prefix; those of one length are one batch.

        Raises:
            NonFiniteError: if the model's logits are NaN or infinite.
        """
        batches: dict[int, list[int]] = {}
        for place, prefix in enumerate(prefixes):
            batches.setdefault(len(prefix), []).append(place)
        stream = TokenStream(total=sum(seqlen - len(prefix) for prefix in prefixes))
        written: dict[int, list[int]] = {}
        for length, places in batches.items():
            numbers = [sample_ids[place] for place in places]
            uniforms = uniform_numbers(seed, numbers, seqlen).to(self.model.device)
            finite = FiniteLogits(self.model, numbers, ends, length)
            draw = logits_processors(
                sampling, uniforms, length, known=known, ends=ends, seqlen=seqlen
            )
            processors = LogitsProcessorList([finite, *draw])
            given = [prefixes[place] for place in places]
            rows = self._generate_batch(given, processors, ends, seqlen, stream)
            written |= zip(places, rows, strict=True)
        return [written[place] for place in range(len(prefixes))]

    @torch.inference_mode()
    def _generate_batch(
        self,
        prefixes: Sequence[Sequence[int]],
        processors: LogitsProcessorList,
        ends: Sequence[int],
        seqlen: int,
        stream: TokenStream,
    ) -> list[list[int]]:
        """Return what follows prefixes of equal length."""
        given = torch.tensor(prefixes, device=self.model.device)
        length = given.shape[1]
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=seqlen - length,
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else 0,
        )
        # RecurrentGemma's modules keep their state, and a prefix of one token would continue it.
        if (clear := getattr(self.model.base_model, "_setup_cache", None)) is not None:
            clear(self.model.config, len(given), given.device, self.model.dtype)
        with generation_settings(self.model, settings), grouped_queries(self.model):
            generated = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                logits_processor=processors,
                streamer=stream,
                **preallocated_cache(self.model, seqlen),
            )
        rows: list[list[int]] = generated[:, length:].tolist()
        return rows


class FiniteLogits:
    """Stop at logits that are NaN or infinite, from which any token might be drawn.

    Args:
        model: gives the logits.
        sample_ids: the number of each row's sample.
        ends: ids after which a row is no longer read.
        prompt_length: ids of each row before the first step.
    """

    def __init__(
        self, model: Any, sample_ids: Sequence[int], ends: Sequence[int], prompt_length: int
    ) -> None:
        self.model = model
        self.sample_ids = sample_ids
        self.ends = list(ends)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` [samples, vocabulary] as they are.

        Raises:
            NonFiniteError: if the greatest of a row is NaN or infinite; it names the sample, the
                token and the module where such values begin.
        """
        wrong = scores.amax(dim=1).isfinite().logical_not_()  # NaN is the greatest of its row
        if bool(wrong.any()):
            written = input_ids[:, self.prompt_length :]
            ends = torch.tensor(self.ends, dtype=torch.int64, device=written.device)
            wrong &= ~torch.isin(written, ends).any(dim=1)
            if bool(wrong.any()):
                row = int(wrong.int().argmax())
                what = f"sample {self.sample_ids[row]}, new token {written.shape[1] + 1}"
                raise nonfinite_error(what, self.model, input_ids[row].tolist())
        return scores


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer's keys and values, in memory for as many tokens as there will be.

    `DynamicLayer` copies all of them for every new token, which took up to half of a step's time.
    The values, and so the texts, are the same.

    Args:
        max_tokens: tokens that there is memory for.
    """

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens = max_tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate memory for keys and values like these, [samples, heads, tokens, head_dim]."""
        super().lazy_initialization(key_states, value_states)
        self.memory = [
            states.new_empty((*states.shape[:-2], self.max_tokens, states.shape[-1]))
            for states in (key_states, value_states)
        ]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of new tokens; return all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        length = before + key_states.shape[-2]
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory[..., before:length, :] = states
        self.keys, self.values = (memory[..., :length, :] for memory in self.memory)
        return self.keys, self.values


def preallocated_cache(model: Any, max_tokens: int) -> dict[str, DynamicCache]:
    """Return the argument of `generate` for a cache of at most `max_tokens` tokens.

    It is empty if a layer keeps anything but the keys and values of all tokens, such as those of a
    window, or a state: `generate` then makes the cache that the model needs.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return {}
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return {}
    cache.layers = [PreallocatedLayer(max_tokens) for _ in cache.layers]
    return {"past_key_values": cache}


def device_name(kind: str) -> str:
    """Return the name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name() if kind == "cuda" else kind
