"""Samples with the same ids as an earlier one, or nearly the same."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

RUN_TOKENS = 5
"""Tokens of a run; two samples are compared by their sets of runs."""

PERMUTATIONS = 128
"""Hash values of a signature."""

MISSES = 1e-3
"""Greatest chance that a pair of exactly the asked similarity is missed."""


def duplicates(token_ids: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
    """Return which samples have the ids of an earlier one, [samples]."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for ids in map(tuple, token_ids):
        found.append(ids in seen)
        seen.add(ids)
    return np.array(found, dtype=np.bool_)


def near_duplicates(token_ids: Sequence[Sequence[int]], similarity: float) -> npt.NDArray[np.bool_]:
    """Return which samples are similar to an earlier one that is not marked itself, [samples].

    An index of MinHash signatures of the sets of runs (Broder 1997), cut into bands, gives
    candidates; the exact Jaccard similarity of the sets decides. So no other sample is marked, and
    what the index misses it misses every time.

    Args:
        similarity: least Jaccard similarity of near duplicates.
    """
    index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(similarity))
    found = np.zeros(len(token_ids), dtype=np.bool_)
    for place, ids in enumerate(token_ids):
        own = runs(ids)
        signature = MinHash(PERMUTATIONS)
        signature.update_batch(list(own))
        found[place] = any(
            jaccard(own, runs(token_ids[candidate])) >= similarity
            for candidate in index.query(signature)
        )
        if not found[place]:
            index.insert(place, signature)
    return found


def bands(similarity: float) -> tuple[int, int]:
    """Return the number of bands of a signature, and of the values in a band.

    It is the most values with which a pair of similarity s agrees in no band with a chance of at
    most `MISSES`, which is (1 - s^values)^bands.
    """
    for values in range(PERMUTATIONS // 2, 1, -1):
        count = PERMUTATIONS // values
        if (1 - similarity**values) ** count <= MISSES:
            return count, values
    return PERMUTATIONS, 1


def runs(ids: Sequence[int]) -> set[bytes]:
    """Return the different runs of `RUN_TOKENS` ids; a shorter sample is one run."""
    width = RUN_TOKENS * np.dtype(np.int32).itemsize
    step = np.dtype(np.int32).itemsize
    content = np.asarray(ids, dtype=np.int32).tobytes()
    return {content[at : at + width] for at in range(0, max(1, len(content) - width + 1), step)}


def jaccard(one: set[bytes], other: set[bytes]) -> float:
    """Return the size of the intersection of two sets as a share of that of their union."""
    return len(one & other) / len(one | other)
