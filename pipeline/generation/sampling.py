"""How the next token is drawn: repetition penalty, minimum length, temperature, top-k, top-p,
inverse CDF.

Every sample has its own uniform numbers, so the draw does not depend on the other samples of its
batch.

Passes over the whole vocabulary are slow: with 49,152 tokens a sort of it takes as long as the
model's forward pass on a CPU. So what follows top-k sees only the tokens that it kept, and the
processors change the scores in place; `generate` hands them a copy of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessorList, TopPLogitsWarper

VECTOR_WIDTH = 64
"""A multiple of the numbers that any processor adds up side by side."""


class Sampling(NamedTuple):
    """How tokens are drawn; the fields are those of `GenerateSpec`."""

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.2
    min_new_tokens: int = 0
    temperature_end: float | None = None
    temperature_tokens: int | None = None


class KnownTokens:
    """Rule out ids that the tokenizer lacks: rows that only pad the embedding matrix.

    Args:
        known: the tokenizer's ids.
    """

    def __init__(self, known: Sequence[int]) -> None:
        self.known = torch.tensor(known)
        self.unknown: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the unknown ids of `scores` [samples, vocabulary] to -inf, in place."""
        if self.unknown is None:
            every = torch.arange(scores.shape[1])
            self.unknown = every[~torch.isin(every, self.known)].to(scores.device)
        return scores.index_fill_(1, self.unknown, -torch.inf)


class RepetitionPenalty:
    """Divide the positive and multiply the negative logits of tokens that a text already has.

    Formula of arXiv 1909.05858, section 4.1; in place, unlike the processor of transformers.

    Args:
        penalty: above 1 discourages repetition.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Penalise `scores` [samples, vocabulary] in place for `input_ids` [samples, length]."""
        logits = scores.gather(1, input_ids)
        penalised = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return scores.scatter_(1, input_ids, penalised)


class MinNewTokens:
    """Rule out `ends` until a text has `min_new_tokens` new ids.

    Args:
        prompt_length: ids of each row before the first step.
    """

    def __init__(self, ends: Sequence[int], min_new_tokens: int, prompt_length: int) -> None:
        self.ends = list(ends)
        self.length = prompt_length + min_new_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the ends of `scores` [samples, vocabulary] to -inf, in place, in short texts."""
        if input_ids.shape[1] >= self.length:
            return scores
        ends = torch.tensor(self.ends, dtype=torch.int64, device=scores.device)
        return scores.index_fill_(1, ends, -torch.inf)


class Temperature:
    """Divide by a temperature, which may go from one value to another in a straight line.

    For new token i, from 0, it is start + (end - start) * min(1, i / steps) (arXiv 2410.17170).

    Args:
        end: the last value; None keeps the first.
        steps: tokens after which the last value is reached.
        prompt_length: ids of each row before the first step.
    """

    def __init__(self, start: float, end: float | None, steps: int, prompt_length: int) -> None:
        self.start = start
        self.end = start if end is None else end
        self.steps = steps
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Divide `scores` [samples, vocabulary] in place."""
        step = input_ids.shape[1] - self.prompt_length
        share = min(1.0, step / max(1, self.steps))
        return scores.div_(self.start + (self.end - self.start) * share)


class Draw:
    """Leave only the token that is drawn from what top-k and then top-p keep.

    It is the token at which the cumulative probability passes a given uniform number. Tokens stand
    in the order of the vocabulary, so a logit's last bit hardly ever changes the draw.

    Args:
        top_k: keep this many of the likeliest tokens and all that tie with the last of them; 0
            keeps all.
        top_p: of these keep the fewest that hold this probability, likeliest first; 1 keeps all.
        uniforms: [samples, steps] float64 in [0, 1).
        prompt_length: ids of each row before the first step.
    """

    def __init__(
        self, top_k: int, top_p: float, uniforms: torch.Tensor, prompt_length: int
    ) -> None:
        self.top_k = top_k
        self.top_p = top_p
        self.uniforms = uniforms
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Draw from softmax(`scores`) [samples, vocabulary]; all others become -inf, in place."""
        tokens, logits = top_k_logits(scores, self.top_k)
        if self.top_p < 1:
            logits = self._nucleus(tokens, logits, scores.shape[1])
        cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
        step = input_ids.shape[1] - self.prompt_length
        targets = self.uniforms[:, step, None] * cumulative[:, -1:]
        places = torch.searchsorted(cumulative, targets, right=True)
        places = places.clamp(max=logits.shape[1] - 1)  # a product may round to the whole sum
        return scores.fill_(-torch.inf).scatter_(1, tokens.gather(1, places), 0.0)

    def _nucleus(self, tokens: torch.Tensor, logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
        kept, tied = nucleus(logits, self.top_p)
        if len(tied) and logits.shape[1] < vocabulary:
            ids, tied_logits = tokens[tied], logits[tied]
            whole, _ = nucleus(scatter_logits(ids, tied_logits, vocabulary), self.top_p)
            kept[tied] = whole.gather(1, ids).masked_fill(tied_logits == -torch.inf, -torch.inf)
        return kept


def top_k_logits(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that top-k keeps of `scores` [samples, vocabulary], and their logits.

    Both are [samples, width], in the order of the vocabulary. Rows that keep fewer tokens than
    others end with the vocabulary's last token at -inf. `top_k: 0` keeps all tokens.
    """
    samples, vocabulary = scores.shape
    everything = torch.arange(vocabulary, device=scores.device).expand(samples, -1)
    if not 0 < top_k < vocabulary:
        return everything, scores
    least = scores.topk(top_k).values[:, -1:]
    kept = (scores < least).logical_not_()  # all that tie with the last one, and NaN
    counts = kept.sum(dim=1)
    width = int(counts.max()) + 1
    # A sum over this many columns has the last bits of a sum over the whole vocabulary.
    width += (vocabulary - width) % VECTOR_WIDTH
    if width >= vocabulary:
        return everything, scores.masked_fill(~kept, -torch.inf)
    rows, ids = kept.nonzero(as_tuple=True)
    columns = torch.arange(len(rows), device=scores.device) - (counts.cumsum(0) - counts)[rows]
    tokens = torch.full((samples, width), vocabulary - 1, device=scores.device)
    logits = scores.new_full((samples, width), -torch.inf)
    tokens[rows, columns] = ids
    logits[rows, columns] = scores[rows, ids]
    return tokens, logits


