"""How the next token is drawn: minimum length, repetition penalty, temperature, top-k, top-p,
inverse CDF.

Every sample has uniform numbers of its own, so what is drawn for it does not depend on the samples
that happen to share its batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class Sampling(NamedTuple):
    """How tokens are drawn; the fields mean what those of `GenerateSpec` do."""

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.2
    min_new_tokens: int = 0
    temperature_end: float | None = None
    temperature_tokens: int | None = None


class RepetitionPenalty:
    """Divide the positive and multiply the negative logits of tokens that a text already has.

    Formula of arXiv 1909.05858, section 4.1. The processor of transformers takes left padding for
    text, and so penalises EOS where that is the padding.

    Args:
        penalty: above 1 discourages repetition.
        padding: [samples], how many leading ids of each row are padding.
    """

    def __init__(self, penalty: float, padding: torch.Tensor) -> None:
        self.penalty = penalty
        self.padding = padding[:, None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Penalise `scores` [samples, vocabulary] for the texts `input_ids` [samples, length]."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = input_ids.gather(1, self.padding)
        present = torch.where(places < self.padding, first, input_ids)
        logits = scores.gather(1, present)
        penalised = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return scores.scatter(1, present, penalised)


class NoEnd:
    """Make a text go on: none of `ends` before it has `min_new_tokens` new ids.

    Args:
        prompt_length: ids of each row before the first step, padding included.
    """

    def __init__(self, ends: Sequence[int], min_new_tokens: int, prompt_length: int) -> None:
        self.ends = list(ends)
        self.length = prompt_length + min_new_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the ends of `scores` [samples, vocabulary] to -inf while `input_ids` are few."""
        if input_ids.shape[1] >= self.length:
            return scores
        ends = torch.tensor(self.ends, dtype=torch.int64, device=scores.device)
        return scores.index_fill(1, ends, -torch.inf)


class TemperatureSchedule:
    """Divide by a temperature that goes from one value to another in a straight line.

    Of new token i, from 0, it is start + (end - start) * min(1, i / steps) (arXiv 2410.17170).

    Args:
        steps: [samples], tokens after which a row is at the end value.
        prompt_length: ids of each row before the first step, padding included.
    """

    def __init__(self, start: float, end: float, steps: torch.Tensor, prompt_length: int) -> None:
        self.start = start
        self.end = end
        self.steps = steps
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Divide each row of `scores` [samples, vocabulary]."""
        step = input_ids.shape[1] - self.prompt_length
        share = (step / self.steps.clamp(min=1)).clamp(max=1.0)
        return scores / (self.start + (self.end - self.start) * share)[:, None]


class InverseCdf:
    """Leave only the token at which the cumulative probability passes a given uniform number.

    Tokens stand in the order of the vocabulary, so a logit's last bit hardly ever changes the draw.

    Args:
        uniforms: [samples, steps] float64 in [0, 1).
        prompt_length: ids of each row before the first step, padding included.
    """

    def __init__(self, uniforms: torch.Tensor, prompt_length: int) -> None:
        self.uniforms = uniforms
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Draw from softmax(`scores`) [samples, vocabulary]; all others become -inf."""
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        step = input_ids.shape[1] - self.prompt_length
        targets = self.uniforms[:, step, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, targets, right=True)
        drawn = drawn.clamp(max=scores.shape[1] - 1)  # past the end if the logits are NaN
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def uniform_numbers(seed: int, sample_ids: list[int], steps: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), each row fixed by the seed and its sample: [samples, steps]."""
    rows = [np.random.default_rng(_stream(seed, sample)).random(steps) for sample in sample_ids]
    return torch.from_numpy(np.stack(rows))


def request_seed(seed: int, sample_id: int) -> int:
    """A sample's own seed in [0, 2^63), for an engine that draws by itself."""
    return int(_stream(seed, sample_id).generate_state(1, np.uint64)[0] >> np.uint64(1))


def redraw_seed(seed: int, draw: int) -> int:
    """The seed in [0, 2^63) of a later draw of samples, numbered from 1."""
    # Two numbers in the spawn key: the stream of no sample, which has one.
    stream = np.random.SeedSequence(seed, spawn_key=(0, draw))
    return int(stream.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _stream(seed: int, sample_id: int) -> np.random.SeedSequence:
    # A spawn key, since the entropy [seed, 0] would repeat the stream that orders the documents.
    return np.random.SeedSequence(seed, spawn_key=(sample_id,))


def logits_processors(
    sampling: Sampling,
    padding: torch.Tensor,
    uniforms: torch.Tensor,
    prompt_length: int,
    ends: Sequence[int],
    seqlen: int,
) -> LogitsProcessorList:
    """The processors in the order in which they work; without the draws at temperature 0.

    `padding` is [samples], `uniforms` [samples, steps], both on the model's device.
    """
    processors = LogitsProcessorList([RepetitionPenalty(sampling.repetition_penalty, padding)])
    if sampling.min_new_tokens > 0:
        processors.append(NoEnd(ends, sampling.min_new_tokens, prompt_length))
    if sampling.temperature == 0:
        return processors
    if sampling.temperature_end is None:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    else:
        last = seqlen - (prompt_length - padding) - 1  # the number of a row's last new token
        tokens = sampling.temperature_tokens
        steps = last if tokens is None else torch.full_like(last, tokens)
        schedule = (sampling.temperature, sampling.temperature_end, steps, prompt_length)
        processors.append(TemperatureSchedule(*schedule))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(InverseCdf(uniforms, prompt_length))
    return processors
