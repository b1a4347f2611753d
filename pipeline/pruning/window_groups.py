"""Calibration windows on their way up through a decoder, layer by layer."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.models.hidden_states import TensorStore
from pipeline.models.layer_calls import CapturedBatch, capture_batches
from pipeline.models.matrices import Matrix
from pipeline.models.memory import (
    ACCELERATOR_BATCH_TOKENS,
    BATCH_TOKENS,
    DEVICE_HIDDEN_BYTES,
    HOST_HIDDEN_BYTES,
)
from pipeline.pruning.crew import Crew
from pipeline.pruning.gradients import GRADIENT_SQUARES, add_gradient_squares
from pipeline.pruning.groups import Share, Sums, merge
from pipeline.pruning.input_statistics import STATISTICS
from pipeline.pruning.observed_inputs import InputObserver


@dataclass(frozen=True)
class Memory:
    """Where a walk runs, and how much it holds there at a time."""

    device: torch.device | None = None
    """Where layers are run and visited; None is where the model is. A layer that is elsewhere is
    moved there for its turn, and back; one that is still in the checkpoint's files is read for its
    turn, and let go with what was done to it."""

    device_hidden_bytes: int = DEVICE_HIDDEN_BYTES
    """Bytes of hidden states to hold on that device. No result depends on it."""

    host_hidden_bytes: int = HOST_HIDDEN_BYTES
    """Bytes beyond that to hold in host memory; the rest goes to files in the system's temporary
    folder. No result depends on it."""

    batch_size: int | None = None
    """Windows of a forward pass; None takes as many as have `BATCH_TOKENS` tokens, or
    `ACCELERATOR_BATCH_TOKENS` where the device is no CPU, but at least one."""

    crew: Crew | None = None
    """The processes that share the walk; None walks alone, with all windows in one group."""


DEFAULT_MEMORY = Memory()


class WindowGroups:
    """The windows that one process takes through a model, layer by layer.

    Use it as a context: hidden states are stored for as long.

    Args:
        model: a causal language model, in evaluation mode.
        layers: its decoder layers.
        windows: the whole calibration set, token ids `[nsamples, seqlen]`.
        statistics: names from `pipeline.pruning.input_statistics.STATISTICS`, and
            `pipeline.pruning.gradients.GRADIENT_SQUARES`, for which a batch has one window.
        share: which groups are this process's.

    Raises:
        InputError: as `pipeline.models.layer_calls.capture_batches` does.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        windows: Tensor,
        statistics: Sequence[str],
        memory: Memory,
        share: Share,
    ) -> None:
        self._statistics = [name for name in statistics if name in STATISTICS]
        self._takes_gradients = GRADIENT_SQUARES in statistics
        self._nsamples = len(windows)
        self._share = share
        home = next(each.device for each in model.parameters() if not each.is_meta)
        device = memory.device or home
        tokens = BATCH_TOKENS if device.type == "cpu" else ACCELERATOR_BATCH_TOKENS
        size = memory.batch_size or max(1, tokens // windows.shape[1])
        if self._takes_gradients:
            size = 1
        windows = windows.to(home)
        split = [
            [{"input_ids": part} for part in torch.split(share.windows(windows, group), size)]
            for group in share.own
        ]
        with ExitStack() as entered:
            budgets = (memory.device_hidden_bytes, memory.host_hidden_bytes)
            store = entered.enter_context(TensorStore(device, *budgets))
            entered.enter_context(eager_experts(model))
            inputs = [batch for group in split for batch in group]
            captured = iter(capture_batches(model, layers, inputs, store))
            self._groups = [[next(captured) for _ in group] for group in split]
            self._exit = entered.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def observe(
        self,
        number: int,
        layer: nn.Module,
        found: Sequence[Matrix],
        done: Callable[[float], None] = lambda share: None,
    ) -> Sums:
        """Run a decoder layer on the hidden states below it, and sum the inputs of its matrices.

        Args:
            found: the layer's matrices.
            done: is given the share of the batches that is done.
        """
        observer = InputObserver(found, self._statistics, self._nsamples)
        sums: Sums = {}
        position = 0
        for group, batches in zip(self._share.own, self._groups, strict=True):
            for batch in batches:
                observer.observe(functools.partial(batch.forward, number, layer))
                position += 1
                done(position / self._batches)
            sums[group, group + 1] = observer.take()
            merge(sums, 0, self._share.groups)
        return sums

    def add_gradients(self, number: int, layer: nn.Module, found: Sequence[Matrix]) -> None:
        """Add the squared gradients to the statistics of a layer's matrices, if they are wanted."""
        if self._takes_gradients:
            batches = [batch for group in self._groups for batch in group]
            add_gradient_squares(batches, number, layer, found)

    def advance(
        self, number: int, layer: nn.Module, done: Callable[[float], None] = lambda share: None
    ) -> None:
        """Replace the hidden states by the decoder layer's output; `done` as in `observe`."""
        batches: list[CapturedBatch] = [batch for group in self._groups for batch in group]
        for position, batch in enumerate(batches, start=1):
            batch.advance(number, layer)
            done(position / len(batches))

    @property
    def _batches(self) -> int:
        return sum(map(len, self._groups))


@contextlib.contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """Run experts one after another, each on its own slice, so that their inputs can be seen."""
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
