"""Generation by transformers: a shard is one left-padded batch."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from pipeline.decoding_attention import grouped_queries
from pipeline.progress import TokenStream
from pipeline.sampling import Sampling, logits_processors, uniform_numbers


class TransformersEngine:
    """A loaded model that generates.

    Args:
        model: takes as many more positions than `seqlen` as the lengths of prefixes differ.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.generation_config: GenerationConfig = model.generation_config

    @property
    def facts(self) -> dict[str, str]:
        """Engine, version and device."""
        return {
            "backend": "transformers",
            "backend_version": metadata.version("transformers"),
            "device": device_name(self.model.device.type),
        }

    @torch.inference_mode()
    def write(
        self,
        prefixes: Sequence[Sequence[int]],
        sample_ids: Sequence[int],
        ends: Sequence[int],
        *,
        sampling: Sampling,
        seqlen: int,
        seed: int,
    ) -> list[list[int]]:
        """What comes after each prefix, all in one batch."""
        longest = max(len(prefix) for prefix in prefixes)
        shortest = min(len(prefix) for prefix in prefixes)
        filler = ends[0] if ends else 0
        padding = torch.tensor([longest - len(prefix) for prefix in prefixes])
        input_ids = torch.tensor(
            [[filler] * (longest - len(prefix)) + list(prefix) for prefix in prefixes]
        )
        attention_mask = (torch.arange(longest) >= padding[:, None]).long()
        uniforms = uniform_numbers(seed, list(sample_ids), seqlen)
        device = self.model.device
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=seqlen - shortest,  # a longer prefix's surplus is cut off by the caller
            eos_token_id=list(ends) or None,
            pad_token_id=filler,
        )
        with generation_settings(self.model, settings), grouped_queries(self.model):
            generated = self.model.generate(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                logits_processor=logits_processors(
                    sampling, padding.to(device), uniforms.to(device), longest, ends, seqlen
                ),
                streamer=TokenStream(total=len(prefixes) * settings.max_new_tokens),
                **cache_with_room(self.model, longest + seqlen - shortest),
            )
        return [row[longest:] for row in generated.tolist()]


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer's keys and values, with room for as many tokens as there will be.

    What it extends is copied as a whole to a larger place for every new token, which took up to
    half of a step's time. The values, and so the texts, are the same.

    Args:
        room: tokens.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take memory for keys and values like these, [samples, heads, tokens, head_dim]."""
        super().lazy_initialization(key_states, value_states)
        self.places = [
            states.new_empty((*states.shape[:-2], self.room, states.shape[-1]))
            for states in (key_states, value_states)
        ]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of new tokens; all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        length = before + key_states.shape[-2]
        for place, states in zip(self.places, (key_states, value_states), strict=True):
            place[..., before:length, :] = states
        self.keys, self.values = (place[..., :length, :] for place in self.places)
        return self.keys, self.values


def cache_with_room(model: Any, room: int) -> dict[str, DynamicCache]:
    """The argument of `generate` for a cache of so many tokens.

    There is none if some layer keeps anything but the keys and values of all tokens, such as those
    of a window or a state: `generate` then makes the cache that the model needs.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return {}
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return {}
    cache.layers = [RoomyLayer(room) for _ in cache.layers]
    return {"past_key_values": cache}


@contextmanager
def generation_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Stand in for the model's own settings, which fill in whatever a call leaves unset."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def device_name(kind: str) -> str:
    """The name of the accelerator, or `cpu`."""
    return torch.cuda.get_device_name() if kind == "cuda" else kind
