import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.data.corpora import read_documents
from pipeline.data.prefixes import chat_prompts, prefix_sources, read_prefixes, turns
from pipeline.errors import InputError
from pipeline.generation import generate
from pipeline.specs import (
    CorpusMixture,
    FileCorpus,
    GenerateSpec,
    LocalModel,
    TestbedCorpus,
    WeightedCorpus,
)
from pipeline.testbed.tokenizer import train_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
FOREIGN = ["это первый текст", "вот второй", "и ещё третий текст", "четвёртый", "пятый текст"]
ENGLISH = ["the first text", "here is another", "and a third one", "the fourth text", "a fifth"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([*FOREIGN, *ENGLISH], 512)


@pytest.fixture(scope="module")
def chatting(tokenizer: Any) -> Any:
    other = train_tokenizer([*FOREIGN, *ENGLISH], 512)
    other.chat_template = TEMPLATE
    return other


@pytest.fixture
def spec(tmp_path: Path) -> GenerateSpec:
    for name, texts in (("foreign", FOREIGN), ("english", ENGLISH)):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
    return GenerateSpec(
        model=LocalModel(path=str(tmp_path / "model"), dtype="float32"),
        prefixes=CorpusMixture(
            parts={
                "russian": part(tmp_path / "foreign.txt", 1),
                "english": part(tmp_path / "english.txt", 3),
            }
        ),
        num_samples=6,
        prefix_tokens=2,
        seqlen=32,
        shard_size=4,
    )


def part(path: Path, weight: float) -> WeightedCorpus:
    return WeightedCorpus(corpus=FileCorpus(path=str(path)), weight=weight)


def changed(spec: GenerateSpec, **fields: Any) -> GenerateSpec:
    return GenerateSpec.model_validate({**spec.model_dump(), **fields})


# --------------------------------------------------------------------------------------- mixtures


@settings(deadline=None)
@given(
    weights=st.lists(st.one_of(st.integers(1, 50), st.floats(1e-3, 1e3)), min_size=2, max_size=7),
    count=st.integers(1, 150),
)
def test_the_first_n_turns_give_each_part_its_share(weights: list[float], count: int) -> None:
    exact = [Fraction(str(weight)) for weight in weights]
    counts = Counter[int]()
    for done, chosen in enumerate(turns(weights, count), start=1):
        counts[chosen] += 1
        for place, weight in enumerate(exact):
            quota = weight / sum(exact) * done
            assert math.floor(quota) <= counts[place] <= math.ceil(quota)


def test_a_share_is_the_decimal_number_in_the_grid() -> None:
    assert Counter(turns((0.1, 0.2, 0.7), 1000)) == {0: 100, 1: 200, 2: 700}


def test_the_source_of_a_sample_depends_neither_on_num_samples_nor_on_the_parts_order(
    spec: GenerateSpec,
) -> None:
    names = prefix_sources(spec)
    assert Counter(prefix_sources(changed(spec, num_samples=400))) == {
        "english": 300,
        "russian": 100,
    }
    assert prefix_sources(changed(spec, num_samples=400))[:6] == names
    assert isinstance(spec.prefixes, CorpusMixture)
    swapped = CorpusMixture(parts=dict(reversed(spec.prefixes.parts.items())))
    other = changed(spec, prefixes=swapped)
    assert list(swapped.parts) != list(spec.prefixes.parts)
    assert (prefix_sources(other), other.key) == (names, spec.key)
    assert prefix_sources(changed(spec, prefix_tokens=0)) == [None] * 6


def test_each_prefix_is_the_next_text_of_its_source(spec: GenerateSpec, tokenizer: Any) -> None:
    assert isinstance(spec.prefixes, CorpusMixture)
    texts = {
        name: read_documents(entry.corpus, spec.seed) for name, entry in spec.prefixes.parts.items()
    }
    found = read_prefixes(spec, tokenizer)
    for prefix, name in zip(found, prefix_sources(spec), strict=True):
        assert name is not None
        assert prefix == tokenizer(next(texts[name]).text)["input_ids"][:3]
    assert found != read_prefixes(changed(spec, seed=1), tokenizer)


def test_a_source_that_is_too_short_for_its_share_is_named(
    spec: GenerateSpec, tokenizer: Any
) -> None:
    read_prefixes(spec, tokenizer)
    with pytest.raises(InputError, match=r"english\.txt.*6 texts of .* are needed, 5 were found"):
        read_prefixes(changed(spec, num_samples=8), tokenizer)


def test_the_stage_writes_the_source_of_every_sample(
    spec: GenerateSpec, tokenizer: Any, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    artifacts = {}
    for shard in spec.shards():
        artifacts[shard.key] = tmp_path / shard.key
        artifacts[shard.key].mkdir()
        generate.run_shard(spec, shard.index, artifacts, artifacts[shard.key])
    generate.run(spec, artifacts, tmp_path)
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert [row["source"] for row in rows] == prefix_sources(spec)
    assert {row["source"] for row in rows} == {"english", "russian"}
    for row in rows:
        cyrillic = any("а" <= letter <= "я" for letter in tokenizer.decode(row["token_ids"][1:3]))
        assert cyrillic == (row["source"] == "russian")


# ------------------------------------------------------------------------------------------- chats


def test_a_chat_prompt_is_the_template_around_the_beginning_of_a_text(chatting: Any) -> None:
    prompts = list(chat_prompts([*ENGLISH, "a"], chatting, 3))
    long = [text for text in ENGLISH if len(chatting(text)["input_ids"]) > 3]
    assert len(prompts) == len(long)
    for prompt, text in zip(prompts, long, strict=True):
        beginning = chatting.decode(chatting(text)["input_ids"][1:4])
        assert text.startswith(beginning)
        written = f"<s>[user] {beginning}\n[assistant] "
        assert chatting.decode(prompt, clean_up_tokenization_spaces=False) == written
        assert prompt.count(chatting.bos_token_id) == 1
        assert prompt == chatting(written, add_special_tokens=False)["input_ids"]


def test_an_incomplete_character_is_left_out_of_a_message(chatting: Any) -> None:
    text = "\U0001f40d snake"
    assert len(chatting(text)["input_ids"]) > 4
    (prompt,) = chat_prompts([text], chatting, 2)
    assert chatting.decode(prompt) == "<s>[user] \n[assistant] "


def test_a_chat_needs_a_template(spec: GenerateSpec, tokenizer: Any, chatting: Any) -> None:
    chat = changed(spec, prompt="chat")
    assert read_prefixes(chat, chatting) != read_prefixes(spec, chatting)
    with pytest.raises(InputError, match="prompt: 'chat': the tokenizer has no chat template"):
        read_prefixes(chat, tokenizer)


def test_prompts_of_a_chat_may_come_from_the_testbed(spec: GenerateSpec, chatting: Any) -> None:
    corpus = TestbedCorpus(mixture={"facts": 1.0})
    prompts = read_prefixes(changed(spec, prefixes=corpus, prompt="chat"), chatting)
    assert len(prompts) == spec.num_samples
