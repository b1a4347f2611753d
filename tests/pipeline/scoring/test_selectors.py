"""Each rule on planted sets in which the right choice is known."""

import itertools
import math
from collections import Counter
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.errors import InputError
from pipeline.scoring.filter import reasons_to_drop
from pipeline.scoring.mean_states import WIDTH, standardised
from pipeline.scoring.selectors import RULES, largest_remainders
from pipeline.specs import DropBy, FilterOptions, Within

ALL: tuple[DropBy, ...] = get_args(DropBy)
WITHIN: tuple[Within, ...] = get_args(Within)


def planted(
    token_ids: list[list[int]] | None = None, count: int = 0, **columns: list[Any]
) -> tuple[pa.Table, pa.Table]:
    """Samples and scores; what is not given differs from sample to sample."""
    count = len(token_ids) if token_ids else count or len(next(iter(columns.values())))
    draws = np.random.default_rng(0)
    ids = token_ids or draws.integers(0, 50, (count, 12)).tolist()
    samples = {"token_ids": ids, "source": columns.pop("source", ["web", "books"] * count)[:count]}
    scores: dict[str, list[Any]] = {
        "sample_id": list(range(count)),
        "perplexity": draws.uniform(2, 30, count).tolist(),
        "min_k_plus_plus": draws.uniform(-3, 0, count).tolist(),
        "hidden_states": draws.standard_normal((count, WIDTH)).tolist(),
    }
    return pa.table(samples), pa.table({**scores, **columns})


def kept(tables: tuple[pa.Table, pa.Table], seed: int = 0, **options: Any) -> set[int]:
    samples, scores = tables
    reasons = reasons_to_drop(samples, scores, FilterOptions(**options), seed=seed)
    numbers = scores["sample_id"].to_pylist()
    return {number for number, reason in zip(numbers, reasons, strict=True) if reason == ""}


def near(directions: list[int], spread: float = 0.01) -> list[list[float]]:
    """Hidden states of samples near an axis each."""
    draws = np.random.default_rng(7)
    points = np.eye(WIDTH)[directions] + spread * draws.standard_normal((len(directions), WIDTH))
    return points.tolist()


# --------------------------------------------------------------------------------------- all rules


@settings(deadline=None)
@given(
    st.sampled_from(ALL),
    st.sampled_from(WITHIN),
    st.integers(2, 25),
    st.integers(0, 15),
    st.integers(0, 3),
)
def test_exactly_the_asked_share_is_dropped(
    rule: DropBy, within: Within, count: int, sixteenths: int, seed: int
) -> None:
    asked = {"drop_fraction": sixteenths / 16, "drop_by": rule, "within": within}
    dropped = math.floor(sixteenths / 16 * count + 0.5)
    if dropped == count:
        return
    found = kept(planted(count=count), seed, **asked)
    assert len(found) == count - dropped
    assert found == kept(planted(count=count), seed, **asked)


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("rule", ALL)
def test_the_order_of_the_rows_changes_nothing(rule: DropBy, within: Within) -> None:
    samples, scores = planted(count=24)
    order = np.random.default_rng(3).permutation(24)
    asked = {"drop_fraction": 0.4, "drop_by": rule, "within": within}
    assert kept((samples.take(order), scores.take(order)), **asked) == kept(
        (samples, scores), **asked
    )


@pytest.mark.parametrize("rule", ALL)
def test_each_source_loses_the_same_share(rule: DropBy) -> None:
    sources = ["web"] * 20 + ["books"] * 10 + ["code"] * 10
    found = kept(planted(source=sources), drop_by=rule, within="source", drop_fraction=0.3)
    assert Counter(sources[number] for number in found) == {"web": 14, "books": 7, "code": 7}


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.data())
def test_a_total_is_spread_by_largest_remainders(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(sizes)))
    counts = largest_remainders(sizes, total)
    assert sum(counts) == total
    quotas = [size * total / sum(sizes) for size in sizes]
    for count, quota, size in zip(counts, quotas, sizes, strict=True):
        assert math.floor(quota + 1e-9) <= count <= min(size, math.ceil(quota - 1e-9))
    up = [q % 1 for q, c in zip(quotas, counts, strict=True) if c > math.floor(q + 1e-9)]
    down = [q % 1 for q, c in zip(quotas, counts, strict=True) if c == math.floor(q + 1e-9)]
    assert not up or not down or min(up) > max(each % (1 - 1e-9) for each in down) - 1e-9


def test_every_rule_of_a_grid_is_there() -> None:
    assert set(RULES) == set(ALL)


# -------------------------------------------------------------------------------- perplexity, Min-K


