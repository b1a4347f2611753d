"""The functions of the library return the same as the stages of a grid."""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import pipeline
from pipeline.data import draw as drawing
from pipeline.data import windows as cutting
from pipeline.data.samples import Sample
from pipeline.errors import InputError
from pipeline.evaluation import evaluate as evaluation
from pipeline.generation import generate as generation
from pipeline.pruning import outliers, prune
from pipeline.scoring import filter as filtering
from pipeline.scoring import score as scoring
from pipeline.scoring.score import Score
from pipeline.specs import (
    OWL,
    DrawSpec,
    EvaluateSpec,
    FileCorpus,
    FilterSpec,
    GenerateSpec,
    LocalModel,
    PerplexitySpec,
    PruneSpec,
    ScoreSpec,
    ShardedSpec,
    ShardSpec,
    StageSpec,
    Wanda,
    WindowsSpec,
    WordList,
)

TEXTS = [f"{name} lives in {place}. " * 12 for name in ("Anna", "Bo") for place in ("Rome", "Oslo")]


class Stages:
    """The artifacts of stages that are run one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifacts: dict[str, Path] = {}

    def output(self, spec: StageSpec) -> Path:
        self.artifacts[spec.key] = self.folder / spec.key
        self.artifacts[spec.key].mkdir()
        return self.artifacts[spec.key]

    def filtered(self, spec: FilterSpec) -> Path:
        samples, scores = spec.scores.samples, spec.scores
        stages: list[tuple[ShardedSpec, Any]] = [(scores, scoring)]
        if isinstance(samples, DrawSpec):
            drawing.run(samples, self.artifacts, self.output(samples))
        else:
            stages.insert(0, (samples, generation))
        for stage, module in stages:
            for index in range(stage.shard_count):
                output = self.output(ShardSpec(of=stage, index=index))
                module.run_shard(stage, index, self.artifacts, output)
            module.run(stage, self.artifacts, self.output(stage))
        filtering.run(spec, self.artifacts, self.output(spec))
        return self.artifacts[spec.key]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path) -> Path:
    return tiny_model_folder / "model"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> pipeline.LanguageModel:
    return pipeline.load(folder, dtype="float32")


def ids(rows: Sequence[Sample]) -> list[list[int]]:
    return [row.token_ids for row in rows]


def test_a_generated_calibration_set_equals_the_grids(
    model: pipeline.LanguageModel, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text("zzzz\n")
    spec = LocalModel(path=str(folder), dtype="float32")
    generate = GenerateSpec(
        model=spec,
        prefixes=FileCorpus(path=str(text_file)),
        num_samples=4,
        seqlen=24,
        shard_size=2,
        seed=3,
    )
    choose = FilterSpec(
        scores=ScoreSpec(samples=generate, model=spec),
        drop_fraction=0.25,
        banned_words=WordList(path=str(tmp_path / "words.txt")),
        drop_duplicates=True,
    )
    stages = Stages(tmp_path)
    wanted = pq.read_table(stages.filtered(choose) / "samples.parquet")
    windows = WindowsSpec(source=choose, model=spec, nsamples=5, seqlen=8, packing="concat", seed=1)
    cutting.run(windows, stages.artifacts, stages.output(windows))

    samples = pipeline.generate(
        model, str(text_file), num_samples=4, seqlen=24, shard_size=2, seed=3
    )
    scores = pipeline.score(model, samples)
    kept = pipeline.filter(
        samples, scores, drop_fraction=0.25, banned_words=["zzzz"], drop_duplicates=True
    )
    found = pipeline.windows(model, kept, nsamples=5, seqlen=8, packing="concat", seed=1)

    assert ids(kept) == wanted["token_ids"].to_pylist()
    assert [sample.text for sample in kept] == wanted["text"].to_pylist()
    known = {sample.sample_id: score for sample, score in zip(samples, scores, strict=True)}
    assert [known[each.sample_id].perplexity for each in kept] == wanted["perplexity"].to_pylist()
    assert torch.equal(found, cutting.read_windows(stages.artifacts[windows.key]))


@pytest.mark.parametrize(
    "options",
    [
        {"drop_by": "min-k-plus-plus"},
        {"drop_by": "random"},
        {"drop_by": "cola"},
        {"drop_by": "igsp", "within": "cluster"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_a_rule_of_the_filter_keeps_what_it_keeps_in_a_grid(
    model: pipeline.LanguageModel,
    folder: Path,
    text_file: Path,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    spec = LocalModel(path=str(folder), dtype="float32")
    written = {"num_samples": 4, "seqlen": 24, "seed": 3}
    generate = GenerateSpec(model=spec, prefixes=FileCorpus(path=str(text_file)), **written)
    scores = ScoreSpec(samples=generate, model=spec, hidden_states=True)
    choose = FilterSpec(scores=scores, drop_fraction=0.5, seed=7, **options)
    wanted = pq.read_table(Stages(tmp_path).filtered(choose) / "samples.parquet")

    samples = pipeline.generate(model, str(text_file), **written)
    kept = pipeline.filter(
        samples,
        pipeline.score(model, samples),
        drop_fraction=0.5,
        hidden_states=pipeline.hidden_states(model, samples),
        seed=7,
        **options,
    )
    assert [each.sample_id for each in kept] == wanted["sample_id"].to_pylist()
    assert len(kept) == 2


@pytest.mark.parametrize("rule", ["perplexity", "zipcal", "cola"])
def test_a_choice_from_a_pool_of_real_text_equals_the_grids(
    model: pipeline.LanguageModel, folder: Path, text_file: Path, tmp_path: Path, rule: str
) -> None:
    spec = LocalModel(path=str(folder), dtype="float32")
    settings: dict[str, Any] = {"num_samples": 4, "seqlen": 16, "seed": 3}
    drawn = DrawSpec(source=FileCorpus(path=str(text_file)), model=spec, shard_size=2, **settings)
    scores = ScoreSpec(samples=drawn, model=spec, hidden_states=True)
    choose = FilterSpec(scores=scores, drop_fraction=0.5, drop_by=rule)
    stages = Stages(tmp_path)
    wanted = pq.read_table(stages.filtered(choose) / "samples.parquet")
    windows = WindowsSpec(source=choose, model=spec, nsamples=2, seqlen=16)
    cutting.run(windows, stages.artifacts, stages.output(windows))

    pool = pipeline.draw(model, TEXTS, **settings)
    states = pipeline.hidden_states(model, pool)
    kept = pipeline.filter(
        pool, pipeline.score(model, pool), 0.5, hidden_states=states, drop_by=rule
    )
    assert ids(kept) == wanted["token_ids"].to_pylist()
    assert [sample.text for sample in kept] == wanted["text"].to_pylist()
    found = pipeline.windows(model, kept, nsamples=2, seqlen=16)
    assert torch.equal(found, cutting.read_windows(stages.artifacts[windows.key]))


def test_a_pool_larger_than_the_texts_is_refused(model: pipeline.LanguageModel) -> None:
    with pytest.raises(InputError, match=r"num_samples: 5: .*of 4 texts"):
        pipeline.draw(model, TEXTS, num_samples=5, seqlen=16)


def test_sources_are_strata_if_the_samples_have_any() -> None:
    samples = [Sample(number, 1, [number, number + 1], "") for number in range(8)]
    scores = [Score(1, float(number), min_k_plus_plus=0.0) for number in range(8)]
    sources = ["low"] * 4 + ["high"] * 4
    kept = pipeline.filter(samples, scores, 0.5, sources=sources, within="source")
    assert [each.sample_id for each in kept] == [0, 1, 4, 5]


@pytest.mark.parametrize("packing", ["sample", "concat"])
def test_windows_of_real_text_equal_the_grids(
    model: pipeline.LanguageModel, folder: Path, text_file: Path, tmp_path: Path, packing: str
) -> None:
    spec = WindowsSpec(
        source=FileCorpus(path=str(text_file)),
        model=LocalModel(path=str(folder), dtype="float32"),
        nsamples=3,
        seqlen=16,
        packing=packing,
        seed=2,
    )
    cutting.run(spec, {}, tmp_path)
    wanted = cutting.read_windows(tmp_path)
    settings = {"nsamples": 3, "seqlen": 16, "packing": packing, "seed": 2}
    assert torch.equal(pipeline.windows(model, str(text_file), **settings), wanted)
    assert torch.equal(pipeline.windows(model, TEXTS, **settings), wanted)


@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_pruning_and_its_evaluation_equal_the_grids(
    folder: Path, text_file: Path, tmp_path: Path, allocation: str
) -> None:
    spec = LocalModel(path=str(folder), dtype="float32")
    corpus = FileCorpus(path=str(text_file))
    calibration = WindowsSpec(source=corpus, model=spec, nsamples=3, seqlen=16)
    pruned = PruneSpec(model=spec, pruner=Wanda(), sparsity=0.5, calibration=calibration)
    if allocation == "owl":
        pruned = pruned.model_copy(update={"allocation": OWL()})
    measured = EvaluateSpec(
        model=pruned, perplexity=(PerplexitySpec(name="texts", corpus=corpus, seqlen=16, kl=True),)
    )
    stages = Stages(tmp_path)
    cutting.run(calibration, {}, stages.output(calibration))
    if pruned.outliers is not None:
        outliers.run(pruned.outliers, stages.artifacts, stages.output(pruned.outliers))
    prune.run(pruned, stages.artifacts, stages.output(pruned))
    evaluation.run(measured, stages.artifacts, stages.output(measured))
    wanted = pq.read_table(stages.artifacts[measured.key] / "metrics.parquet")

    model = pipeline.load(folder, dtype="float32")
    windows = pipeline.windows(model, str(text_file), nsamples=3, seqlen=16)
    report = pipeline.prune(model, windows, "wanda", 0.5, allocation)
    dense = pipeline.load(folder, dtype="float32")
    found = pipeline.evaluate(model, {"texts": str(text_file)}, seqlen=16, dense=dense)

    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    numbers = {row.metric: row.value for row in found}
    assert "kl" in numbers
    assert numbers == dict(
        zip(*wanted.select(["metric", "value"]).to_pydict().values(), strict=True)
    )


def test_a_pattern_holds_in_every_group(folder: Path, text_file: Path) -> None:
    model = pipeline.load(folder, dtype="float32")
    windows = pipeline.windows(model, str(text_file), nsamples=3, seqlen=16)
    pipeline.prune(model, windows, {"name": "sparsegpt", "damping": 0.02}, "2:4")
    weight = model.model.model.layers[0].mlp.up_proj.weight
    assert ((weight.view(len(weight), -1, 4) == 0).sum(dim=2) >= 2).all()


def test_tasks_measure_the_model_in_memory(model: pipeline.LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "capital.jsonl").write_text(
        '{"question": "Where?", "choices": ["Rome", "Oslo"], "answer": 0}\n' * 4
    )
    (tmp_path / "capital.yaml").write_text(
        "task: capital\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: capital.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    (accuracy,) = pipeline.evaluate(model, tasks=["capital"], task_folder=tmp_path)
    assert (accuracy.task, accuracy.metric, accuracy.samples) == ("capital", "acc", 4)
    assert accuracy.value in (0.0, 1.0)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("top_p: 1.5: ", lambda m: pipeline.generate(m, TEXTS, num_samples=1, top_p=1.5)),
        ("tempratur", lambda m: pipeline.generate(m, TEXTS, tempratur=1)),
        ("backend: 'vllm': ", lambda m: pipeline.generate(m, TEXTS, backend="vllm")),
        ("nsamples: 0: ", lambda m: pipeline.windows(m, TEXTS, nsamples=0)),
        (
            "source: 'wikitxt2': .*did you mean 'wikitext2'",
            lambda m: pipeline.windows(m, "wikitxt2"),
        ),
        ("source: \\[\\]: ", lambda m: pipeline.windows(m, [])),
        (
            "the longest has 145 tokens",
            lambda m: pipeline.windows(m, TEXTS, nsamples=1, seqlen=4000),
        ),
        ("pruner.*did you mean 'wanda'", lambda m: pipeline.prune(m, None, "wnada")),
        ("windows: None: ", lambda m: pipeline.prune(m, None, "wanda")),
        (
            "windows: None: allocation owl needs",
            lambda m: pipeline.prune(m, None, "magnitude", allocation="owl"),
        ),
        (
            r"windows: \[2, 8\]: pruner magnitude takes no data",
            lambda m: pipeline.prune(m, torch.zeros(2, 8, dtype=torch.long), "magnitude"),
        ),
        ("sparsity: '4:2': ", lambda m: pipeline.prune(m, None, "magnitude", "4:2")),
        ("sparsity: 50", lambda m: pipeline.prune(m, None, "magnitude", 50)),
        ("scores: 1: ", lambda m: pipeline.filter([], [Score(1, 2.0)])),
        ("sources: 1: ", lambda m: pipeline.filter([], [], sources=["web"])),
        ("drop_by: 'worst': ", lambda m: pipeline.filter([], [], drop_by="worst")),
        ("similarity: 5", lambda m: pipeline.filter([], [], near_duplicate_similarity=5)),
        ("name: 'arc': is measured twice", lambda m: pipeline.evaluate(m, tasks=["arc", "arc"])),
        ("drop_fraction: nan: ", lambda m: pipeline.filter([], [], math.nan)),
        ("at least one", lambda m: pipeline.evaluate(m)),
        (
            "tasks: 'nothing_of_that_name'",
            lambda m: pipeline.evaluate(m, tasks=["nothing_of_that_name"]),
        ),
        ("dtype: 'float23'", lambda m: pipeline.load(m.spec.path, dtype="float23")),
    ],
)
def test_a_wrong_argument_is_named(
    model: pipeline.LanguageModel, message: str, call: Callable[[pipeline.LanguageModel], object]
) -> None:
    with pytest.raises(InputError, match=message):
        call(model)


def test_planning_does_not_import_torch_with_the_package() -> None:
    code = "import sys, pipeline, pipeline.specs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
