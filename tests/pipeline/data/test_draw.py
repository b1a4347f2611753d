"""Pools of real text: what is drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import GenerationConfig, LlamaConfig

from pipeline.data import draw, windows
from pipeline.data.samples import SAMPLES_SCHEMA
from pipeline.errors import InputError
from pipeline.specs import (
    CorpusMixture,
    DrawSpec,
    FileCorpus,
    LocalModel,
    WeightedCorpus,
    WindowsSpec,
)
from pipeline.testbed.tokenizer import train_tokenizer

WORDS = ["ship", "sails", "over", "seven", "seas", "while", "déjà", "vu", "counts", "12", "stars"]


def texts(first: int, count: int) -> list[str]:
    draws = np.random.default_rng(first)
    return [
        f"{first + number} " + " ".join(draws.choice(WORDS, size=5 + 3 * number))
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(texts(0, 60), 320)


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=320).save_pretrained(folder)
    GenerationConfig().save_pretrained(folder)
    return LocalModel(path=str(folder))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileCorpus]:
    found = {}
    for name, first in (("log", 0), ("book", 100)):
        path = tmp_path_factory.mktemp("corpus") / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(first, 60)))
        found[name] = FileCorpus(path=str(path))
    return found


def mixed(corpora: dict[str, FileCorpus]) -> CorpusMixture:
    weights = {"log": 1.0, "book": 2.0}
    return CorpusMixture(
        parts={
            name: WeightedCorpus(corpus=corpora[name], weight=weight)
            for name, weight in weights.items()
        }
    )


def rows(folder: Path, name: str, module: Any, spec: Any) -> list[dict[str, Any]]:
    output = folder / spec.key
    output.mkdir()
    module.run(spec, {}, output)
    found: list[dict[str, Any]] = pq.read_table(output / name).to_pylist()
    return found


@pytest.mark.parametrize("several", [False, True], ids=["one corpus", "mixture"])
def test_a_pool_is_the_windows_that_the_same_corpus_gives(
    model: LocalModel, corpora: dict[str, FileCorpus], tmp_path: Path, tokenizer: Any, several: bool
) -> None:
    source = mixed(corpora) if several else corpora["log"]
    fields = {"source": source, "model": model, "seqlen": 32, "seed": 4}
    drawn = rows(tmp_path, "samples.parquet", draw, DrawSpec(num_samples=30, **fields))
    cut = rows(tmp_path, "windows.parquet", windows, WindowsSpec(nsamples=30, **fields))
    assert [row["token_ids"] for row in drawn] == [row["token_ids"] for row in cut]
    assert [row["sample_id"] for row in drawn] == list(range(30))
    assert {row["prefix_tokens"] for row in drawn} == {0}
    named = [row["document"].partition(":")[0] if several else None for row in cut]
    assert [row["source"] for row in drawn] == named
    if several:
        assert named.count("book") == 20
    for row in drawn:
        assert row["text"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)


def test_drawn_samples_have_the_columns_of_generated_ones(
    model: LocalModel, corpora: dict[str, FileCorpus], tmp_path: Path
) -> None:
    spec = DrawSpec(source=corpora["log"], model=model, num_samples=3, seqlen=32)
    report = draw.run(spec, {}, tmp_path)
    assert pq.read_schema(tmp_path / "samples.parquet").equals(SAMPLES_SCHEMA)
    assert report["samples"] == 3
    assert report["texts_read"] == 3 + report["texts_too_short"]


def test_too_few_long_texts_are_refused_by_the_name_of_the_pool(
    model: LocalModel, corpora: dict[str, FileCorpus], tmp_path: Path
) -> None:
    spec = DrawSpec(source=corpora["log"], model=model, num_samples=61, seqlen=8)
    with pytest.raises(InputError, match=r"pool: 61: .*of 60 texts.*lower seqlen or pool") as error:
        draw.run(spec, {}, tmp_path)
    assert "concat" not in error.value.remedy


def test_a_tokenizer_with_ids_that_the_model_lacks_is_refused(
    tokenizer: Any, corpora: dict[str, FileCorpus], tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=20).save_pretrained(tmp_path)
    GenerationConfig().save_pretrained(tmp_path)
    spec = DrawSpec(
        source=corpora["log"], model=LocalModel(path=str(tmp_path)), num_samples=3, seqlen=16
    )
    with pytest.raises(InputError, match="20"):
        draw.run(spec, {}, tmp_path)
