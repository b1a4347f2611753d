"""Perplexity on a corpus, by a protocol that fixes all that changes the number."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import InputError, NonFiniteError
from pipeline.models.batching import length_batches
from pipeline.models.output_layer import MOST_NATS, OutputLayer, joined
from pipeline.models.positions import NONE, LengthDependence
from pipeline.specs import PerplexityProtocol

LOGITS = 2**28
"""At most this many logits per forward pass (half a GiB in bfloat16), unless one window has more.
There is no limit if the output layer gives them in parts."""

TEXTS = 32
"""Texts per call of the tokenizer."""

CONTEXT_TOKENS = 8
"""Tokens that are decoded before another one: more than a character has bytes."""


class Encoded(NamedTuple):
    """Tokens, and the words and bytes that each one ends; special tokens end none."""

    ids: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]


class ScoredWindow(NamedTuple):
    """Tokens for one row of a forward pass, and those of them that are scored."""

    ids: npt.NDArray[np.int64]
    first: int
    """Place of the first scored token; all after it are scored."""
    words: int
    """Words that the scored tokens end."""
    bytes: int
    """UTF-8 bytes that the scored tokens end."""

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.first


class Measured(NamedTuple):
    """A number, its standard error over windows or texts, and how many these are."""

    value: float
    stderr: float | None
    windows: int


# ---------------------------------------------------------------------------------------- windows


def protocol_windows(
    texts: Iterable[str], tokenizer: Any, protocol: PerplexityProtocol
) -> list[ScoredWindow]:
    """Return the windows of a corpus that a protocol measures.

    Args:
        texts: all texts of the corpus, blank ones included if they are joined.

    Raises:
        InputError: if there is no window, or no token for BOS.
    """
    texts = itertools.islice(texts, protocol.texts)
    if protocol.joined_by is not None:
        texts = iter([protocol.joined_by.join(texts)])
    encoded = encoded_texts(texts, tokenizer, special_tokens=protocol.bos == "text")
    before = [_bos(tokenizer)] if protocol.bos == "window" else []
    if protocol.unit == "text":
        windows = (
            _window(before, text, 0, min(len(text.ids), protocol.longest_text), 0)
            for text in encoded
            if len(before) + len(text.ids) > 1
        )
        found = list(itertools.islice(windows, protocol.max_windows))
    else:
        found = _joined_windows(encoded, before, protocol)
    if not found:
        raise InputError("corpus", None, "holds no text of two tokens")
    return found


def _joined_windows(
    encoded: Iterable[Encoded], before: list[int], protocol: PerplexityProtocol
) -> list[ScoredWindow]:
    length = protocol.longest_text
    stride = protocol.stride or length
    limit = protocol.max_windows
    needed = None if limit is None else length + (limit - 1) * stride
    joined = _joined(encoded, needed)
    count = (len(joined.ids) - length) // stride + 1
    if len(joined.ids) < length:
        remedy = f"the corpus has {len(joined.ids)} tokens, less than one window: lower seqlen"
        raise InputError("seqlen", protocol.seqlen, remedy)
    starts = range(0, (count if limit is None else min(count, limit)) * stride, stride)
    return [
        _window(before, joined, start, length, 0 if start == 0 else length - stride)
        for start in starts
    ]


def _window(
    before: list[int], text: Encoded, start: int, length: int, unscored: int
) -> ScoredWindow:
    """Return `length` tokens from `start`, of which the window before scored `unscored`."""
    end = start + length
    first = max(1, len(before) + unscored)  # the first token is not predicted
    inside = slice(start + first - len(before), end)
    return ScoredWindow(
        np.concatenate([before, text.ids[start:end]]).astype(np.int64),
        first,
        int(text.words[inside].sum()),
        int(text.bytes[inside].sum()),
    )


def _joined(encoded: Iterable[Encoded], needed: int | None) -> Encoded:
    """Join texts until there are as many tokens as needed."""
    parts: list[Encoded] = []
    tokens = 0
    for part in encoded:
        parts.append(part)
        tokens += len(part.ids)
        if needed is not None and tokens >= needed:
            break
    empty = np.empty(0, dtype=np.int64)
    return Encoded(
        np.concatenate([empty, *(part.ids for part in parts)]),
        np.concatenate([empty, *(part.words for part in parts)]),
        np.concatenate([empty, *(part.bytes for part in parts)]),
    )


def encoded_texts(
    texts: Iterable[str], tokenizer: Any, *, special_tokens: bool
) -> Iterator[Encoded]:
    """Yield the tokens of each text, and the words and bytes that they end.

    A token that ends inside a character counts the whole character; without a fast tokenizer the
    token that completes it does.

    Raises:
        InputError: if a tokenizer without a fast version does not decode a text exactly.
    """
    texts = iter(texts)
    while batch := list(itertools.islice(texts, TEXTS)):
        encoded = tokenizer(
            batch,
            add_special_tokens=special_tokens,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
        if tokenizer.is_fast:
            found = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
        else:
            pairs = zip(batch, encoded["input_ids"], strict=True)
            found = [_ends_by_decoding(text, ids, tokenizer) for text, ids in pairs]
        for text, ids, places in zip(batch, encoded["input_ids"], found, strict=True):
            ends = np.array(places, dtype=np.int64)
            ends = np.maximum.accumulate(ends) if len(ends) else ends
            yield Encoded(
                np.array(ids, dtype=np.int64),
                np.diff(_words_until(text)[ends], prepend=0),
                np.diff(_bytes_until(text)[ends], prepend=0),
            )


def _ends_by_decoding(text: str, ids: list[int], tokenizer: Any) -> list[int]:
    """Return the number of characters up to the end of each token, found by decoding.

    Tokens are decoded one after the other, each with a few before it, as an engine streams text.
    White space that decoding changes belongs to the token after it. Tokens that the tokenizer puts
    around the text end nothing.
    """
    inside = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    length = len(inside)
    begin = next((at for at in range(len(ids)) if ids[at : at + length] == inside), None)
    ends: list[int] = []
    place = start = 0
    before, is_whole = "", True
    for number in range(length if begin is not None else 0):
        if is_whole and number - start > 2 * CONTEXT_TOKENS:
            start = number - CONTEXT_TOKENS
            before = _decoded(inside[start:number], tokenizer)
        after = _decoded(inside[start : number + 1], tokenizer)
        fresh = after[len(before) :] if after.startswith(before) else ""
        is_whole = not fresh.endswith("\ufffd") or text.startswith(fresh, place)
        if is_whole:  # it does not end inside a character
            place = _matched(text, place, fresh)
            before = after
        ends.append(place)
    rest = text[place:].strip()
    if begin is None or rest:
        remedy = f"has no fast version and loses {rest[:20]!r}: its bytes cannot be counted"
        raise InputError("tokenizer", type(tokenizer).__name__, remedy)
    if ends:
        ends[-1] = len(text)
    return [0] * begin + ends + [len(text)] * (len(ids) - begin - length)


def _decoded(ids: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def _matched(text: str, place: int, fresh: str) -> int:
    """Return where `fresh` ends if it stands at a place of the text, else that place.

    White space may differ.
    """
    at = place
    for character in fresh:
        if not character.isspace():
            while text[at : at + 1].isspace():
                at += 1
            if text[at : at + 1] != character:
                return place
        at += text[at : at + 1] == character
    return at


def _words_until(text: str) -> npt.NDArray[np.int64]:
    """Return, for each number of characters, the words that begin among them."""
    begun = np.zeros(len(text) + 1, dtype=np.int64)
    for word in re.finditer(r"\S+", text):
        begun[word.start() + 1] = 1
    return np.cumsum(begun)


def _bytes_until(text: str) -> npt.NDArray[np.int64]:
    """Return, for each number of characters, their bytes."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000).astype(np.int64)
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _bos(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("bos", "window", "the tokenizer has neither BOS nor EOS: take bos: none")


# ----------------------------------------------------------------------------------------- losses


def batches(
    windows: list[ScoredWindow],
    tokens: int,
    vocabulary: int | None,
    positions: LengthDependence = NONE,
) -> Iterator[list[int]]:
    """Yield the places of windows that go through the model together, long ones first.

    Args:
        tokens: at most this many per batch, padding included, but at least one window.
        vocabulary: logits per token of a forward pass, for `LOGITS`; None if it gives none.
        positions: the model's; windows of a batch are of one group.
    """
    lengths = [len(window.ids) for window in windows]
    ordered = sorted(range(len(windows)), key=lambda place: -lengths[place])
    limit = tokens if vocabulary is None else min(tokens, LOGITS // vocabulary)
    return length_batches(ordered, lengths, limit, positions)


@torch.inference_mode()
def losses(layer: OutputLayer, batched: Sequence[list[ScoredWindow]]) -> Iterator[list[float]]:
    """Yield for each batch the loss of each window in nats, summed over its scored tokens.

    It is taken in float32 and summed in float64.
    """
    for batch, scored in zip(batched, scored_logits(layer, batched), strict=True):
        parts = itertools.starmap(_part_losses, scored)
        (found,) = joined(parts, sum(window.scored for window in batch))
        yield summed_by_window(found, batch)


def _part_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.nn.functional.cross_entropy(logits, targets, reduction="none"),)


ScoredLogits = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Logits `[part, vocabulary]` in float32, which the caller may overwrite, and the token ids
`[part]` that they predict, window by window."""


def scored_logits(
    layer: OutputLayer, batched: Sequence[list[ScoredWindow]]
) -> Iterator[ScoredLogits]:
    """Yield for each batch the logits that predict the scored tokens, and these tokens, in parts.

    Shorter windows are padded on the right. Equal vocabularies give equal parts.
    """
    states = layer.states({"input_ids": _padded(batch)} for batch in batched)
    for batch, own in zip(batched, states, strict=True):
        yield _parts(layer, own, batch)


def _padded(batch: list[ScoredWindow]) -> torch.Tensor:
    """Return token ids `[windows, tokens]`."""
    token_ids = torch.zeros(len(batch), max(len(window.ids) for window in batch), dtype=torch.int64)
    for row, window in enumerate(batch):
        token_ids[row, : len(window.ids)] = torch.from_numpy(window.ids)
    return token_ids


def _parts(layer: OutputLayer, states: torch.Tensor, batch: list[ScoredWindow]) -> ScoredLogits:
    token_ids = _padded(batch)
    scored = torch.zeros_like(token_ids, dtype=torch.bool)
    for row, window in enumerate(batch):
        scored[row, window.first : len(window.ids)] = True
    rows, columns = scored.nonzero(as_tuple=True)
    targets = token_ids[scored].to(states.device)
    for part, logits in layer.logits(states, rows, columns - 1):
        yield logits, targets[part]
        del logits  # before the next ones are made


def summed_by_window(values: torch.Tensor, batch: list[ScoredWindow]) -> list[float]:
    """Return the sum in float64 of each window's values; `values` has one per scored token."""
    each = torch.split(values.cpu().double(), [window.scored for window in batch])
    return [float(own.sum()) for own in each]


# ---------------------------------------------------------------------------------------- numbers


def perplexity(
    windows: list[ScoredWindow], summed: list[float], protocol: PerplexityProtocol
) -> Measured:
    """Return the perplexity of windows by a protocol.

    The standard error is that of the mean loss times the perplexity (delta method); None for one
    window.

    Args:
        summed: the summed loss of each window, in nats.

    Raises:
        NonFiniteError: if a loss is too large for a perplexity in float64.
    """
    if protocol.unit == "text":
        own = _exp(np.array(summed) / [window.scored for window in windows])
        error = None if len(own) == 1 else float(own.std(ddof=1)) / math.sqrt(len(own))
        return Measured(float(own.mean()), error, len(own))
    sizes: dict[str, Callable[[ScoredWindow], int]] = {
        "token": lambda window: window.scored,
        "word": lambda window: window.words,
        "byte": lambda window: window.bytes,
    }
    mean, error = _ratio(summed, [sizes[protocol.normalisation](window) for window in windows])
    value = float(_exp(np.array(mean)))
    return Measured(value, None if error is None else value * error, len(windows))


def _exp(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    highest = float(losses.max())
    if not highest < MOST_NATS:
        remedy = "no perplexity in float64: the model is broken"
        raise NonFiniteError(f"a loss of {highest:g} nats has {remedy}")
    exponentials: npt.NDArray[np.float64] = np.exp(losses)
    return exponentials


def bits_per_byte(windows: list[ScoredWindow], summed: list[float]) -> Measured:
    """Return the loss in bits per byte of the text, comparable between tokenizers that lose
    nothing of a text."""
    mean, error = _ratio(summed, [window.bytes for window in windows])
    return Measured(
        mean / math.log(2), None if error is None else error / math.log(2), len(windows)
    )


def per_token(windows: list[ScoredWindow], summed: list[float]) -> Measured:
    """Return the mean over scored tokens of what is summed by window."""
    mean, error = _ratio(summed, [window.scored for window in windows])
    return Measured(mean, error, len(windows))


def _ratio(summed: list[float], sizes: list[int]) -> tuple[float, float | None]:
    """Return the ratio of two sums and its standard error as a ratio estimator.

    If all sizes are equal, it is the standard error of a mean.

    Raises:
        InputError: if all sizes are 0.
    """
    losses, weights = np.array(summed), np.array(sizes, dtype=np.float64)
    if not weights.any():
        raise InputError("corpus", None, "its scored tokens end no word and no byte: take another")
    ratio = float(losses.sum() / weights.sum())
    count = len(losses)
    if count == 1:
        return ratio, None
    deviations = losses - ratio * weights
    error = math.sqrt(count / (count - 1) * float(deviations @ deviations)) / float(weights.sum())
    return ratio, error
