"""A text's mean hidden states: what a model makes of it, in a few hundred numbers.

The means are taken while the model reads the text anyway, at a few decoder layers, over the tokens
that are scored, in float32. Each layer's mean is projected to `WIDTH` numbers by a fixed random
matrix. That keeps squared distances within about 12 %, sqrt(2 / WIDTH) (Johnson and Lindenstrauss
1984), and a text takes as little for a large model as for a small one.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.models.matrices import decoder_layers

PARTS = 3
"""States are taken after each third of the decoder layers."""

WIDTH = 128
"""Numbers that a layer's mean is projected to."""

PROJECTION_SEED = 0

MeanStates = npt.NDArray[np.float64]
"""Mean hidden states, [texts, layers * WIDTH]."""


@contextlib.contextmanager
def mean_states(
    model: Any, spans: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[list[list[Tensor]]]:
    """Take the mean hidden states of texts, which the model reads batch by batch within the block.

    Each layer gets the batches in order, whether one batch goes through all layers first or all
    batches through one layer.

    Args:
        spans: by batch, of each text the first token that counts and the one after the last.

    Yields:
        For each batch a list that gets [texts, WIDTH] float32 from each layer, in order.

    Raises:
        InputError: if the model has no list of decoder layers.
    """
    found: list[list[Tensor]] = [[] for _ in spans]

    def watch(layer: nn.Module) -> Any:
        batches = itertools.count()

        def take(module: object, inputs: object, output: Any) -> None:
            if any(each.is_meta for each in layer.parameters()):
                return  # it is in files, and passed over
            batch = next(batches)
            states = output[0] if isinstance(output, tuple | list) else output
            means = [
                states[row, first:end].float().mean(dim=0)
                for row, (first, end) in enumerate(spans[batch])
            ]
            found[batch].append(torch.stack(means).cpu() @ projection(states.shape[-1]))

        return layer.register_forward_hook(take)

    _, layers = decoder_layers(model)
    handles = [watch(layers[place]) for place in chosen_layers(len(layers))]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def chosen_layers(count: int) -> list[int]:
    """Return the last layer of each third."""
    return sorted({math.ceil(count * part / PARTS) - 1 for part in range(1, PARTS + 1)})


@functools.cache
def projection(hidden_size: int) -> Tensor:
    """Return the matrix that projects states, [hidden_size, WIDTH] float32."""
    draws = np.random.default_rng(PROJECTION_SEED)
    matrix = draws.standard_normal((hidden_size, WIDTH)) / math.sqrt(WIDTH)
    return torch.from_numpy(matrix).float()


def standardised(states: MeanStates, reference: MeanStates | None = None) -> MeanStates:
    """Shift and scale each layer's states, so that every layer counts the same in distances.

    Later layers have larger states, and would decide alone. Afterwards the reference has the mean
    0, and 1 is its mean squared distance from it.

    Args:
        reference: the texts whose mean and spread are taken; by default the texts themselves.
    """
    base = states if reference is None else reference
    centre = base.mean(axis=0)
    spread = ((base - centre) ** 2).reshape(len(base), -1, WIDTH).sum(axis=2).mean(axis=0)
    scale = np.sqrt(spread * len(spread))
    widths = np.repeat(np.where(scale > 0, scale, 1.0), WIDTH)
    found: MeanStates = (states - centre) / widths
    return found
