"""Check whether two implementations of a method zero the same weights.

They sum in different orders, so scores differ in their last bits, and either of two weights with
scores equal at that resolution may be zeroed. For a weight that differs, the measure is how close
its decision was. After each decoder layer the plain walk takes over the weights that `pipeline`
left there. Both then see the same inputs everywhere, and one tie does not cause others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baseline import METHODS, walk
from benchmarks.baseline.choice import PlainChoice
from benchmarks.baseline.dsnot import Moments
from benchmarks.baseline.masks import zero_count
from benchmarks.baseline.sparsegpt import BLOCK
from benchmarks.replay import replay


@dataclass(frozen=True)
class Agreement:
    """How the masks of two pruned models compare."""

    weights: int
    differing: int
    """Weights that only one of the two zeroes."""
    largest_gap: float
    """The largest relative difference between the values that decided a differing weight; 0 if
    none differs."""


@torch.no_grad()
def compare_masks(
    name: str,
    dense: nn.Module,
    pruned: nn.Module,
    windows: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> Agreement:
    """Prune a dense Llama plainly, and compare its masks with those of `pipeline`.

    Args:
        dense: overwritten.
        pruned: the same model, pruned by `pipeline`.
        windows: the calibration set of both, `[nsamples, seqlen]`.
    """
    method = METHODS[name]
    weights, differing, gaps = 0, 0, [0.0]
    states, keywords = walk.first_states(dense, windows)
    for layer, other_layer in zip(_layers(dense), _layers(pruned), strict=True):
        linears, others = walk.linears(layer), walk.linears(other_layer)
        statistics: dict[str, Any] = dict.fromkeys(linears)
        if method.statistics is not None:
            statistics = walk.gather_statistics(layer, states, keywords, method)
        before = {key: linear.weight.clone() for key, linear in linears.items()}
        choices = walk.prune_layer(layer, statistics, method, sparsity, pattern)
        for key, choice in choices.items():
            differs = choice.mask != (others[key].weight == 0)
            weights += differs.numel()
            differing += int(differs.sum())
            if not differs.any():
                continue
            if name == "dsnot" and key.startswith("self_attn"):
                rows = differs.any(dim=1).nonzero().flatten()
                found = _closest(choice, before[key], statistics[key], rows, sparsity, pattern)
            else:
                found = _distances(name, choice, pattern)[differs].tolist()
            gaps += found
        layer.load_state_dict(other_layer.state_dict())
        states = walk.forward(layer, states, keywords)
    return Agreement(weights, differing, max(gaps))


def _layers(model: Any) -> Any:
    return model.model.layers


def _distances(name: str, choice: PlainChoice, pattern: tuple[int, int] | None) -> Tensor:
    """Return each weight's relative distance from the largest zeroed score among the scores that it
    competes with, `[out_features, in_features]`."""
    rows, columns = choice.scores.shape
    if pattern is not None:
        height, width = 1, pattern[1]
    else:
        height, width = {
            "magnitude": (rows, columns),
            "wanda": (1, columns),
            "dsnot": (1, columns),
            "sparsegpt": (rows, BLOCK),
        }[name]
    distances = torch.empty_like(choice.scores)
    for start in range(0, columns, width):
        part = slice(start, start + width)
        scores = choice.scores[:, part]
        zeroed = scores.masked_fill(~choice.mask[:, part], -torch.inf)
        bound = zeroed.max() if height > 1 else zeroed.amax(dim=1, keepdim=True)
        distances[:, part] = (scores - bound).abs() / bound
    return distances


def _closest(
    choice: PlainChoice,
    weight: Tensor,
    moments: Moments,
    rows: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> list[float]:
    contribution = weight.double() * moments.sums.double()
    variance = moments.variance.tolist()
    zeros = zero_count(sparsity, weight.shape[1])
    return [
        replay(
            choice.scores[row].tolist(), contribution[row].tolist(), variance, zeros, pattern
        ).closest
        for row in rows.tolist()
    ]
