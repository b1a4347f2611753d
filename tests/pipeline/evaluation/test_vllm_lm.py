"""lm-eval's backend for vLLM beside ours for transformers, on the trained testbed model."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import InputError, NonFiniteError
from pipeline.evaluation import evaluate
from pipeline.evaluation.vllm_lm import vllm_language_model
from pipeline.pruning import prune
from pipeline.specs import (
    EvaluateSpec,
    LocalModel,
    Magnitude,
    PerplexitySpec,
    PruneSpec,
    TaskSpec,
    TestbedCorpus,
    TestbedTasksSpec,
    Vllm,
)
from pipeline.testbed import tasks
from tests.pipeline.generation.test_vllm_engine import needs_vllm

TEXT_TASK = """\
task: {kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
OTHER_REQUESTS = {
    "loglikelihood_rolling": """\
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
""",
    "generate_until": """\
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
""",
}
"""Tasks with requests of other kinds than choices."""


@pytest.fixture(autouse=True)
def _without_flask(without_flask: Any) -> Iterator[None]:
    with without_flask():
        yield


@pytest.fixture
def pruned(tiny_model_folder: Path, tmp_path: Path) -> tuple[PruneSpec, dict[str, Path]]:
    """A model that is stored as masks, and where it is."""
    dense = LocalModel(path=str(tiny_model_folder / "model"), dtype="float32")
    spec = PruneSpec(model=dense, pruner=Magnitude(), sparsity=0.3)
    folder = tmp_path / "pruned"
    folder.mkdir()
    prune.run(spec, {}, folder)
    return spec, {spec.key: folder}


def measured(
    model: Any, artifacts: dict[str, Path], backend: Any, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    asked = TestbedTasksSpec()
    task_files = folder / "tasks"
    if not task_files.exists():
        task_files.mkdir(parents=True)
        tasks.run(asked, {}, task_files)
        for kind, fields in OTHER_REQUESTS.items():
            text = TEXT_TASK.format(kind=kind, file=task_files / "testbed_facts.jsonl")
            (task_files / f"{kind}.yaml").write_text(text + fields)
    spec = EvaluateSpec(
        model=model,
        perplexity=(
            PerplexitySpec(
                name="heldout",
                corpus=TestbedCorpus(mixture={"facts": 1.0}),
                seqlen=64,
                max_windows=4,
            ),
        ),
        tasks=(
            TaskSpec(name="testbed_facts", limit=40),
            *(TaskSpec(name=kind, limit=4) for kind in OTHER_REQUESTS),
        ),
        task_folder=asked,
        backend=backend,
    )
    output = folder / ("vllm" if isinstance(backend, Vllm) else "transformers")
    output.mkdir()
    report = evaluate.run(spec, {**artifacts, asked.key: task_files}, output)
    metrics, requests = (
        pq.read_table(output / f"{name}.parquet").to_pylist() for name in ("metrics", "requests")
    )
    return metrics, requests, report


@needs_vllm
def test_vllm_answers_as_transformers_does(
    pruned: tuple[PruneSpec, dict[str, Path]], tmp_path: Path
) -> None:
    model, artifacts = pruned
    theirs, their_requests, report = measured(model, artifacts, Vllm(enforce_eager=True), tmp_path)
    ours, our_requests, _ = measured(model, artifacts, "transformers", tmp_path)
    assert report["backend"] == "vllm"
    assert len(theirs) == len(ours)
    for got, wanted in zip(theirs, ours, strict=True):
        if got["task"] == "loglikelihood_rolling":
            assert got.pop("value") == pytest.approx(wanted.pop("value"), rel=1e-4)
        assert got == wanted
    for got, wanted in zip(their_requests, our_requests, strict=True):
        assert got["request_hash"] == wanted["request_hash"]
        assert got["log_likelihoods"] == pytest.approx(wanted["log_likelihoods"], abs=1e-4)
    assert {got["task"] for got in their_requests} == {"heldout", "testbed_facts", *OTHER_REQUESTS}
    choices = [got["log_likelihoods"] for got in their_requests if got["task"] == "testbed_facts"]
    assert choices
    assert all(len(set(each)) > 1 for each in choices)


@needs_vllm
def test_a_model_that_gives_nan_and_a_choice_without_a_token_are_errors(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder / "model")
    model.get_output_embeddings().weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_folder / "model").save_pretrained(tmp_path)
    spec = EvaluateSpec(
        model=LocalModel(path=str(tmp_path), dtype="float32"),
        tasks=(TaskSpec(name="any"),),
        backend=Vllm(enforce_eager=True),
    )
    asked = {
        "loglikelihood": ("the cat", " is"),
        "loglikelihood_rolling": ("the cat is",),
        "generate_until": ("the cat", {"until": ["\n"], "max_gen_toks": 4}),
    }
    with vllm_language_model(spec, {}) as language_model:
        for kind, arguments in asked.items():
            request = Instance(kind, {}, arguments, 0, metadata=("cats", 3, 1))
            with pytest.raises(NonFiniteError, match="cats, document 3: "):
                getattr(language_model, kind)([request])
        empty = Instance("loglikelihood", {}, ("the cat", ""), 0, metadata=("cats", 4, 1))
        with pytest.raises(InputError, match=r"cats, document 4.*adds no token"):
            language_model.loglikelihood([empty])


def test_without_vllm_it_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, pruned: tuple[PruneSpec, dict[str, Path]], tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.evaluation.vllm_lm.vllm_version", lambda: None)
    with pytest.raises(InputError, match=r"backend: 'vllm'.*install calprune\[vllm\]"):
        measured(*pruned, Vllm(), tmp_path)
