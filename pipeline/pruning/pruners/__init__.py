"""The pruners: each a pure function of one matrix and its statistics, in a file of its own.

A new pruner is a spec in `pipeline/specs/pruners.py`, a file here, and an entry in `PRUNERS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.pruners.alps import prune_by_alps
from pipeline.pruning.pruners.dsnot import options_by_matrix, prune_by_dsnot, statistics_of_dsnot
from pipeline.pruning.pruners.magnitude import prune_by_magnitude
from pipeline.pruning.pruners.pruned import Pruned
from pipeline.pruning.pruners.ria import prune_by_ria
from pipeline.pruning.pruners.sparsegpt import prune_by_sparsegpt
from pipeline.pruning.pruners.wanda import prune_by_wanda


class PruneMatrix(Protocol):
    """Prunes a float32 weight `[out_features, in_features]`, which it leaves as it is."""

    def __call__(
        self,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
        target: LayerTarget,
        options: Any,
    ) -> Pruned: ...


def _same_for_all(options: Any, paths: Mapping[str, str]) -> dict[str, Any]:
    return dict.fromkeys(paths, options)


@dataclass(frozen=True)
class PrunerEntry:
    """A pruner with its options, and what the walk must know of it."""

    prune: PruneMatrix

    statistics: tuple[str, ...]
    """Names from `pipeline.pruning.input_statistics.STATISTICS`; none if it takes no data."""

    counted_per: Literal["matrix", "row"] | None
    """Where exactly floor(sparsity * n) of n weights are zeroed when there is no pattern; None if
    the sparsity is met more or less."""

    options_by_matrix: Callable[[Any, Mapping[str, str]], dict[str, Any]] = _same_for_all
    """From the options and the path of each matrix inside its decoder layer, by the matrix's name,
    to the options of each; raises InputError if they do not suit the model."""


PRUNERS: dict[str, Callable[[Any], PrunerEntry]] = {
    "magnitude": lambda options: PrunerEntry(prune_by_magnitude, (), "matrix"),
    "wanda": lambda options: PrunerEntry(
        prune_by_wanda, ("squared_norms",), None if options.variant else "row"
    ),
    "sparsegpt": lambda options: PrunerEntry(prune_by_sparsegpt, ("hessian",), "matrix"),
    "dsnot": lambda options: PrunerEntry(
        prune_by_dsnot, statistics_of_dsnot(options), "row", options_by_matrix
    ),
    "ria": lambda options: PrunerEntry(prune_by_ria, ("squared_norms",), "matrix"),
    "alps": lambda options: PrunerEntry(prune_by_alps, ("hessian",), "matrix"),
}
"""By the name of the pruner's spec, from its options."""
