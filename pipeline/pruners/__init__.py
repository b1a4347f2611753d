"""The pruners: each a pure function of one matrix and its statistics, in a file of its own.

A new pruner is a spec in `pipeline/specs.py`, a file here, and an entry in `PRUNERS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from pipeline.pruners.magnitude import prune_by_magnitude
from pipeline.pruners.pruned import Pruned
from pipeline.pruners.sparsegpt import prune_by_sparsegpt
from pipeline.pruners.wanda import prune_by_wanda


class PruneMatrix(Protocol):
    """Prunes a float32 weight `[out_features, in_features]`, which it leaves as it is."""

    def __call__(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        sparsity: float,
        pattern: tuple[int, int] | None,
        options: Any,
    ) -> Pruned: ...


@dataclass(frozen=True)
class PrunerEntry:
    """A pruner and what the walk must know of it."""

    prune: PruneMatrix

    statistics: tuple[str, ...]
    """Names from `pipeline.statistics.STATISTICS`; none if it takes no data."""

    counted_per: Literal["matrix", "row"]
    """Where exactly floor(sparsity * n) of n weights are zeroed when there is no pattern."""


PRUNERS: dict[str, PrunerEntry] = {
    "magnitude": PrunerEntry(prune_by_magnitude, (), "matrix"),
    "wanda": PrunerEntry(prune_by_wanda, ("squared_norms",), "row"),
    "sparsegpt": PrunerEntry(prune_by_sparsegpt, ("hessian",), "matrix"),
}
"""By the name of the pruner's spec."""
