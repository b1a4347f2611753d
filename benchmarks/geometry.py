"""Shapes of Llamas with random weights, and of random calibration windows."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Geometry:
    """A Llama and its calibration set."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    nsamples: int
    """Calibration windows."""
    seqlen: int
    """Tokens of a window."""

    @classmethod
    def of(cls, config: Any, nsamples: int, seqlen: int) -> "Geometry":
        """Return the shape of a Llama with this transformers config, and of its windows."""
        return cls(
            config.name_or_path,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            key_value_heads=config.num_key_value_heads,
            vocabulary=config.vocab_size,
            nsamples=nsamples,
            seqlen=seqlen,
        )

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.nsamples * self.seqlen

    @property
    def matrices(self) -> list[list[tuple[int, int]]]:
        """`(out_features, in_features)` of a decoder layer's linear layers in the order of the
        forward pass. Those that read the same input form a group."""
        width = self.hidden // self.heads * self.key_value_heads
        return [
            [(self.hidden, self.hidden), (width, self.hidden), (width, self.hidden)],
            [(self.hidden, self.hidden)],
            [(self.intermediate, self.hidden), (self.intermediate, self.hidden)],
            [(self.hidden, self.intermediate)],
        ]

    def model(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Return a new model without BOS and EOS, with the same weights on every call."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=self.seqlen,
            initializer_range=self.hidden**-0.5,
            dtype=dtype,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.device(device):
            return LlamaForCausalLM._from_config(config).eval()

    def windows(self) -> Tensor:
        """Return token ids `[nsamples, seqlen]`, the same on every call."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocabulary, (self.nsamples, self.seqlen), generator=generator)


TESTBED = Geometry("testbed", 128, 384, 4, 4, 2, 1024, nsamples=64, seqlen=128)
"""The testbed's `small` model and its usual calibration set."""

MIDDLE = Geometry("middle", 1024, 2816, 2, 16, 16, 1024, nsamples=2, seqlen=2048)
"""Matrices so large that products dominate, and few enough for two cores."""

GROWING = replace(TESTBED, layers=2, nsamples=32)
"""The smallest size at which growth with layers and windows is measured."""

LLAMA_2_7B = Geometry("llama-2-7b", 4096, 11008, 32, 32, 32, 32000, nsamples=128, seqlen=2048)
"""The shape of LLaMA-2-7B and the calibration set of the literature."""
