import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pipeline.perplexity
from pipeline.errors import InputError
from pipeline.perplexity import joined_windows, perplexity
from pipeline.windows import Tokens

VOCABULARY = 96


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            max_position_embeddings=64,
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(VOCABULARY, size=(7, 24)))


def losses_in_float64(model: Any, token_ids: torch.Tensor) -> list[float]:
    """The mean loss of each window, one window and one position at a time."""
    exact = copy.deepcopy(model).double()
    means = []
    for window in token_ids:
        with torch.no_grad():
            logits = exact(window[None]).logits[0]
        losses = [
            float(torch.logsumexp(logits[place], 0) - logits[place, window[place + 1]])
            for place in range(len(window) - 1)
        ]
        means.append(sum(losses) / len(losses))
    return means


def test_perplexity_is_exp_of_the_mean_loss_over_windows(
    model: Any, token_ids: torch.Tensor
) -> None:
    losses = losses_in_float64(model, token_ids)
    measured = perplexity(model, token_ids, batch_size=4)
    assert measured.value == pytest.approx(math.exp(sum(losses) / 7), rel=1e-5)
    assert abs(measured.value / VOCABULARY - 1) > 0.05  # so the uniform answer would not pass
    assert measured.windows == 7


def test_the_standard_error_is_that_of_the_mean_loss_carried_through_exp(
    model: Any, token_ids: torch.Tensor
) -> None:
    losses = np.array(losses_in_float64(model, token_ids))
    error = losses.std(ddof=1) / math.sqrt(7)
    slope = (math.exp(losses.mean() + 1e-6) - math.exp(losses.mean() - 1e-6)) / 2e-6
    stderr = perplexity(model, token_ids, batch_size=4).stderr
    assert stderr == pytest.approx(slope * error, rel=1e-4)
    assert perplexity(model, token_ids[:1], batch_size=4).stderr is None


def test_a_model_without_an_opinion_has_the_vocabulary_as_its_perplexity(
    model: Any, token_ids: torch.Tensor
) -> None:
    blank = copy.deepcopy(model)
    torch.nn.init.zeros_(blank.lm_head.weight)
    measured = perplexity(blank, token_ids, batch_size=4)
    assert measured.value == pytest.approx(VOCABULARY, rel=1e-6)
    assert measured.stderr == pytest.approx(0.0, abs=1e-6)


def test_a_ruined_model_has_an_infinite_perplexity(model: Any, token_ids: torch.Tensor) -> None:
    ruined = copy.deepcopy(model)
    ruined.lm_head.weight.data.mul_(1e4)
    assert perplexity(ruined, token_ids, batch_size=4).value == math.inf


def test_neither_batches_nor_pieces_move_the_number(
    model: Any, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, token_ids, batch_size=7).value
    assert perplexity(model, token_ids, batch_size=3).value == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(pipeline.perplexity, "POSITIONS", 5)
    assert perplexity(model, token_ids, batch_size=3).value == pytest.approx(whole, rel=1e-6)


def test_a_pass_takes_no_more_windows_than_their_logits_allow(
    model: Any, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: sizes.append(output.shape[0])
    )
    try:
        for logits, expected in ((24 * VOCABULARY * 2, [2, 2, 2, 1]), (1, [1] * 7)):
            monkeypatch.setattr(pipeline.perplexity, "LOGITS", logits)
            sizes.clear()
            perplexity(model, token_ids, batch_size=7)
            assert sizes == expected
    finally:
        hook.remove()


def endless(read: list[int]) -> Iterator[Tokens]:
    for number in itertools.count():
        read.append(number)
        yield Tokens(str(number), np.arange(10 * number, 10 * number + 10, dtype=np.int32))


def test_texts_are_joined_in_order_and_read_only_as_far_as_needed() -> None:
    read: list[int] = []
    windows = joined_windows(endless(read), seqlen=8, max_windows=3)
    assert windows.tolist() == [list(range(start, start + 8)) for start in (0, 8, 16)]
    assert windows.dtype == torch.int64
    assert read == [0, 1, 2]


def test_a_short_rest_is_dropped() -> None:
    texts = itertools.islice(endless([]), 2)
    assert joined_windows(texts, seqlen=8, max_windows=100).tolist() == [
        list(range(8)),
        list(range(8, 16)),
    ]


def test_less_than_one_window_of_text_is_refused() -> None:
    with pytest.raises(InputError, match="has 20 tokens, less than one window"):
        joined_windows(itertools.islice(endless([]), 2), seqlen=21, max_windows=1)
    with pytest.raises(InputError, match="has 0 tokens"):
        joined_windows(iter(()), seqlen=8, max_windows=1)
