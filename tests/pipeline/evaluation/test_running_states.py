"""Models whose layers keep states: evaluated as if each text were alone, with nothing shared."""

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
from pipeline.errors import InputError
from pipeline.evaluation.finished_answers import FinishedAnswers
from pipeline.evaluation.perplexity import ScoredWindow, batches, losses
from pipeline.evaluation.sharing_lm import SharingLM, sees_padding
from pipeline.models.output_layer import OutputLayer, check_causal
from pipeline.scoring.score import score_samples
from pipeline.testbed.tokenizer import train_tokenizer

WORDS = ["ship", "sails", "over", "seven", "seas", "while", "déjà", "vu", "counts", "12", "stars"]
DRAWS = np.random.default_rng(0)


def text(words: int) -> str:
    return " ".join(DRAWS.choice(WORDS, size=words))


TOKENIZER = train_tokenizer([text(9) for _ in range(50)], 300)
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
ATTENTION: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MAMBA: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
DELTA: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lfm2": lambda: transformers.Lfm2Config(
        **ATTENTION, layer_types=["conv", "full_attention", "conv", "full_attention"]
    ),
    "minimax": lambda: transformers.MiniMaxConfig(
        **ATTENTION,
        num_local_experts=4,
        head_dim=8,
        block_size=8,
        layer_types=["linear_attention", "linear_attention", "full_attention", "full_attention"],
    ),
    "falcon-h1": lambda: transformers.FalconH1Config(**ATTENTION, **MAMBA, mamba_d_ssm=64),
    "bamba": lambda: transformers.BambaConfig(**ATTENTION, **MAMBA, attn_layer_indices=[1, 3]),
    "jamba": lambda: transformers.JambaConfig(
        **ATTENTION,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "qwen3-next": lambda: transformers.Qwen3NextConfig(
        **ATTENTION,
        **DELTA,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    ),
    "qwen3.5": lambda: transformers.Qwen3_5TextConfig(
        **ATTENTION,
        **DELTA,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        **SIZES, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8
    ),
    "recurrent-gemma": lambda: transformers.RecurrentGemmaConfig(
        **ATTENTION, lru_width=32, attention_window_size=16
    ),
    "rwkv": lambda: transformers.RwkvConfig(**SIZES),
}
SEES_PADDING = {"minimax", "recurrent-gemma", "rwkv"}


@pytest.fixture(scope="module", params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).float().eval()


def ours(model: Any) -> SharingLM:
    return SharingLM(model, TOKENIZER, 512, FinishedAnswers(b"", Path("unused")))


def alone(model: Any) -> Any:
    return HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=1)


EXAMPLES = text(12)
REQUESTS = [
    Instance("loglikelihood", {}, (context, f" {text(size)}"), size, metadata=("t", number, 1))
    for number, context in enumerate(f"{EXAMPLES} {text(words)}" for words in (2, 5, 9, 14))
    for size in (1, 2, 5)
]
IDS = [DRAWS.integers(3, len(TOKENIZER), size=size).tolist() for size in (7, 30, 12, 25)]


def test_choices_are_as_likely_as_for_lm_eval_one_at_a_time(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.evaluation.shared_beginnings, "WORTHWHILE_TOKENS", 16)
    monkeypatch.setattr(pipeline.evaluation.shared_beginnings, "FAMILY_TOKENS", 8)
    asks = ours(model)
    assert not asks.shares
    found = asks.loglikelihood(REQUESTS)
    expected = alone(model).loglikelihood(REQUESTS, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    values = [[value for value, _ in answers] for answers in (found, expected)]
    np.testing.assert_allclose(values[0], values[1], atol=1e-3, rtol=0)
    assert np.std(values[1]) > 0.5


def test_texts_are_measured_and_scored_as_by_a_plain_forward_pass(model: Any) -> None:
    expected = []
    for ids in IDS:
        with torch.no_grad():
            logs = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        expected.append(-float(logs.gather(1, torch.tensor(ids[1:])[:, None]).sum()))
    windows = [ScoredWindow(np.array(ids), 1, 1, 1) for ids in IDS]
    found = dict.fromkeys(range(len(IDS)), 0.0)
    for places in batches(windows, 512, None):
        (own,) = losses(OutputLayer(model), [[windows[place] for place in places]])
        found |= zip(places, own, strict=True)
    assert list(found.values()) == pytest.approx(expected, rel=1e-4)
    scores = score_samples(model, IDS, [1] * len(IDS))
    means = [loss / (len(ids) - 1) for loss, ids in zip(expected, IDS, strict=True)]
    assert np.log([one.perplexity for one in scores]) == pytest.approx(means, rel=1e-4)


def test_a_text_is_continued_as_if_it_were_alone(name: str, model: Any) -> None:
    options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (text(size), options), 0, metadata=("t", size, 1))
        for size in (2, 5, 9)
    ]
    assert sees_padding(model) == (name in SEES_PADDING)
    expected = [
        alone(model).generate_until([request], disable_tqdm=True)[0] for request in requests
    ]
    assert ours(model).generate_until(requests) == expected


def test_an_encoder_is_no_language_model(model: Any) -> None:
    check_causal(model)
    encoder = transformers.BertLMHeadModel(
        transformers.BertConfig(**{**ATTENTION, "num_key_value_heads": 4})
    ).eval()
    with pytest.raises(InputError, match=r"BertLMHeadModel.*depend on later tokens"):
        check_causal(encoder)
    decoder = copy.deepcopy(encoder.config)
    decoder.is_decoder = True
    check_causal(transformers.BertLMHeadModel(decoder).eval())
