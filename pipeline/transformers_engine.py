"""Generation by transformers: a shard is one left-padded batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from transformers import GenerationConfig

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
        with generation_settings(self.model, settings):
            generated = self.model.generate(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                logits_processor=logits_processors(
                    sampling, padding.to(device), uniforms.to(device), longest, ends, seqlen
                ),
                streamer=TokenStream(total=len(prefixes) * settings.max_new_tokens),
            )
        return [row[longest:] for row in generated.tolist()]


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
