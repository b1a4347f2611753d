from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scoring.ngrams import distinct_share, ngrams, repeated_shares

TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=6)


def plain(texts: list[list[int]], length: int) -> list[list[tuple[int, ...]]]:
    """The n-grams of each text by their definition; a shorter text is one."""
    return [
        [tuple(text[at : at + length]) for at in range(max(1, len(text) - length + 1))]
        for text in texts
    ]


@given(TEXTS, st.integers(1, 5))
def test_n_grams_have_one_number_exactly_if_they_are_equal(
    texts: list[list[int]], length: int
) -> None:
    found = ngrams(texts, length)
    grams = [gram for text in plain(texts, length) for gram in text]
    pairs = set(zip(grams, found.numbers.tolist(), strict=True))
    assert len(pairs) == len(set(grams)) == len(set(found.numbers.tolist()))
    assert found.texts.tolist() == [
        place for place, text in enumerate(plain(texts, length)) for _ in text
    ]


@given(TEXTS, st.integers(1, 5))
def test_a_repeated_n_gram_occurs_again_in_the_set_or_in_its_own_text(
    texts: list[list[int]], length: int
) -> None:
    grams = plain(texts, length)
    counts = Counter(gram for text in grams for gram in text)
    wanted = [np.mean([counts[gram] > 1 for gram in text]) for text in grams]
    assert repeated_shares(texts, length).tolist() == pytest.approx(wanted)
    everything = [gram for text in grams for gram in text]
    assert distinct_share(texts, length) == len(set(everything)) / len(everything)


def test_large_token_ids_do_not_collide() -> None:
    texts = [[200_000, 1, 0, 200_001], [200_000, 1, 0, 200_000], [1, 0, 200_000, 200_001]]
    assert repeated_shares(texts, 4).tolist() == [0.0, 0.0, 0.0]
    assert repeated_shares(texts, 3).tolist() == [0.5, 1.0, 0.5]
