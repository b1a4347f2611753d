"""Rules that choose which samples to keep, each for a number of samples to choose.

A rule is a function of `Candidates`. It returns exactly as many places as it is asked for, and of
samples that it finds equal it keeps those with the lower number.
"""

import functools
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.scoring.clusters import distinct_points, k_means
from pipeline.scoring.mean_states import MeanStates, standardised
from pipeline.scoring.ngrams import repeated_shares
from pipeline.specs import DropBy, FilterOptions, Within, dropped

Places = npt.NDArray[np.int64]
"""Places among the candidates, [chosen]."""

PERPLEXITY_PARTS = 4
"""Parts of equal size that IGSP splits the range of perplexity into."""

IGSP_LENGTH = 4
"""Tokens of the n-grams that IGSP counts."""


@dataclass(frozen=True)
class Candidates:
    """Samples to choose from, in the order of their numbers; None for what was not measured."""

    token_ids: list[list[int]]
    sources: list[str | None] | None = None
    perplexity: npt.NDArray[np.float64] | None = None
    min_k_plus_plus: npt.NDArray[np.float64] | None = None
    hidden_states: MeanStates | None = None

    @classmethod
    def of(cls, samples: pa.Table, scores: pa.Table) -> "Candidates":
        """Read the columns that two tables of the same samples have."""
        measured = {
            name: scores[name].to_numpy()
            for name in ("perplexity", "min_k_plus_plus")
            if name in scores.column_names
        }
        if "hidden_states" in scores.column_names:
            measured["hidden_states"] = np.array(scores["hidden_states"].to_pylist(), np.float64)
        named = "source" in samples.column_names
        sources = samples["source"].to_pylist() if named else None
        return cls(samples["token_ids"].to_pylist(), sources, **measured)

    @functools.cached_property
    def repeated(self) -> npt.NDArray[np.float64]:
        """Share of each sample's 4-grams that occur again, in the set or in the sample itself."""
        return repeated_shares(self.token_ids, IGSP_LENGTH)


Rule = Callable[[Candidates, Places, int, np.random.Generator], Places]
"""Takes all candidates, the places of those to choose from, how many to keep, and a generator;
returns the places that are kept."""


def places_to_drop(candidates: Candidates, options: FilterOptions, seed: int) -> Places:
    """Return the samples that a filter drops: exactly round(drop_fraction * samples).

    Strata lose equal shares, as far as whole samples allow: what is left over after rounding down
    goes to the strata with the largest remainders.

    Raises:
        InputError: if the candidates lack what the rule reads, or differ too little for it.
    """
    total = dropped(len(candidates.token_ids), options.drop_fraction)
    if total == 0:
        return np.zeros(0, dtype=np.int64)
    rule = RULES[options.drop_by]
    strata = split(candidates, options.within, np.random.default_rng([seed, 0]))
    counts = largest_remainders([len(places) for places in strata], total)
    gone = [np.zeros(0, dtype=np.int64)]
    for number, (places, count) in enumerate(zip(strata, counts, strict=True)):
        draws = np.random.default_rng([seed, 1, number])
        keep = len(places) - count
        kept = rule(candidates, places, keep, draws) if 0 < count < len(places) else places[:keep]
        gone.append(np.setdiff1d(places, kept))
    return np.concatenate(gone)


def split(candidates: Candidates, within: Within, draws: np.random.Generator) -> list[Places]:
    """Split the candidates into strata.

    Sources are in the order of their names. There are round(sqrt(n / 2)) clusters of n samples, the
    common rule of thumb (Mardia, Kent and Bibby 1979), or fewer if fewer samples differ.

    Raises:
        InputError: if the candidates lack what tells them apart.
    """
    everything = np.arange(len(candidates.token_ids))
    if within == "set":
        return [everything]
    if within == "source":
        if candidates.sources is None:
            raise InputError("within", within, "the samples have no source: give their sources")
        _, labels = np.unique([str(each) for each in candidates.sources], return_inverse=True)
    else:
        states = standardised(_states(candidates))
        count = min(max(1, round((len(states) / 2) ** 0.5)), distinct_points(states))
        labels = k_means(states, count, draws).labels
    return [np.flatnonzero(labels == label) for label in range(labels.max(initial=-1) + 1)]


