"""Models whose positions depend on the length of the text give each text the numbers that it has
alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import pipeline.evaluation.shared_beginnings
from pipeline.evaluation.finished_answers import FinishedAnswers
from pipeline.evaluation.perplexity import ScoredWindow, batches, losses
from pipeline.evaluation.sharing_lm import SharingLM
from pipeline.models.output_layer import OutputLayer
from pipeline.models.positions import LengthDependence, forget_longer_texts, length_dependence
from pipeline.scoring.score import score_samples
from pipeline.testbed.tokenizer import train_tokenizer

WORDS = ["ship", "sails", "over", "seven", "seas", "while", "déjà", "vu", "counts", "12", "stars"]
DRAWS = np.random.default_rng(0)


def text(words: int) -> str:
    return " ".join(DRAWS.choice(WORDS, size=words))


TOKENIZER = train_tokenizer([text(9) for _ in range(50)], 300)
SWITCH = 40
"""Tokens of the longest text with the positions of short ones."""
LONGEST = 160
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 4.0,
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


def phi3() -> Any:
    return transformers.Phi3Config(
        **SIZES,
        max_position_embeddings=LONGEST,
        original_max_position_embeddings=SWITCH,
        rope_parameters=dict(LONGROPE),
    )


def phimoe() -> Any:
    mscales = {"short_mscale": 1.0, "long_mscale": 1.3}
    return transformers.PhimoeConfig(
        **SIZES,
        num_local_experts=4,
        max_position_embeddings=LONGEST,
        original_max_position_embeddings=SWITCH,
        rope_parameters={**LONGROPE, **mscales},
    )


def dynamic() -> Any:
    return transformers.LlamaConfig(
        **SIZES, max_position_embeddings=SWITCH, rope_parameters=dict(DYNAMIC)
    )


def dynamic_in_some_layers() -> Any:
    return transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=SWITCH,
        rope_parameters={"sliding_attention": dict(PLAIN), "full_attention": dict(DYNAMIC)},
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "longrope": phi3,
    "longrope-scaled": phimoe,
    "dynamic": dynamic,
    "dynamic-in-some-layers": dynamic_in_some_layers,
}
DEPENDENCES = {
    "longrope": LengthDependence(switches=(SWITCH,)),
    "longrope-scaled": LengthDependence(switches=(SWITCH,)),
    "dynamic": LengthDependence(grows_beyond=SWITCH),
    "dynamic-in-some-layers": LengthDependence(grows_beyond=SWITCH),
}


def made(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """Return log-probabilities `[tokens - 1]` of a text by a model that has read no other."""
    fresh = copy.deepcopy(model)
    forget_longer_texts(fresh)
    with torch.no_grad():
        logs = fresh(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return logs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


TEXTS = [
    DRAWS.integers(3, len(TOKENIZER), size=length).tolist()
    for length in (10, 30, SWITCH - 1, SWITCH, SWITCH + 1, 60, 60, 61, 90, 12)
]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_gives_the_lengths_where_positions_change(name: str) -> None:
    assert length_dependence(CONFIGS[name]()) == DEPENDENCES[name]


def test_configurations_of_older_checkpoints_are_read_too() -> None:
    config = transformers.PretrainedConfig()
    config.max_position_embeddings = 128
    assert length_dependence(config) == LengthDependence()
    config.rope_scaling = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    config.original_max_position_embeddings = 32
    assert length_dependence(config) == LengthDependence(switches=(32,))
    config.rope_scaling = {"type": "dynamic", "factor": 2.0}
    assert length_dependence(config) == LengthDependence(grows_beyond=128)
    config.rope_scaling = {"type": "linear", "factor": 2.0}
    assert length_dependence(config) == LengthDependence()


def test_texts_are_of_one_group_if_they_have_the_same_positions() -> None:
    longrope, grows = LengthDependence(switches=(8,)), LengthDependence(grows_beyond=8)
    assert len({LengthDependence().group(length) for length in range(20)}) == 1
    assert [longrope.group(length) == longrope.group(8) for length in (1, 8, 9)] == [1, 1, 0]
    assert longrope.group(9) == longrope.group(90)
    assert [grows.group(length) == grows.group(8) for length in (1, 8, 9)] == [1, 1, 0]
    assert grows.group(9) != grows.group(10)


def test_positions_do_depend_on_the_length_of_a_batch(model: Any) -> None:
    """If they did not, the other tests could not fail."""
    short, long = TEXTS[1], TEXTS[8]
    padded = torch.tensor([long, short + [0] * (len(long) - len(short))])
    with torch.no_grad():
        logs = model(padded, use_cache=False).logits[1].log_softmax(-1)
    beside = logs[: len(short) - 1].gather(1, torch.tensor(short[1:])[:, None])[:, 0]
    assert float((beside - alone(model, short)).abs().max()) > 1e-3


def test_a_sample_is_scored_as_if_it_were_alone(model: Any) -> None:
    found = score_samples(model, TEXTS, [1] * len(TEXTS))
    expected = [float((-alone(model, ids).double().mean()).exp()) for ids in TEXTS]
    assert [one.perplexity for one in found] == pytest.approx(expected, rel=1e-4)


def test_a_window_is_measured_as_if_it_were_alone(model: Any) -> None:
    windows = [ScoredWindow(np.array(ids), 1, 1, 1) for ids in TEXTS]
    found = [0.0] * len(windows)
    for places in batches(windows, 512, None, length_dependence(model.config)):
        batch = [windows[place] for place in places]
        (own,) = losses(OutputLayer(model), [batch])
        for place, loss in zip(places, own, strict=True):
            found[place] = loss
    expected = [-float(alone(model, window.ids.tolist()).double().sum()) for window in windows]
    assert found == pytest.approx(expected, rel=1e-5)


def requests() -> list[Instance]:
    """Documents on either side of the switch, and choices that end on the other side."""
    examples = text(8)
    asked = []
    for number, words in enumerate([3, 6, 9, 9, 20, 28, 34, 40]):
        context = f"{examples} {text(words)}"
        for place, size in enumerate((1, 4, 9)):
            pair = (context, f" {text(size)}")
            asked.append(Instance("loglikelihood", {}, pair, place, metadata=("t", number, 1)))
    return asked


REQUESTS = requests()


def test_a_choice_is_as_likely_as_if_it_were_alone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.evaluation.shared_beginnings, "WORTHWHILE_TOKENS", 16)
    monkeypatch.setattr(pipeline.evaluation.shared_beginnings, "FAMILY_TOKENS", 6)
    nothing = FinishedAnswers(b"", Path("unused"))
    ours = SharingLM(model, TOKENIZER, 512, nothing)
    ours._max_length = 4 * SWITCH  # beyond the model's own length, where dynamic ropes grow
    lengths = {len(TOKENIZER("".join(request.args))["input_ids"]) - 1 for request in REQUESTS}
    assert min(lengths) < SWITCH < max(lengths)
    found = ours.loglikelihood(REQUESTS)
    for request, (value, greedy) in zip(REQUESTS, found, strict=True):
        fresh = copy.deepcopy(model)
        forget_longer_texts(fresh)
        theirs = HFLM(pretrained=fresh, tokenizer=TOKENIZER, batch_size=1, max_length=4 * SWITCH)
        ((expected, likeliest),) = theirs.loglikelihood([request], disable_tqdm=True)
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == likeliest
