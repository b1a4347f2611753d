"""Statistics of a linear layer's input, asked for by name and summed batch by batch."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor


class RunningSum(ABC):
    """A float32 sum over tokens; sums over parts of the tokens merge by addition."""

    total: Tensor
    """The sum so far."""

    @abstractmethod
    def __init__(self, in_features: int, device: torch.device) -> None: ...

    @abstractmethod
    def update(self, inputs: Tensor) -> None:
        """Add the tokens of a batch, `[tokens, in_features]` in float32."""

    def merge(self, other: Self) -> None:
        """Add the tokens that another sum has seen."""
        self.total += other.total.to(self.total.device)


class SquaredNorms(RunningSum):
    """The sum of X_tj^2 over tokens t, `[in_features]`."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, device=device)

    def update(self, inputs: Tensor) -> None:
        """Add a batch `[tokens, in_features]`."""
        self.total += inputs.square().sum(dim=0)


class Hessian(RunningSum):
    """X^T X over all tokens, `[in_features, in_features]`: half the Hessian of the squared error
    of a layer's output."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, device=device)

    def update(self, inputs: Tensor) -> None:
        """Add a batch `[tokens, in_features]`."""
        self.total.addmm_(inputs.T, inputs)


STATISTICS: dict[str, type[RunningSum]] = {
    "squared_norms": SquaredNorms,
    "hessian": Hessian,
}
