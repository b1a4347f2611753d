"""Memory of a model: whether it is loaded whole, and where hidden states wait if it is not."""

from dataclasses import dataclass

WEIGHTS_SHARE = 0.8
"""The largest share of memory for the weights of models that are loaded whole. The rest is for the
libraries, activations and logits."""

DEVICE_HIDDEN_BYTES = 4 * 2**30
"""Enough for 128 windows of 2,048 tokens of a 70B model in half precision."""

HOST_HIDDEN_BYTES = 16 * 2**30


@dataclass(frozen=True)
class ModelMemory:
    """Memory for models that are read one decoder layer at a time if they do not fit."""

    memory_bytes: int | None = None
    """Memory on a CPU for the models; None is that of the machine. A GPU has its own."""

    device_hidden_bytes: int = DEVICE_HIDDEN_BYTES
    """Bytes of hidden states to hold on the device of a model that does not fit."""

    host_hidden_bytes: int = HOST_HIDDEN_BYTES
    """Bytes beyond that to hold in host memory; the rest goes to files in the system's temporary
    folder."""


DEFAULT_MODEL_MEMORY = ModelMemory()


def fits(weight_bytes: float, memory_bytes: float) -> bool:
    """Return whether models with so many bytes of weights are loaded whole."""
    return weight_bytes <= WEIGHTS_SHARE * memory_bytes
