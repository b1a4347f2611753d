"""NaN and infinity are never a result, and the error names where they begin."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance

from pipeline.errors import NonFiniteError
from pipeline.evaluation.evaluate import measure_perplexity
from pipeline.evaluation.finished_answers import FinishedAnswers
from pipeline.evaluation.sharing_lm import SharingLM
from pipeline.models.nonfinite import first_nonfinite
from pipeline.models.output_layer import OutputLayer
from pipeline.scoring.score import score_samples
from pipeline.specs import FileCorpus, PerplexitySpec
from pipeline.testbed.tokenizer import train_tokenizer

WORDS = ["ship", "sails", "over", "seven", "seas", "while", "déjà", "vu", "counts", "12", "stars"]
DRAWS = np.random.default_rng(0)


def text(words: int) -> str:
    return " ".join(DRAWS.choice(WORDS, size=words))


TOKENIZER = train_tokenizer([text(9) for _ in range(50)], 300)
IDS = TOKENIZER(text(12))["input_ids"]


@pytest.fixture(scope="module")
def sound() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def spoilt(sound: Any, name: str, value: float = math.nan) -> Any:
    """Return the model with a non-finite value in one parameter."""
    model = copy.deepcopy(sound)
    model.get_parameter(name).data.flatten()[0] = value
    return model


PLACES = {
    "model.layers.1.mlp.down_proj.weight": "model.layers.1",
    "model.layers.2.self_attn.o_proj.weight": "model.layers.2",
    "model.norm.weight": "model.norm",
    "lm_head.weight": "lm_head",
}


@pytest.mark.parametrize("parameter", PLACES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_module_that_gives_it_is_named(sound: Any, parameter: str, value: float) -> None:
    assert first_nonfinite(spoilt(sound, parameter, value), IDS) == PLACES[parameter]


def test_an_embedding_is_named_where_the_text_holds_its_token(sound: Any) -> None:
    model = copy.deepcopy(sound)
    model.get_input_embeddings().weight.data[IDS[3]] = math.nan
    assert first_nonfinite(model, IDS) == "model.embed_tokens"
    assert first_nonfinite(model, [each for each in IDS if each != IDS[3]]) is None


def test_a_finite_model_has_no_nonfinite_module(sound: Any) -> None:
    assert first_nonfinite(sound, IDS) is None


def test_overflow_in_half_precision_is_found_too(sound: Any) -> None:
    model = copy.deepcopy(sound).half()
    for weight in model.model.layers[1].mlp.parameters():
        weight.data.mul_(3e3)
    assert first_nonfinite(model, IDS) == "model.layers.1"
    assert first_nonfinite(model.float(), IDS) is None


@pytest.mark.parametrize("parameter", PLACES)
def test_a_score_is_refused_with_its_sample_and_layer(sound: Any, parameter: str) -> None:
    model = spoilt(sound, parameter)
    with pytest.raises(NonFiniteError, match=rf"^sample 5: .*{PLACES[parameter]} is the first"):
        score_samples(model, [IDS], [1], name=lambda place: f"sample {place + 5}")


def test_the_error_names_the_sample_with_the_broken_value(sound: Any) -> None:
    model = copy.deepcopy(sound)
    model.get_input_embeddings().weight.data[IDS[3]] = math.nan
    clean = [each for each in IDS if each != IDS[3]]
    with pytest.raises(NonFiniteError, match=r"^sample 2: .*model\.embed_tokens is the first"):
        score_samples(model, [clean, clean[:5], IDS, clean], [1] * 4)


def test_a_perplexity_is_refused_with_its_window_and_layer(sound: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(text(30) for _ in range(20)))
    corpus = FileCorpus(path=str(tmp_path / "texts.txt"))
    wanted = PerplexitySpec(name="texts", corpus=corpus, seqlen=16)
    nothing = FinishedAnswers(b"", tmp_path)
    assert measure_perplexity(OutputLayer(sound), TOKENIZER, wanted, 512, nothing).metrics
    model = spoilt(sound, "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(NonFiniteError, match=r"^texts, window 0: .*model\.layers\.1 is the first"):
        measure_perplexity(OutputLayer(model), TOKENIZER, wanted, 512, nothing)


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [
        Instance(kind, {}, each, 0, metadata=("stars", number + 3, 1))
        for number, each in enumerate(arguments)
    ]


ASKED: dict[str, list[Instance]] = {
    "loglikelihood": asked("loglikelihood", (text(4), f" {text(2)}"), (text(5), f" {text(2)}")),
    "loglikelihood_rolling": asked("loglikelihood_rolling", (text(4),), (text(5),)),
    "generate_until": asked(
        "generate_until",
        *((text(size), {"until": ["\n"], "max_gen_toks": 4}) for size in (4, 5)),
    ),
}


@pytest.mark.parametrize("kind", ASKED)
def test_a_tasks_answer_is_refused_with_its_document_and_layer(sound: Any, kind: str) -> None:
    def ask(model: Any) -> Callable[..., Any]:
        nothing = FinishedAnswers(b"", Path("unused"))
        answer: Callable[..., Any] = getattr(SharingLM(model, TOKENIZER, 512, nothing), kind)
        return answer

    assert len(ask(sound)(ASKED[kind])) == 2
    model = spoilt(sound, "model.layers.1.mlp.down_proj.weight")
    place = r"^stars, document [34]: .*model\.layers\.1 is the first"
    with pytest.raises(NonFiniteError, match=place):
        ask(model)(ASKED[kind])
