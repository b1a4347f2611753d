"""Batches of texts of similar length, so that little is padding."""

import itertools
from collections.abc import Iterator, Sequence

from pipeline.models.positions import NONE, LengthDependence


def length_batches(
    ordered: Sequence[int],
    lengths: Sequence[int],
    tokens: int,
    positions: LengthDependence = NONE,
) -> Iterator[list[int]]:
    """Split texts, in order of their length, into batches of at most `tokens` tokens.

    Padding counts. A text that is longer than that is a batch of its own.

    Args:
        ordered: places of the texts, from short to long or from long to short.
        lengths: tokens of the text at each place.
        tokens: most tokens of a batch.
        positions: those of the model; the texts of a batch are of one group.
    """
    for _, group in itertools.groupby(ordered, lambda place: positions.group(lengths[place])):
        batch: list[int] = []
        for place in group:
            longest = max(lengths[place], lengths[batch[0]]) if batch else 0
            if (len(batch) + 1) * longest > tokens:
                yield batch
                batch = []
            batch.append(place)
        yield batch