def test_a_kind_of_high_perplexity_is_lost_unless_each_kind_is_filtered_by_itself() -> None:
    """Ten of forty samples are of a foreign kind, all of a higher perplexity than the rest."""
    foreign = [number % 4 == 0 for number in range(40)]
    tables = planted(
        source=["foreign" if each else "english" for each in foreign],
        perplexity=[number + 100.0 * each for number, each in enumerate(foreign)],
        hidden_states=near([int(each) for each in foreign]),
    )

    def of_it(**options: Any) -> int:
        return sum(foreign[number] for number in kept(tables, drop_fraction=0.4, **options))

    assert of_it() == 0
    assert of_it(within="source") == 6
    assert of_it(within="cluster") == 6


def test_the_lowest_min_k_plus_plus_is_dropped() -> None:
    tables = planted(min_k_plus_plus=[-1.0, -3.0, -0.5, -2.0, -0.5], count=5)
    assert kept(tables, drop_by="min-k-plus-plus", drop_fraction=0.4) == {0, 2, 4}
    assert kept(tables, drop_by="min-k-plus-plus", drop_fraction=0.8) == {2}


# ------------------------------------------------------------------------------------------ random


def test_a_random_drop_is_uniform_over_pairs_of_samples() -> None:
    """Of six samples two are dropped: 15 pairs, over 1500 seeds."""
    tables = planted(count=6)
    pairs = Counter(
        frozenset(range(6)) - kept(tables, seed, drop_by="random", drop_fraction=1 / 3)
        for seed in range(1500)
    )
    counts = [pairs[frozenset(pair)] for pair in itertools.combinations(range(6), 2)]
    assert sum(counts) == 1500
    assert stats.chisquare(counts).pvalue > 0.01


# ------------------------------------------------------------------------------------------ zipcal


def test_repeats_of_one_text_are_dropped() -> None:
    texts = [[10 * number + token for token in range(8)] for number in range(6)]
    ids = [texts[0], texts[0], texts[1], texts[0], texts[2], texts[3], texts[0], texts[4]]
    assert kept(planted(ids), drop_by="zipcal", drop_fraction=3 / 8) == {0, 2, 4, 5, 7}


TOKEN_SETS = st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=2, max_size=7)


@given(TOKEN_SETS, st.data())
def test_the_tokens_covered_are_near_the_most_that_any_choice_covers(
    texts: list[list[int]], data: st.DataObject
) -> None:
    """The greedy bound of submodular functions, against every choice."""
    keep = data.draw(st.integers(1, len(texts) - 1))
    options = {"drop_by": "zipcal", "drop_fraction": 1 - keep / len(texts)}
    found = kept(planted(texts), **options)
    assert len(found) == keep

    def covered(choice: Any) -> int:
        return len(set().union(*(texts[number] for number in choice)))

    best = max(covered(choice) for choice in itertools.combinations(range(len(texts)), keep))
    assert covered(found) >= (1 - 1 / math.e) * best


@given(TOKEN_SETS, st.data())
def test_lazy_gains_choose_what_counting_every_gain_chooses(
    texts: list[list[int]], data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, len(texts) - 1))
    left, covered, chosen = list(range(len(texts))), set[int](), list[int]()
    while len(chosen) < keep:
        first = max(left, key=lambda number: (len(set(texts[number]) - covered), -number))
        if not set(texts[first]) - covered and covered:
            covered = set()  # the next round
            continue
        covered |= set(texts[first])
        chosen.append(first)
        left.remove(first)
    options = {"drop_by": "zipcal", "drop_fraction": 1 - keep / len(texts)}
    assert kept(planted(texts), **options) == set(chosen)


# -------------------------------------------------------------------------------------------- cola


def test_of_two_clusters_both_are_kept_however_unequal_they_are() -> None:
    """Eighteen samples of one kind and two of another: a random pair mostly misses the latter."""
    directions = [0] * 9 + [1] + [0] * 9 + [1]
    tables = planted(hidden_states=near(directions))
    for seed in range(5):
        found = kept(tables, seed, drop_by="cola", drop_fraction=0.9)
        assert {directions[number] for number in found} == {0, 1}
    assert kept(tables, drop_by="zipcal", drop_fraction=0.9) != found


def test_the_sample_nearest_to_the_centre_stands_for_its_cluster() -> None:
    centres = 50.0 * np.eye(2, WIDTH)
    offsets = np.zeros((5, WIDTH))
    offsets[:, 5] = [-2.0, 2.0, 0.1, -1.0, 1.0]  # mean 0.02: the third is nearest
    states = np.concatenate([centres[0] + offsets, centres[1] + offsets[::-1]])
    tables = planted(hidden_states=states.tolist())
    assert kept(tables, drop_by="cola", drop_fraction=0.8) == {2, 7}


