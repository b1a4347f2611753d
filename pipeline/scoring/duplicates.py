"""Samples that say what an earlier one has said: the same ids, or nearly the same."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

RUN_TOKENS = 5
"""Tokens of a run; two samples are compared by the sets of theirs."""

PERMUTATIONS = 128
"""Hash values of a signature."""

MISSES = 1e-3
"""Chance at the most that a pair just as like as asked for is not found."""


def duplicates(token_ids: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
    """Which samples have the ids of an earlier one, [samples]."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for ids in map(tuple, token_ids):
        found.append(ids in seen)
        seen.add(ids)
    return np.array(found, dtype=np.bool_)


def near_duplicates(token_ids: Sequence[Sequence[int]], similarity: float) -> npt.NDArray[np.bool_]:
    """Which samples are like an earlier one that is none of them itself, [samples].

    MinHash signatures of sets of runs name candidates (Broder 1997), as an index by bands finds
    them; the exact Jaccard similarity of the sets decides. So no unlike sample is marked; what the
    index misses, it misses every time.

    Args:
        similarity: the least Jaccard similarity of two samples that are alike.
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
    """How many bands a signature is cut into and the values of each: as many values as keep the
    chance (1 - s^values)^bands that a pair of similarity s agrees in no band below `MISSES`."""
    for values in range(PERMUTATIONS // 2, 1, -1):
        count = PERMUTATIONS // values
        if (1 - similarity**values) ** count <= MISSES:
            return count, values
    return PERMUTATIONS, 1


def runs(ids: Sequence[int]) -> set[bytes]:
    """All different runs of `RUN_TOKENS` ids; the whole of a sample that has not as many."""
    width = RUN_TOKENS * np.dtype(np.int32).itemsize
    step = np.dtype(np.int32).itemsize
    content = np.asarray(ids, dtype=np.int32).tobytes()
    return {content[at : at + width] for at in range(0, max(1, len(content) - width + 1), step)}


def jaccard(one: set[bytes], other: set[bytes]) -> float:
    """What two sets have in common, as a share of all that is in either."""
    return len(one & other) / len(one | other)
