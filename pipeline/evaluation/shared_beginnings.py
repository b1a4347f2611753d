"""Which requests share a beginning, and which go through the model together."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.models.positions import LengthDependence

FAMILY_TOKENS = 64
"""Documents that begin with this many tokens in common, mostly few-shot examples, share them."""

WORTHWHILE_TOKENS = 256
"""Tokens that are worth a forward pass; fewer are computed again, or padded."""

Fits = Callable[[Sequence["DocumentRequests"]], bool]
"""Whether the requests of some documents fit one forward pass."""


class ScoredRequest(NamedTuple):
    """Token ids, and how many of the last are scored."""

    ids: tuple[int, ...]
    scored: int

    @property
    def input(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return self.ids[:-1]

    @property
    def given(self) -> int:
        """Tokens before the one that predicts the first scored token."""
        return len(self.ids) - self.scored - 1

    def to_bytes(self) -> bytes:
        """Return all of it, for a hash."""
        return np.array([self.scored, *self.ids], dtype=np.int64).tobytes()


@dataclass
class DocumentRequests:
    """The requests of one document, and the beginning that they share."""

    requests: dict[int, ScoredRequest]
    """By number; all of one group of `positions`."""
    positions: LengthDependence
    rows: dict[tuple[int, ...], list[int]] = field(init=False)
    """What the model reads, and the numbers of the requests that it answers."""
    shared: int = field(init=False)
    """Tokens that all requests begin with and that predict no scored token."""
    longest: int = field(init=False)
    """Tokens that the model reads for the longest request."""

    def __post_init__(self) -> None:
        self.rows = defaultdict(list)
        for number, request in self.requests.items():
            self.rows[request.input].append(number)
        common = common_beginning(list(self.rows))
        self.longest = max(map(len, self.rows))
        shared = min(len(common), *(request.given for request in self.requests.values()))
        self.shared = shared if self.positions.group(shared) == self.group else 0

    @property
    def group(self) -> Hashable:
        """Equal for documents that are read with the same positions."""
        return self.positions.group(self.longest)


class Batch(NamedTuple):
    """Documents for one forward pass over their shared beginnings and one over the rest."""

    documents: list[DocumentRequests]
    family: tuple[int, ...]
    """Tokens that all documents of a family begin with."""
    shared: int
    """Tokens of each document that are computed once for its requests, the family's included."""

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """What the model reads, document by document."""
        return [row for document in self.documents for row in document.rows]

    @property
    def is_worth_sharing(self) -> bool:
        """Whether the documents' beginnings save more tokens than a forward pass costs."""
        saved_rows = len(self.rows) - len(self.documents)
        return saved_rows * (self.shared - len(self.family)) > WORTHWHILE_TOKENS


def request_batches(
    documents: list[DocumentRequests], positions: LengthDependence, fits: Fits, shares: bool
) -> Iterator[Batch]:
    """Batch documents of one family and group, long ones first.

    Args:
        positions: the model's.
        shares: whether the model can continue a beginning that several documents share.
    """
    heads = [(_head(document), document.group) for document in documents]
    frequent = Counter(heads)
    families: dict[tuple[tuple[int, ...], Hashable], list[DocumentRequests]] = defaultdict(list)
    for (head, group), document in zip(heads, documents, strict=True):
        known = shares and frequent[head, group] > 1
        families[head if known else (), group].append(document)
    for (head, group), members in families.items():
        common = common_beginning([next(iter(one.rows)) for one in members]) if head else ()
        family = common[: min(one.shared for one in members)]
        if positions.group(len(family)) != group:
            family = ()
        several = [document for document in members if len(document.rows) > 1]
        single = [document for document in members if len(document.rows) == 1]
        several.sort(key=lambda document: (-document.shared, -document.longest))
        single.sort(key=lambda document: -document.longest)
        for part in _of_similar_length(several, fits, lambda document: document.shared):
            shared = min(document.shared for document in part)
            yield Batch(part, family, shared)
        for part in _of_similar_length(single, fits, lambda document: document.longest):
            yield Batch(part, family, len(family))


def chunked_batches(batches: Iterable[Batch], requests: float) -> Iterator[list[Batch]]:
    """Group batches, in their order, until each group has at least so many requests."""
    chunk: list[Batch] = []
    count = 0
    for batch in batches:
        chunk.append(batch)
        count += sum(len(document.requests) for document in batch.documents)
        if count >= requests:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk


def common_beginning(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return what all rows begin with: what the first and the last in order share."""
    first, last = min(rows), max(rows)
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return first[:place]
    return first


def _head(document: DocumentRequests) -> tuple[int, ...]:
    """Return the tokens that name a document's family; none if it shares too few."""
    if document.shared < FAMILY_TOKENS:
        return ()
    return next(iter(document.rows))[:FAMILY_TOKENS]


def _of_similar_length(
    documents: Sequence[DocumentRequests],
    fits: Fits,
    length: Callable[[DocumentRequests], int],
) -> Iterator[list[DocumentRequests]]:
    """Cut documents, which descend by length, into parts that fit and differ little."""
    part: list[DocumentRequests] = []
    for document in documents:
        if part:
            rows = sum(len(one.rows) for one in part)
            wasted = rows * (length(part[0]) - length(document))
            if wasted > WORTHWHILE_TOKENS or not fits([*part, document]):
                yield part
                part = []
        part.append(document)
    if part:
        yield part
