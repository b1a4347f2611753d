"""The draw from the tokens of top-k, against transformers' warpers over the whole vocabulary."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipeline.generation.sampling import Draw, Sampling, logits_processors, top_k_logits

ROWS, PROMPT, STEPS = 12, 3, 6


def wide_draw(
    scores: torch.Tensor, temperature: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor
) -> list[int]:
    """Apply transformers' warpers to all tokens, then the inverse CDF in the vocabulary's order.

    `scores` [rows, vocabulary] are those after the penalty, `temperature` and `uniforms` [rows].
    """
    if bool((temperature == temperature[0]).all()):
        scores = TemperatureLogitsWarper(float(temperature[0]))(None, scores)
    else:
        scores = scores / temperature.float()[:, None]
    if sampling.top_k > 0:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return drawn.clamp(max=scores.shape[1] - 1)[:, 0].tolist()


def made(
    sampling: Sampling, uniforms: torch.Tensor, vocabulary: int, ends: Sequence[int] = ()
) -> Any:
    """Return our processors for a tokenizer without gaps in its ids."""
    return logits_processors(
        sampling,
        uniforms,
        PROMPT,
        known=range(vocabulary),
        ends=ends,
        seqlen=PROMPT + STEPS,
    )


def narrow_draw(
    scores: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor, step: int = 0
) -> list[int]:
    """Return what `generate` takes after our processors, at the step of `uniforms` [rows]."""
    every = torch.rand(len(scores), STEPS, dtype=torch.float64)
    every[:, step] = uniforms
    processors = made(sampling, every, scores.shape[1])
    texts = torch.zeros(len(scores), PROMPT + step, dtype=torch.int64)
    return processors(texts, scores.clone()).argmax(dim=-1).tolist()


def random_logits(generator: torch.Generator, vocabulary: int, kind: str) -> torch.Tensor:
    """[ROWS, vocabulary] float32; a language model's logits in `bfloat16` tie often."""
    logits = torch.randn(ROWS, vocabulary, generator=generator) * 3
    if kind == "coarse":
        return logits.round()
    if kind == "bfloat16":
        return (logits + 12).bfloat16().float()
    if kind == "flat":
        return torch.zeros(ROWS, vocabulary)
    if kind == "few finite":
        dropped = torch.rand(logits.shape, generator=generator) < 0.97
        dropped[:, -1] = False
        return logits.masked_fill(dropped, -torch.inf)
    return logits


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from([2, 63, 64, 65, 300, 1000, 4999]),
    kind=st.sampled_from(["float32", "coarse", "bfloat16", "flat", "few finite"]),
    temperature=st.sampled_from([0.01, 0.6, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 2, 50, 63, 64, 290, 10_000]),
    top_p=st.sampled_from([0.001, 0.5, 0.9, 0.95, 0.999999, 1.0]),
)
def test_the_same_tokens_are_drawn_as_over_the_whole_vocabulary(
    seed: int, vocabulary: int, kind: str, temperature: float, top_k: int, top_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = random_logits(generator, vocabulary, kind)
    uniforms = torch.rand(ROWS, dtype=torch.float64, generator=generator)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty=1.0)
    expected = wide_draw(scores, torch.full((ROWS,), temperature), sampling, uniforms)
    assert narrow_draw(scores, sampling, uniforms) == expected


@pytest.mark.parametrize("kind", ["float32", "coarse", "bfloat16"])
def test_every_uniform_number_draws_the_same_token(kind: str) -> None:
    """The whole distribution of one row, at a real vocabulary's size."""
    row = random_logits(torch.Generator().manual_seed(1), 50_000, kind)[:1]
    scores = row.expand(64, -1)
    uniforms = torch.linspace(0, 1 - 2**-53, 64, dtype=torch.float64)
    expected = wide_draw(scores, torch.full((64,), 0.6), Sampling(), uniforms)
    assert narrow_draw(scores, Sampling(repetition_penalty=1.0), uniforms) == expected
    assert len(set(expected)) > 5


def test_the_probabilities_that_top_p_adds_up_are_those_of_the_whole_vocabulary_to_the_bit() -> (
    None
):
    scores = random_logits(torch.Generator().manual_seed(2), 4999, "float32")
    whole = TopKLogitsWarper(50)(None, scores).sort().values.softmax(-1).cumsum(-1)
    _, logits = top_k_logits(scores.clone(), 50)
    few = logits.sort().values.softmax(-1).cumsum(-1)
    assert few.shape == (ROWS, 51 + (4999 - 51) % 64)
    assert torch.equal(few[:, -50:], whole[:, -50:])


