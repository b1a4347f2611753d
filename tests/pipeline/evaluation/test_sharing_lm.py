import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import processors

import pipeline.evaluation.shared_beginnings
import pipeline.models.output_layer
from pipeline.errors import InputError
from pipeline.evaluation.finished_answers import FinishedAnswers
from pipeline.evaluation.sharing_lm import SharingLM
from pipeline.testbed.tokenizer import train_tokenizer

WORDS = ["ship", "sails", "over", "seven", "seas", "while", "déjà", "vu", "counts", "12", "stars"]
DRAWS = np.random.default_rng(0)
BATCH_TOKENS = 512


def text(words: int) -> str:
    return " ".join(DRAWS.choice(WORDS, size=words))


TOKENIZER = train_tokenizer([text(9) for _ in range(50)], 300)
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "initializer_range": 0.3,
}
ATTENTION = {
    **SIZES,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def llama() -> Any:
    return transformers.LlamaConfig(**ATTENTION)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "sliding-windows": lambda: transformers.MistralConfig(**ATTENTION, sliding_window=24),
    "learned-positions": lambda: transformers.GPT2Config(
        vocab_size=len(TOKENIZER),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=256,
        initializer_range=0.3,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    ),
    "capped-logits": lambda: transformers.Gemma2Config(
        **ATTENTION, head_dim=16, final_logit_softcapping=2.0
    ),
    "running-state": lambda: transformers.MambaConfig(**SIZES, state_size=4),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    return made(CONFIGS[request.param]())


def made(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def asked(questions: Iterator[list[tuple[str, str]]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, pair, place, metadata=("task", number, 1))
        for number, pairs in enumerate(questions)
        for place, pair in enumerate(pairs)
    ]


def with_choices() -> Iterator[list[tuple[str, str]]]:
    for _ in range(20):
        context = text(int(DRAWS.integers(3, 12)))
        yield [(context, f" {text(size)}") for size in (1, 2, 4)]


def with_examples() -> Iterator[list[tuple[str, str]]]:
    """All after the same examples, with choices of a token."""
    examples = text(70)
    for _ in range(12):
        context = f"{examples} {text(int(DRAWS.integers(2, 9)))}"
        yield [(context, f" {letter}") for letter in "ab"]


def with_contexts_that_differ() -> Iterator[list[tuple[str, str]]]:
    """As WinoGrande's: the options stand in the context."""
    for _ in range(12):
        begun, end = text(6), text(3)
        yield [(f"{begun} {option}", f" {end}") for option in ("ship", "seven stars")]


def odd() -> Iterator[list[tuple[str, str]]]:
    yield [("", text(3)), ("", f"{TOKENIZER.bos_token} {text(2)}")]
    yield [(f"{text(3)}  ", text(2)), (f"{text(3)}\n", f" {text(2)}")]
    yield [(f"{TOKENIZER.bos_token}{text(3)}", f" {text(2)}")]
    yield [(text(5), " ship")] * 2
    yield [(text(400), f" {text(5)}"), (text(2), f" {text(90)}")]  # longer than the model takes


KINDS = {
    "choices": with_choices,
    "examples": with_examples,
    "contexts": with_contexts_that_differ,
    "odd": odd,
}
REQUESTS = {name: asked(questions()) for name, questions in KINDS.items()}


def ours(
    model: Any, answers: FinishedAnswers | None = None, batch_tokens: int = BATCH_TOKENS
) -> SharingLM:
    nothing = FinishedAnswers(b"", Path("unused"))
    return SharingLM(model, TOKENIZER, batch_tokens, answers or nothing)


def theirs(model: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=4)


@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihoods_are_those_of_lm_evals_own_model(
    model: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.evaluation.shared_beginnings, "WORTHWHILE_TOKENS", 16)
    found = ours(model).loglikelihood(REQUESTS[kind])
    expected = theirs(model).loglikelihood(REQUESTS[kind], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose(
        [value for value, _ in found], [value for value, _ in expected], atol=1e-4, rtol=0
    )
    assert np.std([value for value, _ in expected]) > 0.5  # so one answer for all would not pass


CANNOT = {
    "an empty choice": (("ship", ""), "adds no token"),
    "an empty choice after nothing": (("", ""), "adds no token"),
    "the token that begins all texts": (("", TOKENIZER.bos_token), "adds no token"),
    "a context without a token": ((" ", "ship"), "its context has no token"),
    "a choice longer than the model": (("ship", f" {text(400)}"), r"longer than the model's 256"),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_an_answer_that_lm_eval_cannot_score_is_named_with_task_and_document(kind: str) -> None:
    pair, reason = CANNOT[kind]
    model = made(llama())
    tokenizer = copy.deepcopy(TOKENIZER)
    if kind == "a context without a token":  # else the token that begins a text is one
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    fine = Instance("loglikelihood", {}, ("ship", " sails"), 0, metadata=("stars", 0, 1))
    request = Instance("loglikelihood", {}, pair, 0, metadata=("stars", 7, 1))
    asks = SharingLM(model, tokenizer, BATCH_TOKENS, FinishedAnswers(b"", Path("unused")))
    with pytest.raises(InputError, match=f"tasks: 'stars, document 7': .*{reason}"):
        asks.loglikelihood([fine, request])
    lm_eval = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    with pytest.raises((AssertionError, IndexError)):
        lm_eval.loglikelihood([request], disable_tqdm=True)


def test_a_context_that_merges_with_its_continuation_is_scored_as_by_lm_eval() -> None:
    model = made(llama())
    pairs = [
        ("shi", "p sails over"),
        ("ship sai", "ls 12 stars"),
        ("coun", "ts vu seven stars over seas"),
    ]
    for context, continuation in pairs:
        part, whole = (TOKENIZER(each)["input_ids"] for each in (context, context + continuation))
        assert whole[: len(part)] != part
    requests = asked(iter([[pair] for pair in pairs]))
    found = ours(model).loglikelihood(requests)
    expected = theirs(model).loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], atol=1e-4)


def test_log_likelihoods_in_half_precision_are_rounded_as_lm_evals() -> None:
    model = made(llama()).bfloat16()
    found = ours(model, batch_tokens=1).loglikelihood(REQUESTS["choices"])
    alone = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=1)
    expected = alone.loglikelihood(REQUESTS["choices"], disable_tqdm=True)
    values = torch.tensor([value for value, _ in found], dtype=torch.float64)
    assert torch.equal(values, values.bfloat16().double())
    np.testing.assert_allclose(values, [value for value, _ in expected], rtol=2**-6)


def test_only_tokens_that_are_asked_for_have_logits_and_few_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made(llama())
    monkeypatch.setattr(pipeline.models.output_layer, "LAYER_LOGITS", 5 * len(TOKENIZER))
    asks = ours(model)
    sizes: list[int] = []
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: sizes.append(output.numel() // len(TOKENIZER))
    )
    asks.loglikelihood(REQUESTS["choices"])
    hook.remove()
    asked_for = [request.args for request in REQUESTS["choices"]]
    assert max(sizes) == 5
    assert sum(sizes) == sum(len(asks._encoded_pairs([pair])[0][1]) for pair in asked_for)


def test_whole_texts_are_as_likely_as_for_lm_evals_own_model(model: Any) -> None:
    requests = [
        Instance("loglikelihood_rolling", {}, (text(size),), 0, metadata=("task", size, 1))
        for size in (3, 200, 450)
    ]
    found = ours(model).loglikelihood_rolling(requests)
    expected = theirs(model).loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_generations_are_those_of_lm_evals_own_model() -> None:
    model = made(llama())
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (text(size), options), 0, metadata=("task", size, 1))
        for size in range(2, 9)
    ]
    found = ours(model).generate_until(requests)
    assert found == theirs(model).generate_until(requests, disable_tqdm=True)
    assert any(found)


