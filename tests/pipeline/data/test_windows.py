import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from pipeline.data.corpora import Document
from pipeline.data.windows import (
    BATCH,
    Tokens,
    concat_windows,
    read_windows,
    run,
    sample_windows,
    strip_ends,
    tokenized,
)
from pipeline.errors import InputError
from pipeline.specs import (
    Corpus,
    CorpusMixture,
    FileCorpus,
    FilterSpec,
    GenerateSpec,
    LocalModel,
    ScoreSpec,
    TestbedCorpus,
    WeightedCorpus,
    WindowsSpec,
)
from pipeline.testbed.tokenizer import train_tokenizer

WORDS = ["ship", "sails", "over", "seven", "seas", "while", "déjà", "vu", "counts", "12", "stars"]


def text(number: int, words: int) -> str:
    draws = np.random.default_rng(number)
    return f"{number} " + " ".join(draws.choice(WORDS, size=words))


TEXTS = {f"corpus.jsonl:{number}": text(number, 5 + 3 * number) for number in range(60)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS.values(), 320)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> FileCorpus:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS.values()))
    return FileCorpus(path=str(path))


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    folder = tmp_path_factory.mktemp("model")
    return named(folder, tokenizer)


def named(folder: Path, tokenizer: Any, rows: int = 320, **settings: Any) -> LocalModel:
    """A model without weights, since windows need none."""
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=rows).save_pretrained(folder)
    GenerationConfig(**settings).save_pretrained(folder)
    return LocalModel(path=str(folder))


