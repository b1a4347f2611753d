"""Forward passes of a model with its decoder layers in files, each read once for many texts.

All of these go through one decoder layer before the next one; their hidden states wait meanwhile.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from pipeline.models.heap import each_block_returned
from pipeline.models.hidden_states import TensorStore
from pipeline.models.layer_calls import capture_batches
from pipeline.models.matrices import decoder_layers
from pipeline.models.memory import ModelMemory
from pipeline.models.positions import forget_longer_texts, length_dependence
from pipeline.models.streaming import each_resident
from pipeline.progress import report


@torch.no_grad()
def layerwise_outputs(
    model: Any, batches: Sequence[Mapping[str, Tensor]], memory: ModelMemory
) -> Iterator[Any]:
    """Yield what a model returns for each batch, to float32 rounding.

    Batches pass together as far as memory has room for their hidden states, then the next ones. To
    read the layers again costs less than to write the states to files and read them at every layer,
    and who keeps what is yielded loses no more than one such part. A batch that is larger than that
    memory passes alone, with its states in files.

    The layers are run before the first batch of a part is yielded. What the model does before its
    layers is done twice for each batch.

    Args:
        model: a causal language model, or its part below the output layer, in evaluation mode,
            with its decoder layers in files.
        batches: inputs of the model, on the device of its embeddings; the texts of a batch are of
            one group of `LengthDependence`.

    Raises:
        InputError: as `pipeline.models.layer_calls.capture_batches` does.
        OSError: if a layer cannot be read, or the disk is full of hidden states.
    """
    token = model.config.get_text_config().hidden_size * model.dtype.itemsize
    sizes = [batch["input_ids"].numel() * token for batch in batches]
    parts = list(_parts(sizes, memory.device_hidden_bytes + memory.host_hidden_bytes))
    with each_block_returned():  # memory is short, or the model would be in it
        for number, part in enumerate(parts):
            yield from _part_outputs(model, batches[part], memory, (number, len(parts)))


def _parts(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Yield runs of batches, each of one batch or with states of at most `limit` bytes."""
    first = total = 0
    for number, size in enumerate(sizes):
        if number > first and total + size > limit:
            yield slice(first, number)
            first, total = number, 0
        total += size
    if sizes:
        yield slice(first, len(sizes))


def _part_outputs(
    model: Any, batches: Sequence[Mapping[str, Tensor]], memory: ModelMemory, part: tuple[int, int]
) -> Iterator[Any]:
    """Run all layers on some batches, then yield what the model returns for each.

    Args:
        part: number of this part, and of all, for progress.
    """
    _, layers = decoder_layers(model)
    device = next(each.device for each in model.parameters() if not each.is_meta)
    waiting = (device, memory.device_hidden_bytes, memory.host_hidden_bytes)
    done, total = part[0] * len(layers), part[1] * len(layers)
    with TensorStore(*waiting) as store, ExitStack() as hooks:
        if length_dependence(model.config).grows_beyond is not None:
            for module in (model, *layers):  # each may hold rotary tables
                hook = module.register_forward_pre_hook(lambda own, _: forget_longer_texts(own))
                hooks.callback(hook.remove)
        captured = capture_batches(model, layers, batches, store)
        for number, layer in enumerate(each_resident(layers)):
            for place, batch in enumerate(captured, start=1):
                batch.advance(number, layer)
                report(done + number + place / len(captured), total, "layers")
        for inputs, batch in zip(batches, captured, strict=True):
            with batch.passed_layers(layers):
                output = model(**inputs, use_cache=False)
            yield output
