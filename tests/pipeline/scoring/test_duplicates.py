import random

import numpy as np
import pytest
from datasketch import MinHash

from pipeline.scoring.duplicates import PERMUTATIONS, bands, duplicates, near_duplicates, runs


def adjacent(ids: list[int]) -> set[tuple[int, ...]]:
    """All different five adjacent ids."""
    return {tuple(ids[at : at + 5]) for at in range(len(ids) - 4)}


def similarity(one: list[int], other: list[int]) -> float:
    """Jaccard similarity of the sets of five adjacent ids, from the definition."""
    sets = adjacent(one), adjacent(other)
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(ids: list[int], edits: int, draw: random.Random) -> list[int]:
    changed = list(ids)
    for place in draw.sample(range(len(ids)), edits):
        changed[place] = draw.randrange(1000, 2000)
    return changed


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    """Forty texts and four copies of each with 1 to 40 of their 120 tokens changed, shuffled."""
    draw = random.Random(0)
    originals = [[draw.randrange(1000) for _ in range(120)] for _ in range(40)]
    copies = [edited(ids, draw.randint(1, 40), draw) for ids in originals for _ in range(4)]
    mixed = originals + copies
    draw.shuffle(mixed)
    return mixed


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8, 0.9])
def test_near_duplicates_are_those_that_a_comparison_of_all_pairs_finds(
    samples: list[list[int]], threshold: float
) -> None:
    kept: list[set[tuple[int, ...]]] = []
    expected = []
    for own in map(adjacent, samples):
        common = ((len(own & other), len(own | other)) for other in kept)
        expected.append(any(both / either >= threshold for both, either in common))
        if not expected[-1]:
            kept.append(own)
    assert near_duplicates(samples, threshold).tolist() == expected
    assert 0 < sum(expected) < len(samples)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_miss_few_similar_pairs_and_do_not_match_all(threshold: float) -> None:
    count, values = bands(threshold)
    assert count * values <= PERMUTATIONS
    draws = np.random.default_rng(0).random((5000, count, values)) < threshold
    assert (~draws.all(axis=2).any(axis=1)).mean() < 0.005
    wider = PERMUTATIONS // (values + 1)
    assert values == PERMUTATIONS // 2 or (1 - threshold ** (values + 1)) ** wider > 1e-3


def test_the_first_of_equal_samples_stays_and_short_ones_are_compared_whole() -> None:
    long = list(range(50))
    samples = [[7], long, [7], [7, 8], long, [8]]
    expected = [False, False, True, False, True, False]
    assert near_duplicates(samples, 1.0).tolist() == expected
    assert near_duplicates(samples, 0.5).tolist() == expected
    assert duplicates(samples).tolist() == expected
    assert len(near_duplicates([], 0.5)) == 0


def test_a_run_holds_five_ids_of_any_size() -> None:
    ids = [1, 70_000, 2, 3, 4, 200_000]
    expected = {np.array(part, np.int32).tobytes() for part in (ids[:5], ids[1:])}
    assert runs(ids) == expected


def test_signatures_estimate_the_jaccard_similarity(samples: list[list[int]]) -> None:
    """The library is used correctly: the share of equal hash values has the standard error
    sqrt(J (1 - J) / permutations)."""
    errors = []
    for one, other in zip(samples[:60], samples[60:120], strict=True):
        signatures = [MinHash(PERMUTATIONS), MinHash(PERMUTATIONS)]
        for signature, ids in zip(
            signatures, (one, edited(one, 12, random.Random(1))), strict=True
        ):
            signature.update_batch(list(runs(ids)))
        exact = similarity(one, edited(one, 12, random.Random(1)))
        errors.append(signatures[0].jaccard(signatures[1]) - exact)
        assert similarity(one, other) < 1
    assert abs(np.mean(errors)) < 0.02
