"""Prefixes, which generated texts continue: the first few tokens of real texts."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from pipeline.data.corpora import documents_for
from pipeline.errors import InputError
from pipeline.models.chat import chat_ids, check_chat_template
from pipeline.specs import Corpus, CorpusMixture, GenerateSpec

PIECE_CHARACTERS = 32
"""Characters of a text that are tokenised first, for each token needed."""

EDGE_TOKENS = 16
"""Tokens at the end of a cut text that may differ from those of the whole text."""

CUT_CHARACTER = "\ufffd"
"""What the bytes of an incomplete character decode to."""


def read_prefixes(spec: GenerateSpec, tokenizer: Any) -> list[list[int]]:
    """Return the given ids of every sample.

    They are BOS, if the tokenizer adds it, and `prefix_tokens` tokens of a text; in a chat the
    whole prompt around these.

    Raises:
        InputError: if a source has too few texts of that many tokens, or if the tokenizer lacks
            what the prompt needs.
    """
    if spec.prefix_tokens == 0:
        return [[start_id(tokenizer)]] * spec.num_samples
    if spec.prompt == "chat":
        check_chat_template(tokenizer, "prompt", "chat")
    sources = prefix_sources(spec)
    corpora = prefix_corpora(spec)
    parts = {
        source: iter(_corpus_prefixes(corpora[source], count, spec, tokenizer))
        for source, count in Counter(sources).items()
    }
    return [next(parts[source]) for source in sources]


def _corpus_prefixes(
    corpus: Corpus, count: int, spec: GenerateSpec, tokenizer: Any
) -> list[list[int]]:
    texts = (row.text for row in documents_for(corpus, count, spec.seed))
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


def prefix_corpora(spec: GenerateSpec) -> dict[str | None, Corpus]:
    """Return the corpora of a mixture by name; a single corpus has the name None."""
    if isinstance(spec.prefixes, CorpusMixture):
        return {name: part.corpus for name, part in spec.prefixes.parts.items()}
    return {None: spec.prefixes}


def prefix_sources(spec: GenerateSpec) -> list[str | None]:
    """Return the name of each sample's corpus; None without a mixture or without a prefix."""
    if not isinstance(spec.prefixes, CorpusMixture) or spec.prefix_tokens == 0:
        return [None] * spec.num_samples
    return list(parts_in_turn(spec.prefixes, spec.num_samples))


def parts_in_turn(mixture: CorpusMixture, count: int) -> list[str]:
    """Return the name of the part that each of `count` texts is taken from."""
    names = sorted(mixture.parts)  # the key does not depend on their order, nor may this
    weights = [mixture.parts[name].weight for name in names]
    return [names[place] for place in turns(weights, count)]


def turns(weights: Sequence[float], count: int) -> list[int]:
    """Return which part has each of `count` turns.

    In the first n turns, for every n, a part with the share w has floor(w * n) or ceil(w * n): its
    turn c lies in [floor(c / w), ceil((c + 1) / w)), and of the parts that may have a turn the one
    whose interval ends first has it (Baruah et al., Proportionate progress, 1996).
    """
    written = [Fraction(str(weight)) for weight in weights]  # 0.3 is 3/10
    scale = math.lcm(*(weight.denominator for weight in written))
    shares = [int(weight * scale) for weight in written]
    whole = sum(shares)
    given = [0] * len(shares)
    chosen: list[int] = []
    for turn in range(count):
        due = [p for p, share in enumerate(shares) if given[p] * whole < share * (turn + 1)]
        first = min(due, key=lambda part: -(-(given[part] + 1) * whole // shares[part]))
        given[first] += 1
        chosen.append(first)
    return chosen


# ------------------------------------------------------------------------------------------ texts


def text_prefixes(texts: Iterable[str], tokenizer: Any, prefix_tokens: int) -> Iterator[list[int]]:
    """Yield BOS, if the tokenizer adds it, and the first ids of each text with enough tokens."""
    leading = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    for ids in _long_enough(texts, tokenizer, prefix_tokens):
        yield leading + ids


def chat_prompts(texts: Iterable[str], tokenizer: Any, prefix_tokens: int) -> Iterator[list[int]]:
    """Yield a chat up to its answer; the beginning of a text is the user's message."""
    for ids in _long_enough(texts, tokenizer, prefix_tokens):
        message = tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip(CUT_CHARACTER)
        yield chat_ids(tokenizer, message)


def _long_enough(texts: Iterable[str], tokenizer: Any, count: int) -> Iterator[list[int]]:
    for text in texts:
        ids = first_ids(text, tokenizer, count)
        if len(ids) == count:
            yield ids


def first_ids(text: str, tokenizer: Any, count: int) -> list[int]:
    """Return the first `count` ids of a text, or all if there are fewer.

    Only a piece of a long text is tokenised.
    """
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
    """Return whether the tokenizer itself begins a text with BOS."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    )


def start_id(tokenizer: Any) -> int:
    """Return the id that a text without a prefix begins with: BOS, else EOS.

    Raises:
        InputError: if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    remedy = "the tokenizer has neither BOS nor EOS to begin with: give at least one token"
    raise InputError("prefix_tokens", 0, remedy)
