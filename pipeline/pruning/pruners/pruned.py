"""What a pruner leaves of one matrix."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Pruned:
    """A mask, new weights where the pruner updates them, and what is worth recording."""

    mask: Tensor
    """`[out_features, in_features]`, True where the weight is set to zero."""

    weight: Tensor | None = None
    """Updated weights, the masked ones already zero; None keeps the old ones."""

    permutation: Tensor | None = None
    """`[in_features]` in int64, where a pattern holds in another order of the columns: it holds
    in `mask[:, permutation]`. None is the order that they have."""

    facts: dict[str, float] = field(default_factory=dict)
    """Numbers for the result row, such as damping that had to be raised."""