def nucleus(logits: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `logits` [samples, width] with -inf where top-p drops a token, and the tied rows.

    In a tied row top-p keeps some and drops others of equal logits. Which ones depends on how the
    sort orders equal values, and so on how many it sorts: repeat it with the whole vocabulary.
    """
    kept: torch.Tensor = TopPLogitsWarper(top_p)(None, logits)
    dropped = kept == -torch.inf
    lowest_kept = kept.masked_fill(dropped, torch.inf).amin(dim=1)
    highest_dropped = logits.masked_fill(~dropped, -torch.inf).amax(dim=1)
    return kept, (lowest_kept == highest_dropped).nonzero().squeeze(1)


def scatter_logits(tokens: torch.Tensor, logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return scores [samples, vocabulary] with `logits` at `tokens` and -inf elsewhere."""
    scores = logits.new_full((len(logits), vocabulary), -torch.inf)
    # The last token may stand there twice, once to fill the row at -inf.
    return scores.scatter_reduce_(1, tokens, logits, "amax")


def uniform_numbers(seed: int, sample_ids: list[int], steps: int) -> torch.Tensor:
    """Return uniform numbers in [0, 1), [samples, steps]; seed and sample fix each row."""
    rows = [np.random.default_rng(_stream(seed, sample)).random(steps) for sample in sample_ids]
    return torch.from_numpy(np.stack(rows))


def request_seed(seed: int, sample_id: int) -> int:
    """Return a sample's own seed in [0, 2^63), for an engine that draws by itself."""
    return int(_stream(seed, sample_id).generate_state(1, np.uint64)[0] >> np.uint64(1))


def redraw_seed(seed: int, draw: int) -> int:
    """Return the seed in [0, 2^63) of a later draw of samples, numbered from 1."""
    # Two numbers in the spawn key: a sample's stream has one, so this is no sample's.
    stream = np.random.SeedSequence(seed, spawn_key=(0, draw))
    return int(stream.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _stream(seed: int, sample_id: int) -> np.random.SeedSequence:
    # A spawn key, since the entropy [seed, 0] would repeat the stream that orders the documents.
    return np.random.SeedSequence(seed, spawn_key=(sample_id,))


def logits_processors(
    sampling: Sampling,
    uniforms: torch.Tensor,
    prompt_length: int,
    *,
    known: Sequence[int],
    ends: Sequence[int],
    seqlen: int,
) -> LogitsProcessorList:
    """Return the processors in the order in which they work; at temperature 0 without the draw.

    `uniforms` is [samples, steps], on the model's device; `known` are the tokenizer's ids.
    """
    processors = LogitsProcessorList(
        [KnownTokens(known), RepetitionPenalty(sampling.repetition_penalty)]
    )
    if sampling.min_new_tokens > 0:
        processors.append(MinNewTokens(ends, sampling.min_new_tokens, prompt_length))
    if sampling.temperature == 0:
        return processors
    tokens = sampling.temperature_tokens
    steps = seqlen - prompt_length - 1 if tokens is None else tokens
    schedule = (sampling.temperature, sampling.temperature_end, steps, prompt_length)
    processors.append(Temperature(*schedule))
    processors.append(Draw(sampling.top_k, sampling.top_p, uniforms, prompt_length))
    return processors
