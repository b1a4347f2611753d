import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.samples import SAMPLES_SCHEMA
from pipeline.errors import InputError, NonFiniteError
from pipeline.scoring import filter as filtering
from pipeline.scoring.filter import reasons_to_drop
from pipeline.scoring.score import Score
from pipeline.specs import (
    FileCorpus,
    FilterOptions,
    FilterSpec,
    GenerateSpec,
    LocalModel,
    ScoreSpec,
    WordList,
)

PERPLEXITY = st.one_of(st.floats(1.0, 100.0), st.sampled_from([2.0, 3.0, None]))

NO_OTHERS = {"banned": 0, "near_duplicates": 0}


def kept(
    perplexities: list[float | None], fraction: float, ids: list[int] | None = None
) -> list[int]:
    numbers = list(range(len(perplexities))) if ids is None else ids
    samples = pa.table({"token_ids": [[1]] * len(numbers)})
    scores = pa.table(
        {"sample_id": numbers, "perplexity": pa.array(perplexities, type=pa.float64())}
    )
    reasons = reasons_to_drop(samples, scores, FilterOptions(drop_fraction=fraction))
    return [number for number, reason in zip(numbers, reasons, strict=True) if reason == ""]


@given(st.lists(PERPLEXITY, min_size=1, max_size=60), st.integers(0, 15), st.randoms())
def test_exactly_the_given_share_with_the_highest_perplexity_is_dropped(
    perplexities: list[float | None], sixteenths: int, random: Any
) -> None:
    ids = random.sample(range(1000), len(perplexities))
    finite = [(p, n) for p, n in zip(perplexities, ids, strict=True) if p is not None]
    dropped = math.floor(Fraction(sixteenths, 16) * len(finite) + Fraction(1, 2))
    best = sorted(finite)[: len(finite) - dropped]
    if best:
        assert sorted(kept(perplexities, sixteenths / 16, ids)) == sorted(n for _, n in best)
    else:
        with pytest.raises(InputError, match="nothing is left"):
            kept(perplexities, sixteenths / 16, ids)


def test_of_equal_perplexities_the_higher_number_is_dropped_first() -> None:
    assert kept([5.0, 5.0, 5.0, 5.0], 0.5) == [0, 1]
    assert kept([5.0, 5.0, 5.0, 5.0], 0.5, ids=[9, 2, 7, 4]) == [2, 4]
    assert kept([1.0, 5.0, 5.0, 2.0], 0.25) == [0, 1, 3]


def test_half_a_sample_is_rounded_up() -> None:
    assert kept([1.0, 2.0], 0.25) == [0]
    assert kept([1.0, 2.0, 3.0], 0.125) == [0, 1, 2]


def test_samples_without_a_perplexity_are_dropped_besides_the_share() -> None:
    assert kept([None, 4.0, None, 1.0, 3.0, 2.0], 0.5) == [3, 5]
    assert kept([None, 4.0, None], 0.0) == [1]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_the_first_perplexity_that_is_not_finite_is_named(wrong: float) -> None:
    with pytest.raises(NonFiniteError, match=f"sample 7: its perplexity is {wrong:g}"):
        kept([2.0, None, wrong, math.inf], 0.2, ids=[3, 5, 7, 9])


def test_samples_that_are_all_invalid_are_refused() -> None:
    with pytest.raises(InputError, match="of 2 samples 0 have a token to score"):
        kept([None, None], 0.0)


def test_of_equal_samples_the_first_is_kept_and_they_do_not_count_in_the_share(
    tmp_path: Path,
) -> None:
    model = LocalModel(path="model")
    samples = GenerateSpec(model=model, prefixes=FileCorpus(path="texts.txt"), num_samples=7)
    scores = ScoreSpec(samples=samples, model=model)
    ids = [[1, 2], [1], [1, 2], [3], [4], [4], [1, 2]]
    columns = {
        "sample_id": range(7),
        "source": [None] * 7,
        "prefix_tokens": [1] * 7,
        "token_ids": ids,
        "text": [""] * 7,
    }
    pq.write_table(pa.table(columns, schema=SAMPLES_SCHEMA), tmp_path / "samples.parquet")
    perplexities = [2.0, 9.0, 2.0, 3.0, None, None, 2.0]
    marks: dict[str, Any] = {"sample_id": range(7), **dict.fromkeys(Score._fields, [1.0] * 7)}
    pq.write_table(pa.table({**marks, "perplexity": perplexities}), tmp_path / "scores.parquet")
    artifacts = dict.fromkeys((samples.key, scores.key), tmp_path)
    spec = FilterSpec(scores=scores, drop_fraction=0.4, drop_duplicates=True)
    output = tmp_path / "output"
    output.mkdir()
    report = filtering.run(spec, artifacts, output)
    assert report == {"kept": 2, "dropped": 1, "invalid": 2, "duplicates": 2, **NO_OTHERS}
    rejected = pq.read_table(output / "rejected.parquet")
    assert rejected["sample_id"].to_pylist() == [1, 2, 4, 5, 6]
    assert rejected["reason"].to_pylist() == [
        "perplexity",
        "duplicate",
        "invalid",
        "invalid",
        "duplicate",
    ]