def tokens_read(model: Any, read: Callable[[], object]) -> int:
    """Tokens that go through the model, padding included."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: counts.append(inputs[0].numel())
    )
    try:
        read()
    finally:
        hook.remove()
    return sum(counts)


def test_the_shared_beginning_of_a_documents_requests_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline.evaluation.shared_beginnings, "WORTHWHILE_TOKENS", 16)
    model = made(llama())
    contexts = [text(30) for _ in range(8)]
    endings = [f" {word}" for word in ("ship over", "seas vu", "stars 12", "while counts")]
    requests = asked(iter([[(context, end) for end in endings] for context in contexts]))
    plain = tokens_read(model, lambda: theirs(model).loglikelihood(requests, disable_tqdm=True))
    shared = tokens_read(model, lambda: ours(model).loglikelihood(requests))
    assert shared < plain / 2


def test_examples_that_many_documents_begin_with_are_read_once() -> None:
    model = made(llama())
    examples = text(70)
    requests = asked(iter([[(f"{examples} {text(3)}", f" {text(2)}")] for _ in range(40)]))
    length = len(TOKENIZER(examples)["input_ids"])
    assert length > 64
    shared = tokens_read(model, lambda: ours(model).loglikelihood(requests))
    assert shared < length + 40 * 30 < 40 * length / 2


def test_a_batch_has_no_more_tokens_than_its_budget() -> None:
    model = made(llama())
    sizes: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: sizes.append(inputs[0].numel())
    )
    ours(model).loglikelihood(REQUESTS["choices"])
    hook.remove()
    assert len(sizes) > 2
    assert max(sizes) <= BATCH_TOKENS


# --------------------------------------------------------------------------------------- resuming


class Folder:
    """Keeps files by their name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def keep(self, path: Path) -> None:
        shutil.copy(path, self.path)

    def restore(self, path: Path) -> bool:
        kept = self.path / path.name
        if kept.exists():
            shutil.copy(kept, path)
        return kept.exists()


