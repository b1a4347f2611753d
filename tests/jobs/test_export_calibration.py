"""Generated calibration sets of a store, exported as data sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import transformers
from typer.testing import CliRunner

from cluster.store import Store
from jobs.__main__ import app
from jobs.export_calibration import SAMPLE_COLUMNS, export_calibration
from pipeline.errors import InputError
from pipeline.generation import generate
from pipeline.scoring import filter as filtering
from pipeline.scoring import score
from pipeline.specs import (
    FilterSpec,
    GenerateSpec,
    Magnitude,
    PruneSpec,
    ScoreSpec,
    StageSpec,
    TestbedCorpus,
    Wanda,
    WindowsSpec,
)
from pipeline.testbed.presets import PRETRAIN_PRESETS

TINY = PRETRAIN_PRESETS["tiny"]
SAMPLES = GenerateSpec(
    model=TINY, prefixes=TestbedCorpus(mixture={"facts": 1.0}), num_samples=12, seqlen=48
)
SCORES = ScoreSpec(samples=SAMPLES, model=TINY)
FILTERED = FilterSpec(scores=SCORES, drop_fraction=0.25)
WANDA = PruneSpec(
    model=TINY,
    pruner=Wanda(),
    sparsity=0.5,
    calibration=WindowsSpec(source=FILTERED, model=TINY, nsamples=2, seqlen=32, packing="concat"),
)
MAGNITUDE = PruneSpec(model=TINY, pruner=Magnitude(), sparsity=0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Store:
    """Generated, scored and filtered samples; the prunings have only manifests."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    artifacts = {TINY.key: tiny_model_folder}

    def put(spec: StageSpec) -> None:
        with store.attempt(spec.key) as attempt:
            report = {}
            if spec == SAMPLES.shards()[0]:
                report = generate.run_shard(SAMPLES, 0, artifacts, attempt.folder)
            elif spec == SCORES.shards()[0]:
                report = score.run_shard(SCORES, 0, artifacts, attempt.folder)
            elif isinstance(spec, GenerateSpec):
                report = generate.run(spec, artifacts, attempt.folder)
            elif isinstance(spec, ScoreSpec):
                report = score.run(spec, artifacts, attempt.folder)
            elif isinstance(spec, FilterSpec):
                report = filtering.run(spec, artifacts, attempt.folder)
            attempt.commit(
                kind=spec.kind,
                spec=spec.lineage,
                report=report,
                seconds=1.0,
                peak_memory_bytes=None,
                versions={"torch": "2.x"},
                host="here",
            )
        artifacts[spec.key] = store.fetch(spec.key)

    for spec in (*SAMPLES.shards(), SAMPLES, *SCORES.shards(), SCORES, FILTERED, WANDA, MAGNITUDE):
        put(spec)
    return store


@pytest.mark.parametrize("spec", [FILTERED, WANDA], ids=["filter", "pruned model"])
def test_the_data_set_has_the_kept_samples_as_they_were_generated(
    store: Store, tmp_path: Path, spec: StageSpec
) -> None:
    folder = tmp_path / "exported"
    assert export_calibration(store, spec.key, folder) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    found = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.column_names == list(SAMPLE_COLUMNS)
    kept = pq.read_table(store.fetch(FILTERED.key) / "samples.parquet").to_pylist()
    for row, sample in zip(found, kept, strict=True):
        sample["input_ids"] = sample.pop("token_ids")
        assert row == sample


def test_the_card_holds_the_whole_lineage_and_names_engine_versions_and_licence(
    store: Store, tmp_path: Path
) -> None:
    export_calibration(store, FILTERED.key, tmp_path / "exported")
    card = (tmp_path / "exported/README.md").read_text()
    blocks = [block.split("```")[0] for block in card.split("```json")[1:]]
    engines, versions, lineage = map(json.loads, blocks)
    assert engines[0]["backend"] == "transformers"
    assert versions == {"torch": "2.x"}
    assert lineage == FILTERED.lineage
    assert "license: unknown" in card
    counts = "9 were kept, 3 dropped by perplexity, 0 as duplicates, 0 as near duplicates"
    assert counts in card


@pytest.mark.whole_run
def test_the_example_makes_batches_of_an_exported_set(
    store: Store, tmp_path: Path, tiny_model_folder: Path
) -> None:
    folder, model = tmp_path / "exported", tiny_model_folder / "model"
    words = ["export-calibration", WANDA.key, str(folder), "--store", store.url]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.replace("\n", "") == f"9 samples: {folder}"
    cache = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    example = [sys.executable, "examples/calibration_batches.py", str(folder), str(model)]
    run = subprocess.run(example, capture_output=True, text=True, env=cache)
    assert run.returncode == 0, run.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = pq.read_table(folder / "samples.parquet")["text"].to_pylist()
    windows = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts) // 64
    counts = [int(line.split()[0]) for line in run.stdout.splitlines()]
    assert sum(counts) == windows > 0
    assert set(counts[:-1]) <= {4}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("prune-0123", "neither filtered samples nor a pruned model"),
        (SCORES.key, "neither filtered samples nor a pruned model"),
        (MAGNITUDE.key, "was not calibrated with filtered samples"),
    ],
)
def test_a_key_without_filtered_samples_is_refused(
    store: Store, tmp_path: Path, key: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"key: '{key}'.*{message}"):
        export_calibration(store, key, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match="name a new or an empty folder"):
        export_calibration(store, FILTERED.key, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
