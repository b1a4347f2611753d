"""Memory of a model: whether it is loaded whole, where hidden states wait if it is not, and how
much passes through it at a time."""

from dataclasses import dataclass

WEIGHTS_SHARE = 0.8
"""The largest share of memory for the weights of models that are loaded whole. The rest is for the
libraries, activations and logits."""

DEVICE_HIDDEN_BYTES = 4 * 2**30
"""Enough for 128 windows of 2,048 tokens of a 70B model in half precision."""

HOST_HIDDEN_BYTES = 16 * 2**30

BATCH_TOKENS = 2_048
"""Tokens of a batch on a CPU of a pruning, unless its size is given, and at most of any other stage
that reads its model by layer: their activations stay in its cache, and those of more take more
memory than the layers. Fixed, since sums depend on how they are split."""

ACCELERATOR_BATCH_TOKENS = 16_384
"""Those of a pruning on any other device, which needs more tokens to be busy."""

LAYER_LOGITS = 2**23
"""Logits per call of the output layer on a CPU: with a quarter a call takes 1.3 times as long."""

PART_LOGITS = 2**19
"""Logits per part on a CPU: 2 MiB in float32, which stay in its cache. In parts of `LAYER_LOGITS`
scores took 1.14 times the CPU time in float32 and 1.6 times in bfloat16, losses 1.0 and 1.13 times
(hidden size 576, 49,152 entries, one thread with AVX-512)."""

ACCELERATOR_LOGITS = 2**25
"""Logits per call and per part on a GPU, which fewer do not keep busy."""


@dataclass(frozen=True)
class ModelMemory:
    """Memory for models that are read one decoder layer at a time if they do not fit."""

    memory_bytes: int | None = None
    """Memory on a CPU for the models; None is that of the machine. A GPU has its own."""

    device_hidden_bytes: int = DEVICE_HIDDEN_BYTES
    """Bytes of hidden states to hold on the device of a model that does not fit."""

    host_hidden_bytes: int = HOST_HIDDEN_BYTES
    """Bytes beyond that to hold in host memory; texts that need more pass later."""


DEFAULT_MODEL_MEMORY = ModelMemory()


def fits(weight_bytes: float, memory_bytes: float) -> bool:
    """Return whether models with so many bytes of weights are loaded whole."""
    return weight_bytes <= WEIGHTS_SHARE * memory_bytes
