"""What a generated text goes on from: the first few tokens of real texts."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

from pipeline.data.corpora import documents
from pipeline.errors import InputError
from pipeline.models.chat import chat_ids, check_chat_template
from pipeline.specs import Corpus, CorpusMixture, GenerateSpec, TestbedCorpus

TESTBED_TEXTS_PER_PREFIX = 1000
"""Where the endless testbed is given up as too short."""

PIECE_CHARACTERS = 32
"""Characters of a text that are tokenised at first, for each token needed."""

EDGE_TOKENS = 16
"""Tokens at the end of a cut text that may differ from those of the whole text."""

CUT_CHARACTER = "\ufffd"
"""What a character decodes to of which not all bytes are there."""


def read_prefixes(spec: GenerateSpec, tokenizer: Any) -> list[list[int]]:
    """The given ids of every sample: BOS if the tokenizer adds it, then `prefix_tokens` of a text;
    of a chat the whole prompt around these.

    Raises:
        InputError: if a source has too few texts of that many tokens, or if the tokenizer lacks
            what the prompt needs.
    """
    if spec.prefix_tokens == 0:
        return [[start_id(tokenizer)]] * spec.num_samples
    if spec.prompt == "chat":
        check_chat_template(tokenizer, "prompt", "chat")
    names = sources(spec)
    counts = Counter(names)
    parts = {
        name: iter(_prefixes_of(corpora(spec)[name], count, spec, tokenizer))
        for name, count in counts.items()
    }
    return [next(parts[name]) for name in names]


def _prefixes_of(corpus: Corpus, count: int, spec: GenerateSpec, tokenizer: Any) -> list[list[int]]:
    rows = documents(corpus, spec.seed)
    if isinstance(corpus, TestbedCorpus):
        rows = itertools.islice(rows, TESTBED_TEXTS_PER_PREFIX * count)
    texts = (row.text for row in rows)
    make = text_prefixes if spec.prompt == "raw" else chat_prompts
    found = list(itertools.islice(make(texts, tokenizer, spec.prefix_tokens), count))
    if len(found) < count:
        remedy = (
            f"{count} texts of at least {spec.prefix_tokens} tokens are needed, {len(found)} were "
            "found: lower num_samples or prefix_tokens, or give more text"
        )
        raise InputError("prefixes", corpus.model_dump(exclude_none=True), remedy)
    return found


# ---------------------------------------------------------------------------------------- sources


def corpora(spec: GenerateSpec) -> dict[str | None, Corpus]:
    """The corpora of a mixture by name; one that is not mixed has none."""
    if isinstance(spec.prefixes, CorpusMixture):
        return {name: part.corpus for name, part in spec.prefixes.parts.items()}
    return {None: spec.prefixes}


def sources(spec: GenerateSpec) -> list[str | None]:
    """The name in the mixture of each sample's corpus; None without a mixture, or a prefix."""
    if not isinstance(spec.prefixes, CorpusMixture) or spec.prefix_tokens == 0:
        return [None] * spec.num_samples
    return list(parts_in_turn(spec.prefixes, spec.num_samples))


def parts_in_turn(mixture: CorpusMixture, count: int) -> list[str]:
    """The name of the part that each of `count` texts is taken from."""
    names = sorted(mixture.parts)  # as in the key, which knows no order of them
    weights = tuple(mixture.parts[name].weight for name in names)
    return [names[place] for place in turns(weights, count)]


@functools.lru_cache(maxsize=64)
def turns(weights: tuple[float, ...], count: int) -> tuple[int, ...]:
    """Which of the parts comes at each of `count` turns.

    Of the first n turns, for every n, a part with the share w gets floor(w * n) or ceil(w * n):
    the c-th of its turns lies in [floor(c / w), ceil((c + 1) / w)), and of those that may come the
    one comes whose interval ends first (Baruah et al., Proportionate progress, 1996).
    """
    written = [Fraction(str(weight)) for weight in weights]  # 0.3 is 3/10
    scale = math.lcm(*(weight.denominator for weight in written))
    shares = [int(weight * scale) for weight in written]
    whole = sum(shares)
    given = [0] * len(shares)
    chosen = []
    for turn in range(count):
        due = [p for p, share in enumerate(shares) if given[p] * whole < share * (turn + 1)]
        first = min(due, key=lambda part: -(-(given[part] + 1) * whole // shares[part]))
        given[first] += 1
        chosen.append(first)
    return tuple(chosen)


# ------------------------------------------------------------------------------------------ texts


def text_prefixes(texts: Iterable[str], tokenizer: Any, prefix_tokens: int) -> Iterator[list[int]]:
    """BOS, if the tokenizer adds it, and the first ids of each text that has enough of them."""
    leading = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    for ids in _long_enough(texts, tokenizer, prefix_tokens):
        yield leading + ids


def chat_prompts(texts: Iterable[str], tokenizer: Any, prefix_tokens: int) -> Iterator[list[int]]:
    """A chat up to its answer, with the beginning of each such text as the user's message."""
    for ids in _long_enough(texts, tokenizer, prefix_tokens):
        message = tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip(CUT_CHARACTER)
        yield chat_ids(tokenizer, message)


def _long_enough(texts: Iterable[str], tokenizer: Any, count: int) -> Iterator[list[int]]:
    for text in texts:
        ids = first_ids(text, tokenizer, count)
        if len(ids) == count:
            yield ids


def first_ids(text: str, tokenizer: Any, count: int) -> list[int]:
    """The first `count` ids of a text, fewer if it has fewer, without tokenising all of it."""
    needed = count + EDGE_TOKENS
    characters = PIECE_CHARACTERS * needed
    while True:
        ids: list[int] = tokenizer(text[:characters], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        if len(ids) >= needed or characters >= len(text):
            return ids[:count]
        characters *= 2


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with BOS."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    )


def start_id(tokenizer: Any) -> int:
    """The id that a text without a prefix begins with: BOS, or EOS for want of it.

    Raises:
        InputError: if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    remedy = "the tokenizer has neither BOS nor EOS to begin with: give at least one token"
    raise InputError("prefix_tokens", 0, remedy)