@pytest.fixture
def rows(
    model: LocalModel, corpus: FileCorpus, tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    """Return the rows that a run writes."""

    def cut(source: Any = corpus, **fields: Any) -> list[dict[str, Any]]:
        spec = WindowsSpec(source=source, model=model, **fields)
        output = tmp_path / spec.key
        output.mkdir(exist_ok=True)
        artifacts = {source.key: tmp_path} if isinstance(source, GenerateSpec | FilterSpec) else {}
        run(spec, artifacts, output)
        table = pq.read_table(output / "windows.parquet")
        assert table.schema.names == ["window", "document", "offset", "token_ids"]
        written: list[dict[str, Any]] = table.to_pylist()
        assert [row["window"] for row in written] == list(range(spec.nsamples))
        return written

    return cut


def test_every_window_is_the_stretch_of_its_document_at_its_offset(
    rows: Callable[..., list[dict[str, Any]]], tokenizer: Any
) -> None:
    for row in rows(nsamples=20, seqlen=64):
        ids = tokenizer(TEXTS[row["document"]])["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert row["token_ids"] == ids[row["offset"] : row["offset"] + 64]
        assert len(row["token_ids"]) == 64


def test_every_text_long_enough_is_used_once_and_no_other(
    rows: Callable[..., list[dict[str, Any]]], tokenizer: Any
) -> None:
    long = [name for name, text in TEXTS.items() if len(tokenizer(text)["input_ids"]) >= 64]
    assert 20 < len(long) < 60
    written = rows(nsamples=len(long), seqlen=64)
    assert sorted(row["document"] for row in written) == sorted(long)
    assert [row["document"] for row in written] != long


def test_a_seed_draws_the_texts_too(rows: Callable[..., list[dict[str, Any]]]) -> None:
    for packing in ("sample", "concat"):
        first, second = (
            {row["document"] for row in rows(nsamples=4, seqlen=32, packing=packing, seed=seed)}
            for seed in (0, 1)
        )
        assert first != second


def test_a_text_of_exactly_seqlen_tokens_gives_all_of_itself() -> None:
    ids = np.arange(16, dtype=np.int32)
    cut = sample_windows([Tokens("a", ids[:15]), Tokens("b", ids)], 1, 16, seed=0)
    assert cut.windows[0].document == "b"
    assert cut.windows[0].offset == 0
    assert (cut.texts_read, cut.texts_too_short, cut.tokens_read) == (2, 1, 31)


def test_offsets_are_uniform_over_all_starts_both_ends_included() -> None:
    ids = np.arange(12, dtype=np.int32)
    texts = [Tokens(str(number), ids) for number in range(5000)]
    count = Counter(window.offset for window in sample_windows(texts, 5000, 8, seed=1).windows)
    assert set(count) == {0, 1, 2, 3, 4}
    chi_square = sum((times - 1000) ** 2 / 1000 for times in count.values())
    assert chi_square < 18.5  # the 0.1 % point of 4 degrees of freedom


def test_the_same_spec_gives_the_same_bytes_and_another_seed_others(
    model: LocalModel, corpus: FileCorpus, tmp_path: Path
) -> None:
    def content(folder: str, seed: int, packing: str) -> bytes:
        output = tmp_path / folder
        output.mkdir()
        spec = WindowsSpec.model_validate(
            {
                "source": corpus,
                "model": model,
                "nsamples": 8,
                "seqlen": 32,
                "seed": seed,
                "packing": packing,
            }
        )
        run(spec, {}, output)
        return (output / "windows.parquet").read_bytes()

    for packing in ("sample", "concat"):
        first = content(f"{packing}-a", 0, packing)
        assert first == content(f"{packing}-b", 0, packing)
        assert first != content(f"{packing}-c", 1, packing)


def test_too_little_text_is_refused_with_counts_and_remedy(
    rows: Callable[..., list[dict[str, Any]]], tokenizer: Any
) -> None:
    longest = max(len(tokenizer(text)["input_ids"]) for text in TEXTS.values())
    with pytest.raises(InputError) as error:
        rows(nsamples=61, seqlen=8)
    assert "61 windows of 8 tokens" in str(error.value)
    assert "of 60 texts" in str(error.value)
    assert f"the longest has {longest} tokens" in str(error.value)
    assert "packing: concat" in str(error.value)
    with pytest.raises(InputError, match="of 60 texts only 0"):
        rows(nsamples=1, seqlen=longest + 1)
    with pytest.raises(InputError, match=r"all 60 texts together have \d+ tokens"):
        rows(nsamples=1, seqlen=100_000, packing="concat")


def test_the_endless_testbed_ends_when_its_texts_are_too_short(
    rows: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.corpora.TESTBED_TEXTS", 40)
    with pytest.raises(InputError, match="of 80 texts only 0"):
        rows(TestbedCorpus(mixture={"facts": 1.0}), nsamples=2, seqlen=100_000)


def test_at_most_a_batch_is_read_in_excess(tokenizer: Any) -> None:
    read = []

    def endless() -> Iterator[Document]:
        for number in itertools.count():
            read.append(number)
            yield Document(str(number), text(number, 20))

    texts = tokenized(endless(), tokenizer, special_tokens=True)
    sample_windows(texts, 40, 8, seed=0)
    assert len(read) <= 40 + BATCH


def test_concat_joins_the_texts_without_special_tokens_and_cuts_across_them() -> None:
    texts = [Tokens("a", np.array([1, 2, 3], np.int32)), Tokens("b", np.array([4, 5], np.int32))]
    cut = concat_windows(texts, 300, 2, seed=0)
    expected = {("a", 0, 1, 2), ("a", 1, 2, 3), ("a", 2, 3, 4), ("b", 0, 4, 5)}
    assert {(text, offset, *ids.tolist()) for text, offset, ids in cut.windows} == expected
    count = Counter(window.ids[0] for window in cut.windows)
    assert min(count.values()) > 45  # 75 of each expected, standard deviation 7.5


@pytest.mark.parametrize("nsamples", [1, 3, 40])
def test_a_token_that_two_windows_share_counts_once(nsamples: int) -> None:
    ids = np.arange(200, dtype=np.int32)  # each once, so that a set counts them
    cut = concat_windows([Tokens("a", ids[:50]), Tokens("b", ids[50:])], nsamples, 16, seed=0)
    assert cut.distinct_tokens == len({token for window in cut.windows for token in window.ids})


def test_an_empty_text_adds_nothing_to_a_concatenation() -> None:
    ids = np.array([1, 2], np.int32)
    texts = [Tokens("a", ids), Tokens("empty", ids[:0]), Tokens("b", ids)]
    cut = concat_windows(texts, 50, 1, seed=0)
    assert {(window.document, window.offset) for window in cut.windows} == {
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    }


def test_a_concatenated_corpus_is_the_join_of_its_texts_in_the_seeds_order(
    rows: Callable[..., list[dict[str, Any]]], tokenizer: Any
) -> None:
    written = rows(nsamples=30, seqlen=16, packing="concat", seed=2)
    crossing = 0
    for row in written:
        ids = tokenizer(TEXTS[row["document"]], add_special_tokens=False)["input_ids"]
        inside = ids[row["offset"] : row["offset"] + 16]
        assert row["token_ids"][: len(inside)] == inside
        crossing += len(inside) < 16
    assert crossing > 0
    assert not any(tokenizer.bos_token_id in row["token_ids"] for row in written)


def generated(folder: Path, model: LocalModel) -> tuple[GenerateSpec, dict[int, list[int]]]:
    """Samples with ids that a tokenizer would not give for their decoded text."""
    draws = np.random.default_rng(0)
    samples = {
        number: [0, *draws.integers(3, 300, size=20 + number).tolist(), 1] for number in range(12)
    }
    order = [5, 0, 11, *range(1, 5), *range(6, 11)]
    columns = {
        "sample_id": pa.array(order, pa.int64()),
        "prefix_tokens": pa.array([3] * 12, pa.int32()),
        "token_ids": pa.array([samples[number] for number in order], pa.list_(pa.int32())),
        "text": pa.array(["no matter"] * 12),
    }
    pq.write_table(pa.table(columns), folder / "samples.parquet")
    prefixes = TestbedCorpus(mixture={"facts": 1.0})
    return GenerateSpec(model=model, prefixes=prefixes, num_samples=12, seqlen=64), samples


def test_generated_samples_are_not_tokenised_again(
    rows: Callable[..., list[dict[str, Any]]], model: LocalModel, tokenizer: Any, tmp_path: Path
) -> None:
    spec, samples = generated(tmp_path, model)
    again = tokenizer(tokenizer.decode(samples[0][1:-1]))["input_ids"]
    assert again[1:] != samples[0][1:-1]
    for source in (spec, FilterSpec(scores=ScoreSpec(samples=spec, model=model))):
        written = rows(source, nsamples=10, seqlen=24)
        assert len({row["document"] for row in written}) == 10
        assert [row["document"] for row in written] != sorted(row["document"] for row in written)
        for row in written:
            ids = samples[int(row["document"])]
            assert row["token_ids"] == ids[row["offset"] : row["offset"] + 24]


def test_joined_samples_lose_their_begin_and_end_tokens_and_keep_their_order(
    rows: Callable[..., list[dict[str, Any]]], model: LocalModel, tmp_path: Path
) -> None:
    spec, samples = generated(tmp_path, model)
    joined = [token for number in range(12) for token in samples[number][1:-1]]
    starts = np.cumsum([0] + [len(samples[number]) - 2 for number in range(12)])
    for row in rows(spec, nsamples=20, seqlen=48, packing="concat"):
        start = int(starts[int(row["document"])]) + row["offset"]
        assert row["token_ids"] == joined[start : start + 48]


def test_joined_samples_lose_every_end_id_of_the_generators_checkpoint(
    model: LocalModel, tokenizer: Any, tmp_path: Path
) -> None:
    """The generator's settings list a second end, as those of chat models do."""
    _, samples = generated(tmp_path, model)
    inner = {edge for ids in samples.values() for edge in (ids[1], ids[-2])}
    second = min(set(range(3, 200)) - inner)
    generator = named(tmp_path / "generator", tokenizer, eos_token_id=[1, second])
    spec, _ = generated(tmp_path, generator)
    rows = [[*ids[:-1], second if number % 2 else 1] for number, ids in samples.items()]
    columns = {"sample_id": list(samples), "token_ids": pa.array(rows, pa.list_(pa.int32()))}
    pq.write_table(pa.table(columns), tmp_path / "samples.parquet")
    cut = WindowsSpec(source=spec, model=model, nsamples=40, seqlen=48, packing="concat")
    run(cut, {spec.key: tmp_path}, tmp_path)
    joined = [token for number in range(12) for token in samples[number][1:-1]]
    found = {tuple(window.tolist()) for window in read_windows(tmp_path)}
    assert found <= {tuple(joined[place : place + 48]) for place in range(len(joined))}


def test_windows_are_cut_only_of_ids_that_mean_the_same_to_the_model(
    tokenizer: Any, tmp_path: Path
) -> None:
    writer = named(tmp_path / "writer", tokenizer)
    spec, _ = generated(tmp_path, writer)

    def cut(reader: LocalModel) -> None:
        windows = WindowsSpec(source=spec, model=reader, nsamples=4, seqlen=20)
        run(windows, {spec.key: tmp_path}, tmp_path)

    cut(named(tmp_path / "same", tokenizer))
    unlike = named(tmp_path / "unlike", train_tokenizer(["quite another language"], 280))
    with pytest.raises(InputError, match=r"generator: '.*writer': its .*unlike, whose voc.*\('"):
        cut(unlike)
    with pytest.raises(InputError, match=r"200 rows of embeddings for 320: none for id 200;"):
        cut(named(tmp_path / "small", tokenizer, rows=200))
    with pytest.raises(InputError, match=r"token_ids: 299: .* only 299 rows of embeddings"):
        cut(named(tmp_path / "unpadded", tokenizer, rows=299))  # 299 is no token's id


def test_only_the_ends_of_a_sample_are_stripped() -> None:
    ids = [0, 7, 1, 8, 1, 2, 2]
    (stripped,) = strip_ends([Tokens("a", np.array(ids, np.int32))], [0, 1, 2])
    assert stripped.ids.tolist() == [7, 1, 8]
    (nothing,) = strip_ends([Tokens("a", np.array([0, 1], np.int32))], [0, 1, 2])
    assert nothing.ids.tolist() == []


def test_read_windows_gives_the_written_ids_as_a_matrix(
    model: LocalModel, corpus: Corpus, tmp_path: Path
) -> None:
    spec = WindowsSpec(source=corpus, model=model, nsamples=5, seqlen=16)
    report = run(spec, {}, tmp_path)
    read = read_windows(tmp_path)
    assert read.shape == (5, 16)
    assert read.dtype == torch.int64
    assert read.tolist() == pq.read_table(tmp_path / "windows.parquet")["token_ids"].to_pylist()
    assert report["tokens"] == report["distinct_tokens"] == 80
    assert report["overlap"] == 0.0
    assert report["texts_read"] == 5 + report["texts_too_short"]


@pytest.mark.parametrize("packing", ["sample", "concat"])
def test_a_mixture_has_the_windows_that_each_part_alone_would_give(
    packing: Literal["sample", "concat"], corpus: FileCorpus, model: LocalModel, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    lines = [json.dumps({"text": f"other {text(n, 60)}"}) + "\n" for n in range(20)]
    other.write_text("".join(lines))
    parts: dict[str, Corpus] = {"one": corpus, "two": FileCorpus(path=str(other))}
    weights = {"one": 1.0, "two": 2.0}
    mixture = CorpusMixture(
        parts={
            name: WeightedCorpus(corpus=part, weight=weights[name]) for name, part in parts.items()
        }
    )

    def cut(source: Corpus | CorpusMixture, nsamples: int) -> list[dict[str, Any]]:
        folder = tmp_path / f"{source.kind}-{nsamples}"
        folder.mkdir()
        spec = WindowsSpec(
            source=source, model=model, nsamples=nsamples, seqlen=16, packing=packing, seed=3
        )
        run(spec, {}, folder)
        return pq.read_table(folder / "windows.parquet").to_pylist()

    mixed = cut(mixture, 9)
    for name, count in (("one", 3), ("two", 6)):
        own = [row for row in mixed if row["document"].startswith(f"{name}:")]
        alone = cut(parts[name], count)
        assert [row["token_ids"] for row in own] == [row["token_ids"] for row in alone]
        assert [row["document"] for row in own] == [f"{name}:{row['document']}" for row in alone]
    assert [row["window"] for row in mixed] == list(range(9))
