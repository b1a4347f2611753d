import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    ByT5Tokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
)

import pipeline.evaluation.perplexity
import pipeline.models.output_layer
from pipeline.data.presets import PERPLEXITY_PRESETS
from pipeline.errors import InputError, NonFiniteError
from pipeline.evaluation.perplexity import (
    Measured,
    ScoredWindow,
    batches,
    bits_per_byte,
    encoded_texts,
    losses,
    perplexity,
    protocol_windows,
)
from pipeline.models.output_layer import OutputLayer
from pipeline.specs import PerplexityProtocol
from pipeline.testbed.tokenizer import train_tokenizer
from tests.pipeline.tiny_models import TINY, tiny_llama

WORDS = ["ship", "sails", "over", "seven", "seas", "déjà", "vu", "12", "stars", "日本"]
DRAWS = np.random.default_rng(0)
TEXTS = [" ".join(DRAWS.choice(WORDS, size=size)) for size in (9, 14, 5, 21, 1, 17, 12, 30)]
TOKENIZER = train_tokenizer([text for text in TEXTS if "日" not in text], 290)
VOCABULARY = len(TOKENIZER)
SMALL: dict[str, Any] = {**TINY, "vocab_size": VOCABULARY, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(VOCABULARY, 512)


def losses_in_float64(model: Any, ids: list[int], first: int) -> list[float]:
    """The loss of each token from the first one on, one position at a time."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = exact(torch.tensor([ids])).logits[0]
    return [
        float(torch.logsumexp(logits[place - 1], 0) - logits[place - 1, ids[place]])
        for place in range(first, len(ids))
    ]


def taken(
    model: Any, protocol: PerplexityProtocol, texts: list[str] = TEXTS
) -> tuple[list[ScoredWindow], list[float]]:
    windows = protocol_windows(iter(texts), TOKENIZER, protocol)
    summed = [0.0] * len(windows)
    for places in batches(windows, 256, VOCABULARY):
        (found,) = losses(OutputLayer(model), [[windows[place] for place in places]])
        for place, loss in zip(places, found, strict=True):
            summed[place] = loss
    return windows, summed


def measured(model: Any, corpus: list[str] = TEXTS, **fields: Any) -> Measured:
    protocol = PerplexityProtocol(**fields)
    windows, summed = taken(model, protocol, corpus)
    return perplexity(windows, summed, protocol)


def ids_of(text: str, special_tokens: bool = True) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=special_tokens)["input_ids"]
    return ids


def cut(ids: list[int], seqlen: int) -> list[list[int]]:
    return [ids[start : start + seqlen] for start in range(0, len(ids) - seqlen + 1, seqlen)]


JOINED = [token for text in TEXTS for token in ids_of(text)]


# ------------------------------------------------------------------------------- against protocols


def test_texts_are_tokenised_one_by_one_and_joined_by_default(model: Any) -> None:
    means = [np.mean(losses_in_float64(model, ids, 1)) for ids in cut(JOINED, 24)]
    assert len(means) > 4
    found = measured(model, seqlen=24)
    assert found.value == pytest.approx(math.exp(np.mean(means)), rel=1e-5)
    assert found.windows == len(means)
    assert abs(found.value / VOCABULARY - 1) > 0.05  # so the uniform answer would not pass


def test_the_protocol_of_wanda_on_wikitext_takes_all_rows_joined_by_blank_lines(
    model: Any,
) -> None:
    """`get_wikitext2` and `eval_ppl_wikitext` of Wanda's code, on a short window."""
    rows = [" = Title = \n", "", TEXTS[0], "", "", TEXTS[3], *TEXTS[5:]]
    ids = ids_of("\n\n".join(rows))
    nlls = [np.mean(losses_in_float64(model, window, 1)) * 24 for window in cut(ids, 24)]
    expected = math.exp(sum(nlls) / (len(nlls) * 24))
    preset = PERPLEXITY_PRESETS["wanda-wikitext2"]
    assert preset.seqlen == 2048
    found = measured(model, rows, **{**preset.model_dump(), "seqlen": 24})
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.windows == len(nlls)


def test_the_protocol_of_wanda_on_c4_takes_the_first_1100_texts_joined_by_spaces(
    model: Any,
) -> None:
    many = [TEXTS[number % 3] + str(number) for number in range(1300)]
    ids = ids_of(" ".join(many[:1100]))[: 256 * 24]
    preset = PERPLEXITY_PRESETS["wanda-c4"]
    windows = protocol_windows(
        iter(many), TOKENIZER, preset.model_copy(update={"seqlen": 24, "max_windows": None})
    )
    whole = [token for window in windows for token in window.ids.tolist()]
    assert whole == ids_of(" ".join(many[:1100]))[: len(whole)]
    limited = protocol_windows(iter(many), TOKENIZER, preset.model_copy(update={"seqlen": 24}))
    assert [token for window in limited for token in window.ids.tolist()] == ids


def test_the_perplexity_of_texts_is_the_mean_of_each_ones_own(model: Any) -> None:
    own = [math.exp(np.mean(losses_in_float64(model, ids_of(text)[:40], 1))) for text in TEXTS]
    found = measured(model, unit="text", seqlen=40)
    assert found.value == pytest.approx(np.mean(own), rel=1e-5)
    assert found.stderr == pytest.approx(np.std(own, ddof=1) / math.sqrt(len(own)), rel=1e-4)
    assert measured(model, unit="text", texts=3).windows == 3


@pytest.mark.parametrize("stride", [8, 11])
def test_with_a_stride_each_token_is_scored_once_with_as_much_before_it_as_fits(
    model: Any, stride: int
) -> None:
    seqlen, expected, end = 24, [], 0
    for start in range(0, len(JOINED) - seqlen + 1, stride):
        window = JOINED[start : start + seqlen]
        expected += losses_in_float64(model, window, max(1, end - start))
        end = start + seqlen
    assert len(expected) == end - 1
    found = measured(model, seqlen=seqlen, stride=stride)
    assert found.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_bos_stands_before_each_window_and_is_not_scored(model: Any) -> None:
    ids = [token for text in TEXTS for token in ids_of(text, special_tokens=False)]
    windows = [[TOKENIZER.bos_token_id, *window] for window in cut(ids, 23)]
    expected = [loss for window in windows for loss in losses_in_float64(model, window, 1)]
    assert len(expected) == 23 * len(windows)
    found = measured(model, seqlen=24, bos="window")
    assert found.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_without_bos_no_special_token_is_among_the_windows() -> None:
    windows = protocol_windows(iter(TEXTS), TOKENIZER, PerplexityProtocol(seqlen=24, bos="none"))
    assert not {int(token) for window in windows for token in window.ids} & set(
        TOKENIZER.all_special_ids
    )


# --------------------------------------------------------------------------- words, bytes and bits


def test_word_and_byte_perplexity_share_the_same_loss_over_other_units(model: Any) -> None:
    text = "\n".join(TEXTS)
    total = sum(losses_in_float64(model, ids_of(text), 1))
    one = {"seqlen": len(ids_of(text)), "joined_by": "\n"}
    word = measured(model, **one, normalisation="word").value
    assert word == pytest.approx(math.exp(total / len(text.split())), rel=1e-5)
    byte = measured(model, **one, normalisation="byte").value
    assert byte == pytest.approx(math.exp(total / len(text.encode())), rel=1e-5)
    bits = bits_per_byte(*taken(model, PerplexityProtocol(**one)))
    assert bits.value == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


def test_words_and_bytes_of_windows_add_up_to_those_of_the_text() -> None:
    protocol = PerplexityProtocol(seqlen=8, joined_by=" ", bos="window")
    windows = protocol_windows(iter(TEXTS), TOKENIZER, protocol)
    text = " ".join(TEXTS)
    ids = ids_of(text, special_tokens=False)
    read = TOKENIZER.decode(ids[: 7 * len(windows)]).rstrip("\ufffd")
    assert sum(window.words for window in windows) == len(re.findall(r"\S+", read))
    missing = sum(window.bytes for window in windows) - len(read.encode())
    assert 0 <= missing < 4  # a character whose first byte is read counts whole


def test_a_uniform_model_needs_the_same_bits_for_any_tokens(model: Any) -> None:
    blank = copy.deepcopy(model)
    torch.nn.init.zeros_(blank.lm_head.weight)
    text = " ".join(TEXTS)
    bits = bits_per_byte(*taken(blank, PerplexityProtocol(seqlen=len(ids_of(text)), joined_by=" ")))
    tokens = len(ids_of(text)) - 1
    assert bits.value == pytest.approx(tokens * math.log2(VOCABULARY) / len(text.encode()))


# --------------------------------------------------------------------------------------- soundness


def test_the_standard_error_is_that_of_the_mean_loss_carried_through_exp(model: Any) -> None:
    means = np.array([np.mean(losses_in_float64(model, ids, 1)) for ids in cut(JOINED, 24)])
    error = means.std(ddof=1) / math.sqrt(len(means))
    slope = (math.exp(means.mean() + 1e-6) - math.exp(means.mean() - 1e-6)) / 2e-6
    assert measured(model, seqlen=24).stderr == pytest.approx(slope * error, rel=1e-4)
    assert measured(model, seqlen=24, max_windows=1).stderr is None


def test_a_model_without_an_opinion_has_the_vocabulary_as_its_perplexity(model: Any) -> None:
    blank = copy.deepcopy(model)
    torch.nn.init.zeros_(blank.lm_head.weight)
    found = measured(blank, seqlen=24)
    assert found.value == pytest.approx(VOCABULARY, rel=1e-6)
    assert found.stderr == pytest.approx(0.0, abs=1e-6)


STRANGE = [
    "Déjà vu: seven  ships\n\nsail – 12 ★ stars 🚀!  ",
    "plain text",
    "x",
    "中文 と 日本語 \ufffd end",
    " ",
]


@pytest.mark.parametrize("special_tokens", [True, False])
def test_words_and_bytes_are_counted_without_a_fast_tokenizer(special_tokens: bool) -> None:
    encoded = encoded_texts(STRANGE, ByT5Tokenizer(), special_tokens=special_tokens)
    for text, found in zip(STRANGE, encoded, strict=True):
        raw = text.encode()
        assert len(found.ids) == len(raw) + special_tokens  # a token a byte, and EOS
        assert found.bytes.sum() == len(raw)
        assert found.words.sum() == len(text.split())
        for end in range(len(raw)):  # a character is counted with its last byte
            begun = len(raw[: end + 1].decode(errors="ignore").encode())
            assert found.bytes[: end + 1].sum() == (begun if end + 1 < len(raw) else len(raw))


def test_a_tokenizer_that_is_not_fast_counts_as_a_fast_one_does() -> None:
    plain = [text for text in TEXTS if text.isascii()]
    assert plain
    slow = _without_offsets(TOKENIZER)
    for special_tokens in (True, False):
        pairs = zip(
            encoded_texts(plain, TOKENIZER, special_tokens=special_tokens),
            encoded_texts(plain, slow, special_tokens=special_tokens),
            strict=True,
        )
        for one, other in pairs:
            for name in ("ids", "words", "bytes"):
                assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_tokenizer_that_is_not_fast_and_loses_text_is_refused() -> None:
    class Lossy(ByT5Tokenizer):  # type: ignore[misc]
        def decode(self, token_ids: Any, **options: Any) -> str:
            return str(super().decode(token_ids, **options)).replace("e", "")

    with pytest.raises(
        InputError, match=r"tokenizer: 'Lossy': has no fast version and loses 'even'"
    ):
        list(encoded_texts(["seven", "ten"], Lossy(), special_tokens=False))


def _without_offsets(fast: Any) -> Any:
    """A tokenizer that has no fast version, with the same tokens."""

    class Slow:
        is_fast = False
        decode = staticmethod(fast.decode)

        def __call__(self, texts: Any, **options: Any) -> Any:
            assert not options.pop("return_offsets_mapping", False)
            return fast(texts, **options)

    return Slow()


@pytest.mark.parametrize("fields", [{"seqlen": 24}, {"unit": "text"}])
def test_a_loss_beyond_any_perplexity_is_an_error_and_not_infinity(
    model: Any, fields: dict[str, Any]
) -> None:
    ruined = copy.deepcopy(model)
    ruined.lm_head.weight.data.mul_(1e4)
    with pytest.raises(NonFiniteError, match=r"a loss of \d+\.?\d* nats has no perplexity"):
        measured(ruined, **fields)
    ruined.lm_head.weight.data.mul_(1e-3)
    assert 1e6 < measured(ruined, **fields).value < math.inf


def test_neither_batches_nor_pieces_move_the_number(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = PerplexityProtocol(unit="text")
    windows = protocol_windows(iter(TEXTS), TOKENIZER, protocol)
    alone = [loss for (loss,) in losses(OutputLayer(model), [[window] for window in windows])]
    monkeypatch.setattr(pipeline.models.output_layer, "PART_LOGITS", 5 * VOCABULARY)
    (together,) = losses(OutputLayer(model), [windows])
    np.testing.assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=2.0)),
        lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625, pad_token_id=0)),
    ],
    ids=["capped", "scaled"],
)
def test_capped_and_scaled_logits_are_taken_from_the_whole_forward_pass(
    other: Callable[[], Any],
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = other().eval()
    windows = protocol_windows(iter(TEXTS), TOKENIZER, PerplexityProtocol(unit="text"))
    expected = [sum(losses_in_float64(model, window.ids.tolist(), 1)) for window in windows]
    (found,) = losses(OutputLayer(model), [windows])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    (wrong,) = losses(OutputLayer(model, chunked=True), [windows])
    assert abs(wrong[0] / expected[0] - 1) > 0.05


def test_only_tokens_that_are_scored_have_logits_and_few_at_once(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.models.output_layer, "LAYER_LOGITS", 5 * VOCABULARY)
    protocol = PerplexityProtocol(seqlen=24, stride=8)
    windows = protocol_windows(iter(TEXTS), TOKENIZER, protocol)[:4]
    sizes: list[int] = []
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: sizes.append(output.numel() // VOCABULARY)
    )
    try:
        list(losses(OutputLayer(model, chunked=True), [windows]))
    finally:
        hook.remove()
    assert max(sizes) == 5
    assert sum(sizes) == sum(window.scored for window in windows) < 4 * 23


def test_a_pass_takes_no_more_windows_than_their_tokens_and_logits_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows = protocol_windows(iter(TEXTS), TOKENIZER, PerplexityProtocol(seqlen=24))[:7]
    assert [len(part) for part in batches(windows, 24 * 3, VOCABULARY)] == [3, 3, 1]
    assert [len(part) for part in batches(windows, 1, VOCABULARY)] == [1] * 7
    monkeypatch.setattr(pipeline.evaluation.perplexity, "LOGITS", 24 * VOCABULARY * 2)
    assert [len(part) for part in batches(windows, 10_000, VOCABULARY)] == [2, 2, 2, 1]
    assert [len(part) for part in batches(windows, 24 * 4, None)] == [4, 3]


def test_texts_are_read_only_as_far_as_needed() -> None:
    read: list[str] = []

    def endless() -> Iterator[str]:
        while True:
            read.append(TEXTS[0])
            yield TEXTS[0]

    windows = protocol_windows(endless(), TOKENIZER, PerplexityProtocol(seqlen=8, max_windows=3))
    assert len(windows) == 3
    assert len(read) <= 32 + 1


def test_a_token_inside_a_character_counts_that_character_once() -> None:
    (encoded,) = encoded_texts(["日本"], TOKENIZER, special_tokens=True)
    assert len(encoded.ids) > 3
    assert encoded.bytes.sum() == 6
    assert encoded.words.sum() == 1


def test_less_than_one_window_of_text_is_refused() -> None:
    with pytest.raises(InputError, match="less than one window"):
        protocol_windows(iter(TEXTS[:1]), TOKENIZER, PerplexityProtocol(seqlen=500))
    with pytest.raises(InputError, match="has 0 tokens"):
        protocol_windows(iter(()), TOKENIZER, PerplexityProtocol())
    with pytest.raises(InputError, match="no text of two tokens"):
        protocol_windows(iter(()), TOKENIZER, PerplexityProtocol(unit="text"))


@pytest.mark.parametrize(
    "fields",
    [
        {"seqlen": 16, "stride": 17},
        {"seqlen": 16, "stride": 16, "bos": "window"},
        {"unit": "text", "stride": 4},
        {"unit": "text", "joined_by": " "},
        {"unit": "text", "normalisation": "byte"},
    ],
)
def test_protocols_that_contradict_themselves_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lower it|by itself|averages over texts"):
        PerplexityProtocol(**fields)