def largest_remainders(sizes: Sequence[int], total: int) -> list[int]:
    """Spread `total` over parts in proportion to their sizes (Hamilton's method).

    Of equal remainders the first part's counts more.
    """
    whole = sum(sizes)
    counts = [size * total // whole for size in sizes]
    remainders = [size * total % whole for size in sizes]
    for place in sorted(range(len(sizes)), key=lambda place: -remainders[place]):
        if sum(counts) == total:
            break
        counts[place] += 1
    return counts


# ------------------------------------------------------------------------------------------- rules


def lowest_perplexity(
    candidates: Candidates, places: Places, keep: int, draws: np.random.Generator
) -> Places:
    """Keep the lowest perplexities (arXiv 2410.17711, section 5).

    The reference code keeps what lies strictly below a percentile, so ties change its count.
    """
    if candidates.perplexity is None:
        raise InputError("drop_by", "perplexity", "the samples have no perplexity: score them")
    return places[np.argsort(candidates.perplexity[places], kind="stable")[:keep]]


def highest_min_k_plus_plus(
    candidates: Candidates, places: Places, keep: int, draws: np.random.Generator
) -> Places:
    """Keep the highest Min-K%++ (arXiv 2404.02936): the text likeliest to be from pretraining."""
    if candidates.min_k_plus_plus is None:
        raise InputError("drop_by", "min-k-plus-plus", "the samples have no scores: score them")
    return places[np.argsort(-candidates.min_k_plus_plus[places], kind="stable")[:keep]]


def at_random(
    candidates: Candidates, places: Places, keep: int, draws: np.random.Generator
) -> Places:
    """Keep a uniform draw without replacement."""
    return draws.choice(places, keep, replace=False)


def most_distinct_tokens(
    candidates: Candidates, places: Places, keep: int, draws: np.random.Generator
) -> Places:
    """Keep the samples with the most different tokens together, as ZipCal (arXiv 2603.16105) does.

    From the paper: the rule sees no model, maximises lexical diversity and is linear in the text;
    by Zipf's law a few words are most of any text, so samples differ in their rare ones. Its code
    for the selection is not public, so the rest is our reading: greedy maximum coverage. Each step
    takes the sample with the most tokens that no chosen one has, which covers at least 1 - 1/e of
    what the best choice would (Nemhauser, Wolsey and Fisher 1978). Token ids stand for words, since
    not every language puts spaces between them. Once nothing is left to cover, the next round
    begins with nothing covered.

    Gains only fall, so a sample that leads with a fresh gain is the next one (Minoux 1978).
    """
    left = {int(place): set(candidates.token_ids[place]) for place in places}
    chosen: list[int] = []
    while len(chosen) < keep:
        covered: set[int] = set()
        heap = [(-len(tokens), place) for place, tokens in left.items()]  # upper bounds of gains
        heapq.heapify(heap)
        while heap and len(chosen) < keep:
            _, place = heapq.heappop(heap)
            gain = len(left[place] - covered)
            if heap and (-gain, place) > heap[0]:
                heapq.heappush(heap, (-gain, place))
                continue
            if gain == 0 and covered:
                break
            covered |= left.pop(place)
            chosen.append(place)
    return np.array(chosen, dtype=np.int64)


def nearest_to_centroids(
    candidates: Candidates, places: Places, keep: int, draws: np.random.Generator
) -> Places:
    """Keep the sample nearest to each of `keep` centroids, as COLA (arXiv 2510.10618) does.

    From the paper, its third stage: activations of the dense model are taken at every layer, pooled
    over tokens and projected at random; k-means makes as many clusters as samples to keep. Ours:
    states after each third of the layers, means over the scored tokens, each layer scaled to the
    same spread (`pipeline.scoring.mean_states`). COLA's first two stages, the choice of data sets
    and their processing, are the grid's.

    Raises:
        InputError: if fewer samples differ than are to be kept.
    """
    states = standardised(_states(candidates)[places])
    different = distinct_points(states)
    if different < keep:
        raise InputError(
            "drop_by",
            "cola",
            f"{keep} clusters need as many different samples, and only {different} of "
            f"{len(places)} differ: raise drop_fraction, or set drop_duplicates: true",
        )
    labels, distances = k_means(states, keep, draws)
    nearest_first = np.argsort(distances, kind="stable")
    _, first = np.unique(labels[nearest_first], return_index=True)
    return places[nearest_first[first]]


def least_repeated(
    candidates: Candidates, places: Places, keep: int, draws: np.random.Generator
) -> Places:
    """Keep what repeats the fewest 4-grams, over all perplexities, as IGSP (arXiv 2606.03328) does.

    From the paper's abstract: the aggregation of 4-grams is minimised and perplexity is balanced.
    Its text could not be read, so the rest is our reading: four parts of equal size, from low
    perplexity to high, lose equal shares; in each those go first of whose 4-grams the largest share
    occurs again, in the whole set or in the sample itself.
    """
    if candidates.perplexity is None:
        raise InputError("drop_by", "igsp", "the samples have no perplexity: score them")
    ascending = places[np.argsort(candidates.perplexity[places], kind="stable")]
    parts = np.array_split(ascending, PERPLEXITY_PARTS)
    counts = largest_remainders([len(part) for part in parts], keep)
    return np.concatenate(
        [
            part[np.lexsort((part, candidates.repeated[part]))[:count]]
            for part, count in zip(parts, counts, strict=True)
        ]
    )


RULES: dict[DropBy, Rule] = {
    "perplexity": lowest_perplexity,
    "random": at_random,
    "min-k-plus-plus": highest_min_k_plus_plus,
    "zipcal": most_distinct_tokens,
    "cola": nearest_to_centroids,
    "igsp": least_repeated,
}


def _states(candidates: Candidates) -> MeanStates:
    if candidates.hidden_states is None:
        raise InputError("hidden_states", None, "the samples have none: take them with the scores")
    return candidates.hidden_states
