"""The result of a baseline method for one linear layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PlainChoice:
    """The weights to zero, their scores, and the other weights if the method updates them."""

    mask: Tensor
    """`[out_features, in_features]`, True for weights to set to zero."""

    scores: Tensor
    """Of the same shape, at the time when the weights competed; the smallest are zeroed."""

    weight: Tensor | None = None
    """All weights after the update, of the same shape; None keeps the old ones."""
