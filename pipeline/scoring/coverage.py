"""What a set of texts covers: properties of the set, where means over its texts see each alone."""

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from pipeline.scoring.mean_states import MeanStates, standardised

Shares = npt.NDArray[np.float64]
"""Share of each token id, by id."""


def entropy(shares: Shares) -> float:
    """Return the Shannon entropy of a distribution over token ids, in bits."""
    present = shares[shares > 0]
    return float(-(present * np.log2(present)).sum())


def missing_mass(own: Shares, reference: Shares) -> float:
    """Return the share of the reference's tokens whose ids never occur in the set, 0 to 1."""
    known = np.pad(own, (0, max(0, len(reference) - len(own))))[: len(reference)] > 0
    return float(reference[~known].sum())


def effective_directions(states: MeanStates) -> float | None:
    """Return in how many directions hidden states spread: their participation ratio.

    It is (sum of eigenvalues)^2 / (sum of squared eigenvalues) of their covariance: d where they
    spread equally in d directions. At most n - 1 for n texts, so only compare sets of one size.
    None if all states are equal.
    """
    centred = standardised(states)
    products = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    total = float(np.trace(products))
    return total**2 / float((products**2).sum()) if total > 0 else None


def nearest_distance(states: MeanStates, reference: MeanStates) -> float | None:
    """Return the mean distance of the reference's hidden states to the nearest of the set's.

    The unit is the root mean square distance of the reference's states from their own mean; None if
    these are all equal.
    """
    if (reference == reference[0]).all():
        return None
    own, theirs = standardised(states, reference), standardised(reference)
    return float(cdist(theirs, own).min(axis=1).mean())