def test_a_sample_has_the_first_reason_that_holds_and_the_share_is_of_the_rest(
    tmp_path: Path,
) -> None:
    (tmp_path / "words.txt").write_text("Bad\n\n")
    model = LocalModel(path="model")
    samples = GenerateSpec(model=model, prefixes=FileCorpus(path="texts.txt"), num_samples=8)
    scores = ScoreSpec(samples=samples, model=model)
    long = list(range(60))
    like = [*long[:-1], 99]
    columns = {
        "sample_id": range(8),
        "source": [None] * 8,
        "prefix_tokens": [1] * 8,
        # The second is like the first, which does not count, since it holds the word.
        "token_ids": [long, like, like, [*long[:-2], 98, 99], [1], [2], [3], [4]],
        "text": ["a bad one", "good", "good", "good", "bad", "", "badly", ""],
    }
    pq.write_table(pa.table(columns, schema=SAMPLES_SCHEMA), tmp_path / "samples.parquet")
    perplexities = [1.0, 2.0, 2.0, 3.0, None, 9.0, 4.0, 5.0]
    marks: dict[str, Any] = {"sample_id": range(8), **dict.fromkeys(Score._fields, [1.0] * 8)}
    pq.write_table(pa.table({**marks, "perplexity": perplexities}), tmp_path / "scores.parquet")
    spec = FilterSpec(
        scores=scores,
        drop_fraction=0.25,
        banned_words=WordList(path=str(tmp_path / "words.txt")),
        drop_duplicates=True,
        near_duplicate_similarity=0.8,
    )
    output = tmp_path / "output"
    output.mkdir()
    report = filtering.run(spec, dict.fromkeys((samples.key, scores.key), tmp_path), output)
    rejected = pq.read_table(output / "rejected.parquet")
    reasons = dict(
        zip(rejected["sample_id"].to_pylist(), rejected["reason"].to_pylist(), strict=True)
    )
    assert reasons == {
        0: "banned word",
        2: "duplicate",
        3: "near duplicate",
        4: "invalid",
        5: "perplexity",
    }
    assert report == {
        "kept": 3,
        "dropped": 1,
        "invalid": 1,
        "banned": 1,
        "duplicates": 1,
        "near_duplicates": 1,
    }


def test_the_stage_writes_the_kept_samples_with_their_scores(tmp_path: Path) -> None:
    model = LocalModel(path="model")
    samples = GenerateSpec(model=model, prefixes=FileCorpus(path="texts.txt"), num_samples=5)
    scores = ScoreSpec(samples=samples, model=model)
    artifacts = {samples.key: tmp_path / "samples", scores.key: tmp_path / "scores"}
    output = tmp_path / "output"
    for folder in (*artifacts.values(), output):
        folder.mkdir()
    numbers = [4, 2, 0, 1, 3]
    columns = {
        "sample_id": numbers,
        "source": [f"source {number}" for number in numbers],
        "prefix_tokens": [number % 3 for number in numbers],
        "token_ids": [[number] * (number + 1) for number in numbers],
        "text": [f"text {number}" for number in numbers],
    }
    pq.write_table(
        pa.table(columns, schema=SAMPLES_SCHEMA), artifacts[samples.key] / "samples.parquet"
    )
    marks: dict[str, Any] = {
        "sample_id": range(5),
        "tokens": [1] * 5,
        "perplexity": [9.0, 2.0, None, 7.0, 8.0],
        **{name: [0.5 * row for row in range(5)] for name in Score._fields[2:]},
    }
    pq.write_table(pa.table(marks), artifacts[scores.key] / "scores.parquet")

    report = filtering.run(FilterSpec(scores=scores, drop_fraction=0.25), artifacts, output)

    assert report == {"kept": 3, "dropped": 1, "invalid": 1, "duplicates": 0, **NO_OTHERS}
    table = pq.read_table(output / "samples.parquet")
    rejected = pq.read_table(output / "rejected.parquet")
    reasons = rejected["reason"].to_pylist()
    assert dict(zip(rejected["sample_id"].to_pylist(), reasons, strict=True)) == {
        0: "perplexity",
        2: "invalid",
    }
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    rest = rejected.drop_columns("reason").to_pylist()
    assert list(rows) == [1, 3, 4]
    for row in [*rows.values(), *rest]:
        number = row["sample_id"]
        assert row.pop("perplexity") == pytest.approx(marks["perplexity"][number], nan_ok=True)
        assert row == {
            "sample_id": number,
            "source": f"source {number}",
            "prefix_tokens": number % 3,
            "token_ids": [number] * (number + 1),
            "text": f"text {number}",
            "tokens": 1,
            **dict.fromkeys(Score._fields[2:], 0.5 * number),
        }
