"""A helper's part in a walk that several processes share (`pipeline/pruning/crew.py`)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from pipeline.models.matrices import Matrix, decoder_layers, matrices
from pipeline.models.streaming import read_ahead, resident
from pipeline.pruning.changes import Change, apply_change, change_of
from pipeline.pruning.groups import Share, Sums, merge, parts_of, total
from pipeline.pruning.pruners.base import Pruned
from pipeline.pruning.window_groups import DEFAULT_MEMORY, Memory, WindowGroups

Work = Callable[[int, Matrix], Pruned]
"""Prunes a matrix of the decoder layer with that number, in place."""

Record = tuple[dict[str, float], Tensor | None]
"""A pruner's facts and permutation, as in `pipeline.pruning.pruners.base.Pruned`."""


class Helper:
    """Another process's part in a walk."""

    def __init__(
        self,
        model: nn.Module,
        windows: Tensor,
        statistics: Sequence[str],
        share: Share,
        work: Work | None = None,
        masks: bool = False,
        memory: Memory = DEFAULT_MEMORY,
    ) -> None:
        """
        Args:
            model: the same model as the leader's.
            windows: the whole calibration set, token ids `[nsamples, seqlen]`.
            statistics: as of the walk.
            share: its own number, and that of all processes.
            work: None only observes inputs.
            masks: as of the `Crew`.
        """
        self._root, self._layers = decoder_layers(model)
        self._share, self._work, self._masks = share, work, masks
        self._windows = WindowGroups(model, self._layers, windows, statistics, memory, share)
        self._inside = ExitStack()
        self._number: int | None = None
        self._found: list[Matrix] = []

    @torch.no_grad()
    def observe(self, number: int, owners: Sequence[Sequence[str]]) -> tuple[Sums, ...]:
        """Return sums of a decoder layer's inputs, for each process those of its matrices."""
        self._enter(number)
        sums = self._windows.observe(number, self._layers[number], self._found)
        return tuple(parts_of(sums, names) for names in owners)

    def add(self, one: Sums, other: Sums) -> Sums:
        """Return sums over the groups of both."""
        both = one | other
        merge(both, 0, self._share.groups)
        return both

    @torch.no_grad()
    def prune(
        self, number: int, names: Sequence[str], *sums: Sums
    ) -> tuple[dict[str, Change], dict[str, Record]]:
        """Prune matrices of a decoder layer that was observed.

        Args:
            sums: over all groups, of these matrices' inputs.

        Returns:
            By name of the matrix its change, and its record.
        """
        assert self._work is not None, "this helper only observes inputs"
        whole = total(sums, self._share.groups)
        own = [matrix for matrix in self._found if matrix.name in names]
        whole.hand_over(own)
        changes: dict[str, Change] = {}
        records: dict[str, Record] = {}
        for matrix in own:
            pruned = self._work(number, matrix)
            changes[matrix.name] = change_of(matrix.weight, pruned.mask, self._masks)
            order = pruned.permutation
            records[matrix.name] = (pruned.facts, None if order is None else order.cpu())
            matrix.statistics = {}
        return changes, records

    @torch.no_grad()
    def advance(self, number: int, *changes: Mapping[str, Change]) -> None:
        """Replace the hidden states by the decoder layer's output.

        Args:
            changes: what other processes made of the layer's matrices.
        """
        self._enter(number)
        weights = {matrix.name: matrix.weight for matrix in self._found}
        for each in changes:
            for name, change in each.items():
                apply_change(weights[name], change, self._masks)
        self._windows.advance(number, self._layers[number])
        self._leave()

    def _enter(self, number: int) -> None:
        """Hold the layer until `_leave`."""
        if self._number != number:
            self._inside.enter_context(resident(self._layers[number]))
            read_ahead(self._layers, number + 1)
            self._found = matrices(f"{self._root}.{number}", self._layers[number])
            self._number = number

    def _leave(self) -> None:
        self._found, self._number = [], None
        self._inside.close()
