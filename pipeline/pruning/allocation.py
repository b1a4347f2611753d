"""Spreading a model's sparsity over its decoder layers, whichever pruner is used.

Plain arithmetic with one number a layer. Layers are weighted by their number of weights, so the
model has the sparsity that was asked for even where its layers differ in size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.errors import InputError
from pipeline.specs import (
    OWL,
    Allocation,
    ArithmeticProgression,
    ByHand,
    FirstLayers,
    Pattern,
    Uniform,
)

MAX_SPARSITY = 1 - 1e-9
"""The largest sparsity of a layer: at 1 nothing of it would be left."""

_ROUNDING = 1e-12
"""A number beyond a bound by no more than this counts as the bound."""

_TOLERANCE = 1e-6
"""Largest difference between the mean of sparsities by hand and the model's sparsity."""


@dataclass(frozen=True)
class LayerTarget:
    """What the matrices of a decoder layer are pruned to.

    Raises:
        InputError: if the sparsity is not in [0, 1), or differs from the pattern's.
    """

    sparsity: float
    """Share of zeros."""

    pattern: Pattern | None = None
    """None zeroes weights wherever the pruner chooses."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:  # NaN is refused too
            remedy = "is no share of zeros: take 0 or more, and below 1"
            raise InputError("sparsity", self.sparsity, remedy)
        if self.pattern is None:
            return
        kept, group = self.pattern
        if not 0 < kept <= group:
            remedy = "must keep at least one of a group, and at most all"
            raise InputError("pattern", str(self.pattern), remedy)
        wanted = self.pattern.sparsity
        if not math.isclose(self.sparsity, wanted, abs_tol=_ROUNDING):
            remedy = f"contradicts pattern {self.pattern}, which is sparsity {wanted:g}; change one"
            raise InputError("sparsity", self.sparsity, remedy)

    @classmethod
    def parse(cls, sparsity: float, pattern: str | None) -> "LayerTarget":
        """Read a target whose pattern is text, such as `2:4`.

        Raises:
            InputError: as the class does.
            ValueError: if the text is not of the form N:M.
        """
        return cls(sparsity, None if pattern is None else Pattern.parse(pattern))


@dataclass(frozen=True)
class ModelTarget:
    """What a model is pruned to."""

    mean: LayerTarget
    """Over its decoder layers."""

    allocation: Allocation = field(default_factory=Uniform)
    """How it is spread over them."""

    outlier_ratios: Sequence[float] | None = None
    """One for each decoder layer, from `pipeline.pruning.outliers`; only OWL needs them."""


@dataclass(frozen=True)
class Allocated:
    """A model's sparsity, spread over its decoder layers."""

    layers: list[LayerTarget]
    """From the first layer to the last."""

    clamped: list[int]
    """Numbers of the layers that were set to a bound because their share lay beyond it."""

    left_out: int = 0
    """Layers at the end that the allocation leaves as they are, `first-layers` alone does."""

    @property
    def pruned_layers(self) -> int:
        """Number of layers up to the last that has anything to prune."""
        return max((n for n, layer in enumerate(self.layers, 1) if layer.sparsity > 0), default=0)


def allocate(
    allocation: Allocation,
    target: LayerTarget,
    sizes: Sequence[int],
    outlier_ratios: Sequence[float] | None = None,
) -> Allocated:
    """Spread a model's sparsity over its decoder layers.

    The mean weighted by `sizes` is the target's sparsity. A layer that would leave [0, 1) is set to
    the bound, and all others are shifted by one amount to make up for it. Only `first-layers` does
    neither: each of the first layers has the target, and the others stay dense.

    With a pattern N:M a layer keeps N_i of M, between 1 and M - 1. Its share of zeros is first
    clamped to [1/M, (M - 1)/M] as above. Then M times the shares are rounded down, and up again for
    the largest remainders until the mean is as near to the target as it gets: equal to it where
    all layers have one size, else off by at most half a step of the largest layer. OWL's own code
    rounds `lambda * (D_i - min D) / (max D - min D) - mean` for each layer alone, with a lambda
    that counts weights of a group, and lets the mean drift and N_i leave 1 to M - 1; here `spread`
    is a share of zeros with and without a pattern.

    Args:
        target: of the model, the mean over its layers.
        sizes: weights in the matrices of each decoder layer.
        outlier_ratios: one for each decoder layer; only OWL needs them.

    Raises:
        InputError: if the allocation does not fit the model or the target.
    """
    if isinstance(allocation, Uniform | FirstLayers):
        share = allocation.share if isinstance(allocation, FirstLayers) else 1.0
        pruned = math.ceil(share * len(sizes) - _ROUNDING)
        dense = [LayerTarget(0.0)] * (len(sizes) - pruned)
        return Allocated([target] * pruned + dense, clamped=[], left_out=len(dense))
    shares = _shares(allocation, target.sparsity, sizes, outlier_ratios)
    if target.pattern is None:
        shares, clamped = _clamped(shares, sizes, 0.0, MAX_SPARSITY)
        return Allocated([LayerTarget(share) for share in shares], clamped)
    kept, group = target.pattern
    if kept == group:
        remedy = f"prunes nothing, so allocation {allocation.name} has nothing to spread"
        raise InputError("pattern", str(target.pattern), f"{remedy}; take uniform")
    shares, clamped = _clamped(shares, sizes, 1 / group, 1 - 1 / group)
    zeros = _rounded(shares, sizes, group)
    layers = [LayerTarget(count / group, Pattern(group - count, group)) for count in zeros]
    return Allocated(layers, clamped)


