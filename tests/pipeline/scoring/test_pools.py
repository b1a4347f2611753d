"""Rules choose from real text: each from a planted pool in which the right choice is known, and the
scores of a pool are those of its texts, in any number of shards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import draw, windows
from pipeline.models.loading import load_model
from pipeline.scoring import filter as filtering
from pipeline.scoring import score
from pipeline.scoring.mean_states import WIDTH
from pipeline.scoring.score import Score, score_samples
from pipeline.specs import (
    CorpusMixture,
    DrawSpec,
    FileCorpus,
    FilterSpec,
    LocalModel,
    ScoreSpec,
    WeightedCorpus,
    WindowsSpec,
    WordList,
)

SEQLEN = 32
WORDS = [
    "the",
    "old",
    "shop",
    "sells",
    "red",
    "lamps",
    "near",
    "a",
    "quiet",
    "river",
    "bank",
    "now",
]


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> LocalModel:
    return LocalModel(path=str(tiny_model_folder / "model"), dtype="float32")


def corpus(path: Path, texts: list[str]) -> FileCorpus:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return FileCorpus(path=str(path))


def varied(number: int) -> str:
    return " ".join(np.random.default_rng(number).permutation(WORDS * 8))


class Stages:
    """The artifacts of stages that are run one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifacts: dict[str, Path] = {}

    def make(self, module: Any, spec: Any, *shard: int, key: str = "") -> pa.Table:
        """Run a stage, or a shard of one, and return its rows by number."""
        output = self.artifacts[key or spec.key] = self.folder / (key or spec.key)
        output.mkdir()
        (module.run_shard if shard else module.run)(spec, *shard, self.artifacts, output)
        name = "scores.parquet" if module is score else "samples.parquet"
        return pq.read_table(output / name).sort_by("sample_id")

    def score(self, spec: ScoreSpec) -> pa.Table:
        for part in spec.shards():
            self.make(score, spec, part.index, key=part.key)
        return self.make(score, spec)

    def planted(self, spec: ScoreSpec, **columns: Any) -> None:
        """Put given scores where those of a model would be."""
        output = self.artifacts[spec.key] = self.folder / spec.key
        output.mkdir()
        count = spec.samples.num_samples
        marks: dict[str, Any] = {name: [1.0] * count for name in Score._fields}
        marks |= {"sample_id": range(count), "tokens": [SEQLEN - 1] * count, **columns}
        pq.write_table(pa.table(marks), output / "scores.parquet")


ASCENDING = [float(number) for number in range(8)]
AXES = [0, 1, 2, 3, 3, 2, 1, 0]
NEAR_AXES = (np.eye(WIDTH)[AXES] + 0.01 * np.eye(WIDTH)[np.arange(8) + 8]).tolist()


