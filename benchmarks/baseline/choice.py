"""What a baseline method leaves of one linear layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """Which weights are zeroed, by which scores, and the rest where the method updates it."""

    mask: Tensor
    """`[out_features, in_features]`, True where the weight is set to zero."""

    scores: Tensor
    """Of the same shape, as they were when the weights competed; the smallest are zeroed."""

    weight: Tensor | None = None
    """Updated weights, the zeroed ones included; None keeps the old ones."""