# --------------------------------------------------------------------------------- shares of layers


def _shares(
    allocation: OWL | ArithmeticProgression | ByHand,
    sparsity: float,
    sizes: Sequence[int],
    outlier_ratios: Sequence[float] | None,
) -> list[float]:
    match allocation:
        case OWL():
            if outlier_ratios is None:
                raise InputError("outlier_ratios", None, "allocation owl needs them")
            return _owl(allocation.spread, sparsity, sizes, outlier_ratios)
        case ArithmeticProgression():
            return _arithmetic_progression(allocation.difference, sparsity, sizes)
        case ByHand():
            return _by_hand(allocation.sparsities, sparsity, sizes)


def _owl(
    spread: float, sparsity: float, sizes: Sequence[int], outlier_ratios: Sequence[float]
) -> list[float]:
    """S_i = S - (r_i - mean r), r_i = 2 lambda (D_i - min D) / (max D - min D): the layer with most
    outliers is 2 lambda denser than the one with fewest."""
    if len(outlier_ratios) != len(sizes):
        remedy = f"the model has {len(sizes)} decoder layers, not {len(outlier_ratios)}"
        raise InputError("outlier_ratios", list(outlier_ratios), remedy)
    if not all(0 <= ratio <= 1 for ratio in outlier_ratios):
        remedy = "are no shares, 0 to 1; count them again"
        raise InputError("outlier_ratios", list(outlier_ratios), remedy)
    least, most = min(outlier_ratios), max(outlier_ratios)
    if most == least:
        return [sparsity] * len(sizes)
    raised = [2 * spread * ((ratio - least) / (most - least)) for ratio in outlier_ratios]
    mean = _mean(raised, sizes)
    return [sparsity - (density - mean) for density in raised]


def _arithmetic_progression(
    difference: float, sparsity: float, sizes: Sequence[int]
) -> list[float]:
    """S_i = S + beta (i - mean i)."""
    middle = _mean(range(len(sizes)), sizes)
    shares = [sparsity + difference * (number - middle) for number in range(len(sizes))]
    if shares[0] < -_ROUNDING or shares[-1] > MAX_SPARSITY:
        limit = min(sparsity / middle, (1 - sparsity) / (len(sizes) - 1 - middle))
        raise InputError(
            "allocation.difference",
            difference,
            f"the {len(sizes)} decoder layers would go from {shares[0]:.4g} to {shares[-1]:.4g}; "
            f"at sparsity {sparsity:g} take less than {limit:.4g}",
        )
    return shares


def _by_hand(given: Sequence[float], sparsity: float, sizes: Sequence[int]) -> list[float]:
    if len(given) != len(sizes):
        remedy = f"has {len(given)} entries, but the model has {len(sizes)} decoder layers"
        raise InputError("allocation.sparsities", list(given), remedy)
    mean = _mean(given, sizes)
    if abs(mean - sparsity) > _TOLERANCE:
        remedy = f"their mean is {mean:.6f} (layers weighted by size), not {sparsity:g}; change one"
        raise InputError("allocation.sparsities", list(given), remedy)
    return list(given)


# ----------------------------------------------------------------------------------------- bounds


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    return math.fsum(v * size for v, size in zip(values, sizes, strict=True)) / sum(sizes)


def _clamped(
    shares: list[float], sizes: Sequence[int], low: float, high: float
) -> tuple[list[float], list[int]]:
    """Clamp the shares to two bounds, and shift those within so that the weighted mean stays.

    Returns:
        The shares, and the numbers of the layers that are at a bound.
    """
    if low - _ROUNDING <= min(shares) and max(shares) <= high + _ROUNDING:
        return [min(max(share, low), high) for share in shares], []
    mean = _mean(shares, sizes)

    def shifted(by: float) -> list[float]:
        return [min(max(share + by, low), high) for share in shares]

    least, most = low - max(shares), high - min(shares)
    for _ in range(100):  # halves the interval of the shift, beyond the last bit
        middle = (least + most) / 2
        if _mean(shifted(middle), sizes) < mean:
            least = middle
        else:
            most = middle
    clamped = [n for n, share in enumerate(shares) if not low <= share + most <= high]
    return shifted(most), clamped


def _rounded(shares: list[float], sizes: Sequence[int], group: int) -> list[int]:
    """Zeros of every `group` weights in each layer: the shares by largest remainder, the first of
    equal ones before the others."""
    exact = [round(share * group, 9) for share in shares]  # 2 of 6 must be 2, not 1.999...
    zeros = [math.floor(count) for count in exact]
    missing = math.fsum((e - z) * size for e, z, size in zip(exact, zeros, sizes, strict=True))
    by_remainder = sorted(range(len(exact)), key=lambda layer: zeros[layer] - exact[layer])
    for layer in by_remainder:
        if exact[layer] > zeros[layer] and 2 * missing > sizes[layer]:
            zeros[layer] += 1
            missing -= sizes[layer]
    return zeros