def test_too_few_different_samples_for_the_clusters_are_refused() -> None:
    tables = planted(hidden_states=near([0, 1, 2], 0.0) * 4)
    assert len(kept(tables, drop_by="cola", drop_fraction=0.75)) == 3
    with pytest.raises(InputError, match=r"6 clusters.*only 3 of 12 differ: raise drop_fraction"):
        kept(tables, drop_by="cola", drop_fraction=0.5)


def test_a_stratum_that_loses_nothing_is_not_asked_for_different_samples() -> None:
    """Two equal samples from the web, ten different ones from books; one of the twelve goes."""
    states = near([0, 0, *range(10)])
    states[1] = states[0]
    tables = planted(count=12, source=["web"] * 2 + ["books"] * 10, hidden_states=states)
    found = kept(tables, drop_fraction=1 / 12, drop_by="cola", within="source")
    assert len(found) == 11
    assert {0, 1} <= found


def test_every_layer_counts_the_same_in_distances() -> None:
    draws = np.random.default_rng(0)
    states = draws.standard_normal((30, 3 * WIDTH)) * np.repeat([0.01, 1.0, 300.0], WIDTH) + 5.0
    scaled = standardised(states)
    assert scaled.mean(axis=0) == pytest.approx(0.0, abs=1e-9)
    layers = (scaled.reshape(30, 3, WIDTH) ** 2).sum(axis=2).mean(axis=0)
    assert layers.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    moved = standardised(2 * states + 1, reference=2 * states + 1)
    assert moved == pytest.approx(scaled)


# -------------------------------------------------------------------------------------------- igsp

SHORT = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=8, max_size=12)


@given(SHORT, st.data())
def test_igsp_keeps_the_least_repeated_of_each_quarter_of_perplexity(
    texts: list[list[int]], data: st.DataObject
) -> None:
    """Against the definition: of all choices with these shares the one of least repetition."""
    perplexity = data.draw(st.permutations([float(number) for number in range(len(texts))]))
    grams = [[tuple(t[at : at + 4]) for at in range(max(1, len(t) - 3))] for t in texts]
    counts = Counter(gram for text in grams for gram in text)
    repeated = [sum(counts[gram] > 1 for gram in text) / len(text) for text in grams]
    ascending = sorted(range(len(texts)), key=lambda number: perplexity[number])
    found = kept(planted(texts, perplexity=list(perplexity)), drop_by="igsp", drop_fraction=0.5)
    quarters = [part.tolist() for part in np.array_split(ascending, 4)]
    for quarter in quarters:
        share = found.intersection(quarter)
        assert abs(len(share) - len(found) * len(quarter) / len(texts)) < 1
        least = min(
            sum(repeated[number] for number in choice)
            for choice in itertools.combinations(quarter, len(share))
        )
        assert sum(repeated[number] for number in share) == pytest.approx(least)


def test_igsp_drops_repeats_at_every_level_of_perplexity() -> None:
    """In each quarter of sixteen samples, one repeats its own 4-gram."""
    texts = [[100 * number + token for token in range(12)] for number in range(16)]
    loops = [1, 6, 8, 15]
    for number in loops:
        texts[number] = [number] * 12
    tables = planted(texts, perplexity=[float(number) for number in range(16)])
    assert kept(tables, drop_by="igsp", drop_fraction=0.25) == set(range(16)) - set(loops)


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("perplexity", {"drop_by": "igsp"}, "drop_by: 'igsp': the samples have no perplexity"),
        ("perplexity", {}, "drop_by: 'perplexity': the samples have no perplexity"),
        ("min_k_plus_plus", {"drop_by": "min-k-plus-plus"}, "the samples have no scores"),
        ("hidden_states", {"drop_by": "cola"}, "hidden_states: None: the samples have none"),
        ("hidden_states", {"within": "cluster"}, "hidden_states: None: the samples have none"),
    ],
)
def test_a_rule_says_what_it_lacks(missing: str, options: dict[str, Any], message: str) -> None:
    samples, scores = planted(count=8)
    scores = scores.drop_columns(missing).append_column("tokens", pa.array([9] * 8))
    with pytest.raises(InputError, match=message):
        kept((samples, scores), drop_fraction=0.5, **options)


def test_strata_by_source_need_sources() -> None:
    samples, scores = planted(count=8)
    with pytest.raises(InputError, match="within: 'source': the samples have no source"):
        kept((samples.drop_columns("source"), scores), drop_fraction=0.5, within="source")