@pytest.mark.parametrize("tied", [3, 400])
def test_all_that_tie_with_the_last_of_the_k_likeliest_are_kept(tied: int) -> None:
    scores = torch.linspace(-2, -1, 1000).repeat(2, 1)
    scores[0, 100 : 100 + tied] = 5.0
    scores[1, 7] = 5.0
    tokens, logits = top_k_logits(scores, 2)
    kept = [row[finite].tolist() for row, finite in zip(tokens, logits.isfinite(), strict=True)]
    assert kept == [list(range(100, 100 + tied)), [7, 999]]


def test_where_top_p_splits_equal_values_the_same_ones_are_kept() -> None:
    """The sort of transformers' warper is not stable, so its own choice is expected."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 4, (ROWS, 5000), generator=generator).float()
    scores[:, torch.randperm(5000, generator=generator)[:40]] = 9.0
    sampling = Sampling(1.0, 50, 0.5, 1.0)  # keeps half of 40 equal values
    for draw in torch.linspace(0, 0.999, 40, dtype=torch.float64):
        uniforms = draw.expand(ROWS)
        expected = wide_draw(scores, torch.ones(ROWS), sampling, uniforms)
        assert narrow_draw(scores, sampling, uniforms) == expected


@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_same_tokens_are_drawn_while_the_temperature_changes(
    kind: str, tokens: int | None
) -> None:
    sampling = Sampling(2.0, 50, 0.95, 1.0, temperature_end=0.3, temperature_tokens=tokens)
    generator = torch.Generator().manual_seed(4)
    last = STEPS - 1 if tokens is None else tokens
    for step in range(STEPS):
        scores = random_logits(generator, 5000, kind)
        uniforms = torch.rand(ROWS, dtype=torch.float64, generator=generator)
        temperature = torch.full((ROWS,), 2.0 + (0.3 - 2.0) * min(1.0, step / last)).double()
        expected = wide_draw(scores, temperature, sampling, uniforms)
        assert narrow_draw(scores, sampling, uniforms, step) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_id_that_the_tokenizer_lacks_is_never_drawn(temperature: float) -> None:
    """The likeliest of 40 ids are 20 rows of padding and a gap in the vocabulary."""
    scores = torch.zeros(ROWS, 40)
    scores[:, 20:] = 30.0
    scores[:, 7] = 30.0
    sampling = Sampling(temperature, 0, 1.0, 1.0)
    every = torch.linspace(0, 1 - 2**-53, ROWS, dtype=torch.float64)[:, None].repeat(1, STEPS)
    processors = logits_processors(
        sampling,
        every,
        PROMPT,
        known=[token for token in range(20) if token != 7],
        ends=[],
        seqlen=PROMPT + STEPS,
    )
    texts = torch.zeros(ROWS, PROMPT, dtype=torch.int64)
    drawn = set(processors(texts, scores.clone()).argmax(dim=-1).tolist())
    assert drawn <= set(range(20)) - {7}
    assert len(drawn) == (1 if temperature == 0 else ROWS)


def test_an_end_is_not_drawn_before_min_new_tokens() -> None:
    scores = torch.zeros(2, 1000)
    scores[:, 5] = 20.0
    sampling = Sampling(1.0, 50, 0.95, 1.0, min_new_tokens=2)
    uniforms = torch.rand(2, STEPS, dtype=torch.float64)
    processors = made(sampling, uniforms, 1000, ends=[5])
    for step in range(4):
        texts = torch.zeros(2, PROMPT + step, dtype=torch.int64)
        drawn = processors(texts, scores.clone()).argmax(dim=-1).tolist()
        assert (drawn == [5, 5]) == (step >= 2)


def test_only_top_k_columns_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    sort = torch.sort

    def recorded(values: torch.Tensor, *given: Any, **options: Any) -> Any:
        widths.append(values.shape[1])
        return sort(values, *given, **options)

    monkeypatch.setattr(torch, "sort", recorded)
    scores = random_logits(torch.Generator().manual_seed(6), 49_152, "float32")
    draw = Draw(50, 0.95, torch.rand(ROWS, 1, dtype=torch.float64), 0)
    draw(torch.zeros(ROWS, 0, dtype=torch.int64), scores)
    assert widths == [64]
