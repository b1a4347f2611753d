"""Batches in both orders of length."""

import pytest

from pipeline.models.batching import length_batches
from pipeline.models.positions import LengthDependence

LENGTHS = [24, 7, 13, 2, 19, 7, 31, 5]
SHORT_FIRST = [3, 7, 1, 5, 2, 4, 0, 6]


@pytest.mark.parametrize("ordered", [SHORT_FIRST, SHORT_FIRST[::-1]], ids=["rising", "falling"])
def test_a_batch_is_full_or_at_the_end_and_keeps_the_order(ordered: list[int]) -> None:
    batches = list(length_batches(ordered, LENGTHS, 40))
    assert [place for batch in batches for place in batch] == ordered
    for number, batch in enumerate(batches):
        longest = max(LENGTHS[place] for place in batch)
        assert len(batch) == 1 or len(batch) * longest <= 40
        if number + 1 < len(batches):
            more = max(longest, LENGTHS[batches[number + 1][0]])
            assert (len(batch) + 1) * more > 40
    assert len(batches) < len(LENGTHS)


def test_a_text_longer_than_a_batch_stands_alone() -> None:
    assert list(length_batches(SHORT_FIRST, LENGTHS, 1)) == [[place] for place in SHORT_FIRST]


def test_texts_of_different_groups_share_no_batch() -> None:
    switching = LengthDependence(switches=(7,))
    batches = list(length_batches(SHORT_FIRST, LENGTHS, 1000, switching))
    assert batches == [[3, 7, 1, 5], [2, 4, 0, 6]]
