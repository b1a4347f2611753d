"""Statistics of a linear layer's input, gathered batch by batch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

HESSIAN_ROWS = 128
"""Rows of X^T X that are summed at a time on a CPU: few, since the entries to their left are left
out, and enough to keep a product at full speed."""

ACCELERATOR_HESSIAN_ROWS = 1_024
"""The same on any other device."""


class Statistic(ABC):
    """A statistic that parts of the tokens give exactly, once they are merged."""

    @abstractmethod
    def __init__(self, in_features: int, windows: int, device: torch.device) -> None:
        """Start with no tokens.

        Args:
            windows: of the whole calibration set, even if this sees only a part of it.
        """

    @abstractmethod
    def update(self, inputs: Tensor) -> None:
        """Add a batch in float32, `[windows, seqlen, in_features]`; or `[tokens, in_features]` of a
        layer that sees only some tokens of the windows, such as an expert of a mixture."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the tokens that another statistic has seen."""

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """The statistic so far, in float32."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle tensors as arrays in host memory, which pass between processes without a copy."""
        return {
            name: value.cpu().numpy() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore it on the CPU, with memory of its own: what another process sent cannot be
        written to."""
        for name, value in state.items():
            vars(self)[name] = torch.tensor(value) if isinstance(value, np.ndarray) else value


class _Sum(Statistic):
    """A sum over tokens, updated in place."""

    def __init__(self, in_features: int, windows: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, device=device)
        self._windows = windows

    def merge(self, other: Self) -> None:
        self._sum += other._sum.to(self._sum.device)

    @property
    def value(self) -> Tensor:
        return self._sum


class SquaredNorms(_Sum):
    """The sum of X_tj^2 over tokens t, `[in_features]`."""

    def update(self, inputs: Tensor) -> None:
        self._sum += inputs.flatten(0, -2).square().sum(dim=0)


class WindowSums(_Sum):
    """The sum of X_tj over the tokens t of a window, on average over windows, `[in_features]`."""

    def update(self, inputs: Tensor) -> None:
        self._sum += inputs.flatten(0, -2).sum(dim=0) / self._windows


class Hessian(_Sum):
    """X^T X over all tokens, `[in_features, in_features]`: half the Hessian of the squared error
    of a layer's output.

    Only the blocks on the diagonal and to its right are summed, and mirrored in the end.
    """

    def __init__(self, in_features: int, windows: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        step = HESSIAN_ROWS if device.type == "cpu" else ACCELERATOR_HESSIAN_ROWS
        self._strips = [
            (start, min(start + step, in_features)) for start in range(0, in_features, step)
        ]

    def update(self, inputs: Tensor) -> None:
        tokens = inputs.flatten(0, -2)
        for start, end in self._strips:
            self._sum[start:end, start:].addmm_(tokens[:, start:end].T, tokens[:, start:])

    @property
    def value(self) -> Tensor:
        for start, end in self._strips:
            self._sum[end:, start:end] = self._sum[start:end, end:].T
        return self._sum


class Variances(Statistic):
    """The population variance of X_tj over all tokens t, `[in_features]`.

    Batches are merged by the formula of Chan, Golub and LeVeque (1979), in float64: a mean far
    from zero costs no precision.
    """

    def __init__(self, in_features: int, windows: int, device: torch.device) -> None:
        self._tokens = 0
        self._mean = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._mean)  # of deviations from the mean

    def update(self, inputs: Tensor) -> None:
        tokens = inputs.flatten(0, -2)
        if len(tokens):
            self._add(len(tokens), *_moments(tokens))

    def merge(self, other: Self) -> None:
        if other._tokens:
            device = self._mean.device
            self._add(other._tokens, other._mean.to(device), other._squares.to(device))

    def _add(self, tokens: int, mean: Tensor, squares: Tensor) -> None:
        share = tokens / (self._tokens + tokens)
        apart = mean - self._mean
        self._squares += squares + apart.square() * (self._tokens * share)
        self._mean += apart * share
        self._tokens += tokens

    @property
    def value(self) -> Tensor:
        return (self._squares / max(self._tokens, 1)).float()


class PooledVariances(Statistic):
    """The population variance of X_tj within each window, on average over tokens, `[in_features]`:
    differences between the windows' means do not count. A batch `[tokens, in_features]` counts as
    one window. DSnoT's code computes it so."""

    def __init__(self, in_features: int, windows: int, device: torch.device) -> None:
        self._tokens = 0
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(self, inputs: Tensor) -> None:
        if inputs.numel():
            squares = _moments(inputs)[1]  # [windows, in_features] or [in_features]
            self._squares += squares.reshape(-1, inputs.shape[-1]).sum(dim=0)
            self._tokens += inputs.shape[:-1].numel()

    def merge(self, other: Self) -> None:
        self._squares += other._squares.to(self._squares.device)
        self._tokens += other._tokens

    @property
    def value(self) -> Tensor:
        return (self._squares / max(self._tokens, 1)).float()


def _moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, and the sum of squared deviations from it, over the last dimension but one,
    in float64.

    The mean's rounding in float32 is taken out of both (corrected two-pass algorithm).
    """
    rounded = inputs.mean(dim=-2, keepdim=True)
    deviations = inputs - rounded
    rest = deviations.mean(dim=-2).double()
    squares = deviations.square_().sum(dim=-2).double() - inputs.shape[-2] * rest.square()
    return rounded.squeeze(-2).double() + rest, squares.clamp_(min=0.0)


STATISTICS: dict[str, type[Statistic]] = {
    "squared_norms": SquaredNorms,
    "window_sums": WindowSums,
    "hessian": Hessian,
    "variances": Variances,
    "pooled_variances": PooledVariances,
}
