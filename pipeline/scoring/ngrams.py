"""The n-grams of a set of texts, numbered exactly."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Ngrams(NamedTuple):
    """The n-grams of all texts, in order."""

    numbers: npt.NDArray[np.int64]
    """[n-grams]; equal n-grams have one number, counted from 0 without gaps."""

    texts: npt.NDArray[np.int64]
    """[n-grams]: the place of the text that each is in."""


def ngrams(token_ids: Sequence[Sequence[int]], length: int) -> Ngrams:
    """Number the n-grams of `length` tokens of each text; a shorter text is one n-gram.

    Two neighbouring n-grams of n - 1 tokens make one of n, so each step numbers distinct pairs.
    """
    rows = [np.asarray(ids, dtype=np.int64) for ids in token_ids]
    beyond = 1 + max((int(row.max()) for row in rows if len(row)), default=0)
    filled = [np.pad(row, (0, max(0, length - len(row))), constant_values=beyond) for row in rows]
    lengths = np.array([len(row) for row in filled], dtype=np.int64)
    tokens = np.concatenate(filled) if filled else np.zeros(0, dtype=np.int64)
    _, singles = np.unique(tokens, return_inverse=True)
    numbers = singles
    for width in range(2, length + 1):  # numbers[i] is of the n-gram of `width` - 1 tokens at i
        following = singles[width - 1 :]
        pairs = numbers[: len(following)] * (singles.max(initial=0) + 1) + following
        _, numbers = np.unique(pairs, return_inverse=True)
    texts = np.repeat(np.arange(len(rows)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))  # tokens to its end
    inside = np.flatnonzero(left >= length)
    _, numbers = np.unique(numbers[inside], return_inverse=True)
    return Ngrams(numbers, texts[inside])


def repeated_shares(token_ids: Sequence[Sequence[int]], length: int) -> npt.NDArray[np.float64]:
    """Return the share of each text's n-grams that occur again, in the set or in itself, [texts].

    A text without tokens counts as one n-gram.
    """
    found = ngrams(token_ids, length)
    again = np.bincount(found.numbers)[found.numbers] > 1 if len(found.numbers) else np.zeros(0)
    counts = np.bincount(found.texts, minlength=len(token_ids))
    shares: npt.NDArray[np.float64] = (
        np.bincount(found.texts, weights=again, minlength=len(token_ids)) / counts
    )
    return shares


def distinct_share(token_ids: Sequence[Sequence[int]], length: int) -> float:
    """Return the different n-grams of all texts together as a share of all their n-grams."""
    numbers = ngrams(token_ids, length).numbers
    return int(numbers.max() + 1) / len(numbers)
