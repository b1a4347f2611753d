"""Position embeddings that depend on the length of the text.

With LongRoPE (arXiv 2402.13753) a text longer than the length of pretraining has other rotary
frequencies from its first token on; with dynamic NTK scaling every length beyond the model's own
has its own. transformers takes the length of a whole batch, padding included, and remembers the
longest text. Sparse attention reads the `index_topk` tokens with the highest scores, and its choice
among equal ones depends on the number of tokens in the batch. So texts of different groups share
neither batch nor beginning.
"""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

LONG = ("longrope", "su")
"""Rope types with two sets of frequencies. Older checkpoints call LongRoPE `su`."""


class LengthDependence(NamedTuple):
    """Lengths of text at which a model's positions change; by default none."""

    switches: tuple[int, ...] = ()
    """For each rope, tokens of the longest text with the first set of frequencies."""

    grows_beyond: int | None = None
    """Tokens of the longest text that is read like shorter ones; beyond, every length differs."""

    def group(self, length: int) -> Hashable:
        """Return a value that is equal for lengths, in tokens, that are read alike."""
        grown = self.grows_beyond is not None and length > self.grows_beyond
        return (*(length > switch for switch in self.switches), length if grown else 0)


NONE = LengthDependence()
"""Most models."""


def length_dependence(config: Any) -> LengthDependence:
    """Return how a model's positions, and its choice of tokens, depend on the length of the text.

    Only scaling that `rope_parameters` or `rope_scaling` names is known, not what a model's own
    code does.
    """
    config = config.get_text_config()
    longest: Any = getattr(config, "max_position_embeddings", None)
    switches: set[int] = set()
    beyond = [chosen] if isinstance(chosen := getattr(config, "index_topk", None), int) else []
    for rope in _ropes(config):
        kind = rope.get("rope_type", rope.get("type"))
        if kind in LONG:
            own = getattr(config, "original_max_position_embeddings", longest)
            switches.add(int(rope.get("original_max_position_embeddings") or own))
        if "dynamic" in str(kind):
            beyond.append(longest)
    return LengthDependence(tuple(sorted(switches)), min(beyond, default=None))


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the parameters of each rope: one, or one for each type of layer."""
    for field in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, field, None)
        if isinstance(parameters, Mapping):
            yield parameters
            yield from (own for own in parameters.values() if isinstance(own, Mapping))


def forget_longer_texts(model: nn.Module) -> None:
    """Reset dynamic ropes to their frequencies for short texts.

    transformers does so only for a text shorter than the model's length: one between that and the
    longest text so far would keep the longest one's frequencies.
    """
    for module in model.modules():
        longest = getattr(module, "original_max_seq_len", None)
        if longest is None:
            continue
        for name, original in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                prefix = name.removesuffix("original_inv_freq")
                setattr(module, f"{prefix}inv_freq", original)
                setattr(module, f"{prefix}max_seq_len_cached", longest)
