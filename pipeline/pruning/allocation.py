"""How a model's sparsity is spread over its decoder layers: an axis apart from the pruner.

Plain arithmetic on a number a layer. A layer counts as much as it has weights, so the model is as
sparse as it was asked to be whether or not its layers are of one size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.specs import OWL, Allocation, ArithmeticProgression, ByHand, Uniform

MOST = 1 - 1e-9
"""The most a layer is given, since at 1 nothing of it would be left."""

ROUNDING = 1e-12
"""What is no more than this beyond a bound is at it."""

TOLERANCE = 1e-6
"""How far the mean of sparsities by hand may be from the model's."""


@dataclass(frozen=True)
class LayerTarget:
    """What every matrix of one decoder layer is pruned to."""

    sparsity: float
    """Share of zeros; with a pattern, the pattern's."""

    pattern: tuple[int, int] | None
    """Kept and group size."""


@dataclass(frozen=True)
class Allocated:
    """A model's sparsity, spread over its decoder layers."""

    layers: list[LayerTarget]
    """Of each layer, from the first."""

    clamped: list[int]
    """Numbers of the layers that are at a bound because their share would lie beyond it."""


def check_target(sparsity: float, pattern: tuple[int, int] | None) -> None:
    """See that a share of zeros is one, and a pattern's own if there is a pattern.

    Args:
        sparsity: share of zeros.
        pattern: kept and group size.

    Raises:
        InputError: if they are not.
    """
    if not 0 <= sparsity < 1:  # nor NaN
        raise InputError("sparsity", sparsity, "is no share of zeros: take 0 or more, and below 1")
    if pattern is None:
        return
    kept, group = pattern
    text = f"{kept}:{group}"
    if not 0 < kept <= group:
        raise InputError("pattern", text, "must keep at least one of a group, and at most all")
    if not math.isclose(sparsity, 1 - kept / group, abs_tol=ROUNDING):
        remedy = f"contradicts pattern {text}, which is sparsity {1 - kept / group:g}; change one"
        raise InputError("sparsity", sparsity, remedy)


def allocate(
    allocation: Allocation,
    sparsity: float,
    pattern: tuple[int, int] | None,
    sizes: Sequence[int],
    outlier_ratios: Sequence[float] | None = None,
) -> Allocated:
    """Spread a model's sparsity over its decoder layers.

    The mean weighted by `sizes` is `sparsity`. A layer that would leave [0, 1) is set to the bound
    and all others are shifted by one amount to make up for it.

    With a pattern N:M a layer keeps N_i of M, between 1 and M - 1. Its share of zeros is first held
    between 1/M and (M - 1)/M as above. Then M times the shares are rounded down, and up again for
    the largest remainders until the mean is as near to `sparsity` as it gets: equal to it where
    all layers are of one size, else off by no more than half a step of the largest layer. OWL's
    own code rounds `lambda * (D_i - min D) / (max D - min D) - mean` for each layer alone, with a
    lambda that counts weights of a group, and lets the mean drift and N_i leave 1 to M - 1; here
    `spread` is a share of zeros with and without a pattern.

    Args:
        sparsity: share of zeros over all matrices; with a pattern it must be the pattern's.
        pattern: kept and group size, as the mean over the layers.
        sizes: of each decoder layer, how many weights its matrices have.
        outlier_ratios: of each decoder layer, for OWL.

    Raises:
        InputError: if the allocation does not fit the model or the sparsity, or the sparsity not
            the pattern.
    """
    check_target(sparsity, pattern)
    if isinstance(allocation, Uniform):
        return Allocated([LayerTarget(sparsity, pattern)] * len(sizes), clamped=[])
    shares = _shares(allocation, sparsity, sizes, outlier_ratios)
    if pattern is None:
        held, clamped = _held(shares, sizes, 0.0, MOST)
        targets = [LayerTarget(share, None) for share in held]
    else:
        kept, group = pattern
        if kept == group:
            remedy = f"prunes nothing, so allocation {allocation.name} has nothing to spread"
            raise InputError("pattern", f"{kept}:{group}", f"{remedy}; take uniform")
        held, clamped = _held(shares, sizes, 1 / group, 1 - 1 / group)
        zeros = _rounded(held, sizes, group)
        targets = [LayerTarget(count / group, (group - count, group)) for count in zeros]
    return Allocated(targets, clamped)


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
    """S_i = S - (r_i - mean r), r_i = 2 lambda (D_i - min D) / (max D - min D): the layer with
    most outliers is 2 lambda denser than that with fewest."""
    if len(outlier_ratios) != len(sizes):
        remedy = f"the model has {len(sizes)} decoder layers, not {len(outlier_ratios)}"
        raise InputError("outlier_ratios", list(outlier_ratios), remedy)
    if not all(0 <= ratio <= 1 for ratio in outlier_ratios):
        remedy = "are no shares, 0 to 1; count them anew"
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
    if shares[0] < -ROUNDING or shares[-1] > MOST:
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
    if abs(mean - sparsity) > TOLERANCE:
        remedy = f"their mean is {mean:.6f} (layers weighted by size), not {sparsity:g}; change one"
        raise InputError("allocation.sparsities", list(given), remedy)
    return list(given)


# ----------------------------------------------------------------------------------------- bounds


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    return math.fsum(v * size for v, size in zip(values, sizes, strict=True)) / sum(sizes)


def _held(
    shares: list[float], sizes: Sequence[int], low: float, high: float
) -> tuple[list[float], list[int]]:
    """The shares between two bounds, those within shifted so that the weighted mean stays, and
    the numbers of those that are held back."""
    if low - ROUNDING <= min(shares) and max(shares) <= high + ROUNDING:
        return [min(max(share, low), high) for share in shares], []
    mean = _mean(shares, sizes)

    def shifted(by: float) -> list[float]:
        return [min(max(share + by, low), high) for share in shares]

    below, above = low - max(shares), high - min(shares)
    for _ in range(100):  # halves the interval of the shift, beyond the last bit
        middle = (below + above) / 2
        if _mean(shifted(middle), sizes) < mean:
            below = middle
        else:
            above = middle
    beyond = [n for n, share in enumerate(shares) if not low <= share + above <= high]
    return shifted(above), beyond


def _rounded(shares: list[float], sizes: Sequence[int], group: int) -> list[int]:
    """Zeros of every `group` weights in each layer: the shares by largest remainder, of equal ones
    the first."""
    exact = [round(share * group, 9) for share in shares]  # 2 of 6 must be 2, not 1.999...
    zeros = [math.floor(count) for count in exact]
    missing = math.fsum((e - z) * size for e, z, size in zip(exact, zeros, sizes, strict=True))
    by_remainder = sorted(range(len(exact)), key=lambda layer: zeros[layer] - exact[layer])
    for layer in by_remainder:
        if exact[layer] > zeros[layer] and 2 * missing > sizes[layer]:
            zeros[layer] += 1
            missing -= sizes[layer]
    return zeros