MANY = asked(iter([[(text(12), f" {text(2)}"), (text(12), f" {text(2)}")] for _ in range(1200)]))


def test_answers_of_a_killed_evaluation_are_not_asked_again(tmp_path: Path) -> None:
    model, kept = made(llama()), Folder(tmp_path / "kept")
    whole, rows = answered(ours(model, None, 256))
    assert sum(rows) == len(MANY)
    passes = 0

    def dies(module: Any, inputs: Any, output: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 60:
            raise KeyboardInterrupt

    first = ours(model, FinishedAnswers(b"a model", tmp_path / "first", kept), 256)
    hook = model.base_model.register_forward_hook(dies)
    with pytest.raises(KeyboardInterrupt):
        first.loglikelihood(MANY)
    hook.remove()
    second = FinishedAnswers(b"a model", tmp_path / "second", kept)
    again, read = answered(ours(model, second, 256))
    assert again == whole
    answered_twice = sum(rows[:60]) + sum(read) - len(MANY)
    assert second.resumed > 200
    assert second.resumed + sum(read) == len(MANY)
    assert answered_twice < 0.01 * len(MANY)


def answered(language_model: SharingLM) -> tuple[list[tuple[float, bool]], list[int]]:
    """The answers to `MANY`, and how many requests each forward pass answers."""
    rows: list[int] = []
    hook = language_model.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.append(inputs[0].shape[0])
    )
    answers = language_model.loglikelihood(MANY)
    hook.remove()
    return answers, rows


def test_answers_are_never_taken_for_those_of_another_model_or_request(tmp_path: Path) -> None:
    kept = Folder(tmp_path / "kept")
    asked_for: list[str] = []

    def answer(model: bytes, request: bytes, answer: str) -> list[Any]:
        def compute() -> list[str]:
            asked_for.append(answer)
            return [answer]

        return FinishedAnswers(model, tmp_path / "files", kept).get([request], compute)

    assert answer(b"a", b"question", "first") == ["first"]
    assert answer(b"b", b"question", "second") == ["second"]
    assert answer(b"a", b"questions", "third") == ["third"]
    assert answer(b"a", b"question", "fourth") == ["first"]
    assert asked_for == ["first", "second", "third"]
