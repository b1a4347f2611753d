"""Statistics of a linear layer's input, asked for by name and summed batch by batch."""

from typing import Protocol

import torch
from torch import Tensor


class Statistic(Protocol):
    """A running sum over inputs."""

    def update(self, inputs: Tensor) -> None:
        """Add the tokens `[tokens, in_features]` of a batch, in float32."""

    def result(self) -> Tensor:
        """The statistic so far."""


class SquaredNorms:
    """The sum of X_tj^2 over tokens t, `[in_features]`."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, device=device)

    def update(self, inputs: Tensor) -> None:
        """Add a batch `[tokens, in_features]`."""
        self.total += inputs.square().sum(dim=0)

    def result(self) -> Tensor:
        """`[in_features]`."""
        return self.total


class Hessian:
    """X^T X over all tokens, `[in_features, in_features]`: half the Hessian of the squared error
    of a layer's output."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, device=device)

    def update(self, inputs: Tensor) -> None:
        """Add a batch `[tokens, in_features]`."""
        self.total.addmm_(inputs.T, inputs)

    def result(self) -> Tensor:
        """`[in_features, in_features]`."""
        return self.total


STATISTICS: dict[str, type[SquaredNorms] | type[Hessian]] = {
    "squared_norms": SquaredNorms,
    "hessian": Hessian,
}