@pytest.mark.parametrize(
    ("rule", "columns", "right"),
    [
        ("perplexity", {"perplexity": ASCENDING[::-1]}, [{4, 5, 6, 7}]),
        ("min-k-plus-plus", {"min_k_plus_plus": ASCENDING}, [{4, 5, 6, 7}]),
        # The samples of one word over and over have odd numbers, one in each quarter of perplexity.
        ("zipcal", {}, [{0, 2, 4, 6}]),
        ("igsp", {"perplexity": ASCENDING}, [{0, 2, 4, 6}]),
        ("cola", {"hidden_states": NEAR_AXES}, [{0, 7}, {1, 6}, {2, 5}, {3, 4}]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_rule_makes_the_right_choice_from_a_planted_pool(
    model: LocalModel, tmp_path: Path, rule: str, columns: dict[str, Any], right: list[set[int]]
) -> None:
    """With one set, that set is kept; with several, one sample of each."""
    texts = [varied(n) if n % 2 == 0 else f"{WORDS[n]} " * 60 for n in range(8)]
    source = corpus(tmp_path / "texts.jsonl", texts)
    drawn = DrawSpec(source=source, model=model, num_samples=8, seqlen=SEQLEN, seed=1)
    stages = Stages(tmp_path)
    samples = stages.make(draw, drawn)["text"].to_pylist()
    loops = [place for place, text in enumerate(samples) if len(set(text.split())) <= 3]
    # The seed draws the order; scores are planted in that of the texts.
    order = [place for place in range(8) if place not in loops]
    planted = [place for pair in zip(order, loops, strict=True) for place in pair]
    assert len(loops) == 4
    spec = ScoreSpec(samples=drawn, model=model, hidden_states="hidden_states" in columns)
    placed = {
        name: [value for _, value in sorted(zip(planted, values, strict=True), key=lambda x: x[0])]
        for name, values in columns.items()
    }
    stages.planted(spec, **placed)
    kept = stages.make(filtering, FilterSpec(scores=spec, drop_fraction=0.5, drop_by=rule))
    found = {planted.index(number) for number in kept["sample_id"].to_pylist()}
    assert len(found) == 4
    assert found == right[0] if len(right) == 1 else all(len(found & group) == 1 for group in right)


def test_each_source_of_a_pool_keeps_its_own_best(model: LocalModel, tmp_path: Path) -> None:
    parts = {
        name: WeightedCorpus(corpus=corpus(tmp_path / name, list(map(varied, numbers))), weight=1.0)
        for name, numbers in {"a.jsonl": range(4), "b.jsonl": range(9, 13)}.items()
    }
    source = CorpusMixture(parts=parts)
    drawn = DrawSpec(source=source, model=model, num_samples=8, seqlen=SEQLEN)
    stages = Stages(tmp_path)
    names = stages.make(draw, drawn)["source"].to_pylist()
    spec = ScoreSpec(samples=drawn, model=model)
    # All of the second corpus has higher perplexities than all of the first.
    losses = [number + 100.0 * (name == "b.jsonl") for number, name in enumerate(names)]
    stages.planted(spec, perplexity=losses)
    for within, expected in (("set", 4), ("source", 2)):
        choose = FilterSpec(scores=spec, drop_fraction=0.5, within=within)
        kept = stages.make(filtering, choose)
        assert kept["source"].to_pylist().count("a.jsonl") == expected
        best = [number for number, name in enumerate(names) if name == "a.jsonl"][:expected]
        assert set(best) <= set(kept["sample_id"].to_pylist())


def test_banned_words_are_found_in_drawn_text(model: LocalModel, tmp_path: Path) -> None:
    texts = [varied(n) if n % 2 else varied(n).replace("lamps", "clocks") for n in range(6)]
    (tmp_path / "words.txt").write_text("Lamps\n")
    source = corpus(tmp_path / "texts.jsonl", texts)
    drawn = DrawSpec(source=source, model=model, num_samples=6, seqlen=SEQLEN)
    stages = Stages(tmp_path)
    texts = stages.make(draw, drawn)["text"].to_pylist()
    choose = FilterSpec(
        scores=ScoreSpec(samples=drawn, model=model),
        drop_fraction=0.0,
        drop_by="random",
        banned_words=WordList(path=str(tmp_path / "words.txt")),
    )
    free = [text for text in texts if "lamps" not in text]
    assert 3 <= len(free) < 6
    assert stages.make(filtering, choose)["text"].to_pylist() == free


@pytest.fixture(scope="module")
def pool(model: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> DrawSpec:
    path = tmp_path_factory.mktemp("pool") / "texts.jsonl"
    source = corpus(path, list(map(varied, range(14))))
    return DrawSpec(source=source, model=model, num_samples=12, seqlen=SEQLEN, shard_size=12)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pool_has_the_scores_of_its_texts_in_any_number_of_shards(
    model: LocalModel, pool: DrawSpec, tmp_path: Path, shards: int
) -> None:
    drawn = pool.model_copy(update={"shard_size": 12 // shards})
    spec = ScoreSpec(samples=drawn, model=model)
    assert spec.shard_count == shards
    stages = Stages(tmp_path)
    ids = stages.make(draw, drawn)["token_ids"].to_pylist()
    scores = stages.score(spec)
    assert scores["sample_id"].to_pylist() == list(range(12))
    assert scores["tokens"].to_pylist() == [SEQLEN - 1] * 12  # nothing precedes the first
    plain = score_samples(load_model(model, {}), ids, [0] * 12)
    perplexities = [each.perplexity for each in plain]
    assert scores["perplexity"].to_pylist() == pytest.approx(perplexities, rel=1e-5)


def test_one_shard_and_two_keep_the_same_samples(
    model: LocalModel, pool: DrawSpec, tmp_path: Path
) -> None:
    kept = []
    for shards in (1, 2):
        drawn = pool.model_copy(update={"shard_size": 12 // shards})
        spec = ScoreSpec(samples=drawn, model=model, hidden_states=True)
        (tmp_path / str(shards)).mkdir()
        stages = Stages(tmp_path / str(shards))
        stages.make(draw, drawn)
        stages.score(spec)
        # Not cola: clusters of nearly equal hidden states turn on the last bits of a batch.
        rules = ("perplexity", "min-k-plus-plus", "igsp")
        chosen = [FilterSpec(scores=spec, drop_fraction=0.5, drop_by=rule) for rule in rules]
        kept.append([stages.make(filtering, each)["token_ids"].to_pylist() for each in chosen])
    assert kept[0] == kept[1]


def test_the_sets_of_an_unfiltered_pool_are_windows_of_its_corpus(
    model: LocalModel, pool: DrawSpec, tmp_path: Path
) -> None:
    """All of the pool are the windows that the corpus gives without one, in another order."""
    stages = Stages(tmp_path)
    stages.make(draw, pool)
    scores = ScoreSpec(samples=pool, model=model)
    everything = FilterSpec(scores=scores, drop_fraction=0.0, drop_by="random")
    stages.make(filtering, everything)

    def cut(source: Any, nsamples: int) -> list[list[int]]:
        spec = WindowsSpec(source=source, model=model, nsamples=nsamples, seqlen=SEQLEN)
        output = tmp_path / spec.key
        output.mkdir()
        windows.run(spec, stages.artifacts, output)
        found: list[list[int]] = windows.read_windows(output).tolist()
        return found

    whole = cut(pool.source, 12)
    assert sorted(cut(everything, 12)) == sorted(whole)
    some = cut(everything, 5)
    assert len({tuple(window) for window in some}) == 5
    assert all(window in whole for window in some)
