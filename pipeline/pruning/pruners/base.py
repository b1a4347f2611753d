"""What every pruner is: a function of one matrix, and what the walk must know of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from pipeline.pruning.allocation import LayerTarget


@dataclass(frozen=True)
class Pruned:
    """What a pruner makes of one matrix."""

    mask: Tensor
    """`[out_features, in_features]`, True where the weight is set to zero."""

    weight: Tensor | None = None
    """Updated weights, the masked ones already zero; None keeps the old ones."""

    permutation: Tensor | None = None
    """`[in_features]` in int64, where a pattern holds in another order of the columns: it holds
    in `mask[:, permutation]`. None is the columns' own order."""

    facts: dict[str, float] = field(default_factory=dict)
    """Numbers to record, such as damping that had to be raised."""


class PruneMatrix(Protocol):
    """Prune a float32 weight `[out_features, in_features]`, which must not be written to."""

    def __call__(
        self, weight: Tensor, statistics: Mapping[str, Tensor], target: LayerTarget, options: Any
    ) -> Pruned: ...


def _same_for_all(options: Any, paths: Mapping[str, str]) -> dict[str, Any]:
    return dict.fromkeys(paths, options)


@dataclass(frozen=True)
class MatrixPruner:
    """A pruner as the walk runs it."""

    prune: PruneMatrix

    statistics: tuple[str, ...]
    """Names from `pipeline.pruning.input_statistics.STATISTICS`; empty if it takes no data."""

    counted_per: Literal["matrix", "row"] | None
    """Without a pattern: where floor(sparsity * n) of n weights are zeroed; None if the pruner
    meets the sparsity only approximately."""

    options_by_matrix: Callable[[Any, Mapping[str, str]], dict[str, Any]] = _same_for_all
    """From the pruner's options, and by matrix name the path inside its decoder layer, to the
    options of each matrix. Raises InputError if the options do not suit the model."""
