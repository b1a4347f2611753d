import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import InputError, NonFiniteError
from pipeline.evaluation.evaluate import run
from pipeline.evaluation.schemas import METRICS_SCHEMA
from pipeline.evaluation.tasks import task_manager
from pipeline.pruning import prune
from pipeline.specs import (
    EvaluateSpec,
    FileCorpus,
    LocalModel,
    LocalTasks,
    Magnitude,
    PruneSpec,
    TestbedTasksSpec,
)
from pipeline.testbed import tasks as testbed_tasks
from pipeline.testbed.tokenizer import train_tokenizer
from tests.pipeline.tiny_models import tiny_llama

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: {wording}
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GROUP = """\
group: both
task:
  - stars
  - reworded
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""
TASK_FILES = ("stars", "reworded", "fixed", "group")
WORDS = ["ship", "sails", "over", "seven", "seas", "while", "déjà", "vu", "counts", "12", "stars"]
DRAWS = np.random.default_rng(0)
QUESTIONS: list[dict[str, Any]] = [
    {
        "question": " ".join(DRAWS.choice(WORDS, size=6)),
        "choices": [" ".join(DRAWS.choice(WORDS, size=size)) for size in (1, 2, 4)],
        "answer": int(DRAWS.integers(3)),
    }
    for _ in range(24)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([question["question"] for question in QUESTIONS], 300)
    tokenizer.save_pretrained(folder)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    tiny_llama(len(tokenizer), 128, **ends).save_pretrained(folder)
    return LocalModel(path=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> LocalTasks:
    folder = tmp_path_factory.mktemp("written") / "tasks"
    folder.mkdir()
    lines = [json.dumps(question) + "\n" for question in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(lines))
    (folder / "wording.py").write_text("def ask(document):\n    return document['question']\n")
    (folder / "stars.yaml").write_text(TASK.format(name="stars", wording="'{{question}}'"))
    reworded = TASK.format(name="reworded", wording="!function wording.ask")
    (folder / "reworded.yaml").write_text(reworded)
    fixed = TASK.format(name="fixed", wording="'{{question}}'") + "num_fewshot: 0\n"
    (folder / "fixed.yaml").write_text(fixed)
    (folder / "group.yaml").write_text(GROUP)
    moved = folder.parent / "moved"
    shutil.move(folder, moved)
    return LocalTasks(path=str(moved))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> FileCorpus:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("".join(question["question"] + "\n" for question in QUESTIONS))
    return FileCorpus(path=str(path))


Rows = dict[tuple[str, str], dict[str, Any]]


def measure(output: Path, **fields: Any) -> Rows:
    artifacts = fields.pop("artifacts", {})
    run(EvaluateSpec.model_validate(fields), artifacts, output)
    table = pq.read_table(output / "metrics.parquet")
    assert table.schema.equals(METRICS_SCHEMA)
    rows = table.to_pylist()
    names = [(row["task"], row["metric"]) for row in rows]
    assert names == sorted(set(names))
    return dict(zip(names, rows, strict=True))


class Group(NamedTuple):
    """An evaluation of the group `both`, and the files before and after it."""

    rows: Rows
    task_files: list[Path]
    cached: list[Path]
    output: set[str]


@pytest.fixture(scope="module")
def group(model: LocalModel, tasks: LocalTasks, tmp_path_factory: pytest.TempPathFactory) -> Group:
    cache, output = (tmp_path_factory.mktemp(name) for name in ("cache", "output"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        rows = measure(output, model=model, tasks=[{"name": "both"}], task_folder=tasks)
    return Group(
        rows,
        sorted(Path(tasks.path).rglob("*")),
        list(cache.rglob("*")),
        {path.name for path in output.iterdir()},
    )


def right_answers(model: LocalModel, by_length: bool) -> list[bool]:
    """Return for each question whether the right choice has the highest log-likelihood."""
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float64)
    tokenizer = train_tokenizer([question["question"] for question in QUESTIONS], 300)
    right = []
    for question in QUESTIONS:
        context = tokenizer(question["question"])["input_ids"]
        assert context[0] == tokenizer.bos_token_id
        scores = []
        for choice in question["choices"]:
            ids = tokenizer(f"{question['question']} {choice}")["input_ids"]
            with torch.no_grad():
                logs = torch.log_softmax(network(torch.tensor([ids])).logits[0], dim=-1)
            places = range(len(context), len(ids))
            score = sum(float(logs[place - 1, ids[place]]) for place in places)
            scores.append(score / len(choice) if by_length else score)
        right.append(int(np.argmax(scores)) == question["answer"])
    return right


def test_accuracy_is_the_share_of_right_choices_by_brute_force(
    model: LocalModel, group: Group
) -> None:
    expected = {"acc": right_answers(model, False), "acc_norm": right_answers(model, True)}
    assert expected["acc"] != expected["acc_norm"]
    for metric, right in expected.items():
        row = group.rows["stars", metric]
        assert row["value"] == pytest.approx(sum(right) / 24)
        assert row["stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(24))
        assert row["samples"] == 24


def test_a_group_and_each_of_its_tasks_have_rows(group: Group) -> None:
    assert {name for name, _ in group.rows} == {"both", "stars", "reworded"}
    assert {metric for name, metric in group.rows if name == "stars"} == {"acc", "acc_norm"}
    stars, reworded = group.rows["stars", "acc"], group.rows["reworded", "acc"]
    assert reworded["value"] == stars["value"]  # the same questions, worded by a function
    assert group.rows["both", "acc"]["value"] == pytest.approx(stars["value"])


def test_an_evaluation_leaves_nothing_outside_its_output(group: Group, tasks: LocalTasks) -> None:
    written = {"questions.jsonl", "wording.py", *(f"{name}.yaml" for name in TASK_FILES)}
    assert group.task_files == sorted(Path(tasks.path, name) for name in written)
    assert group.cached == []
    assert group.output == {"metrics.parquet", "requests.parquet"}


def test_each_task_keeps_to_its_own_limit_and_number_of_examples(
    model: LocalModel, tasks: LocalTasks, tmp_path: Path
) -> None:
    wanted = [{"name": "stars", "limit": 5}, {"name": "reworded", "num_fewshot": 2}]
    rows = measure(tmp_path, model=model, tasks=wanted, task_folder=tasks)
    assert rows["stars", "acc"]["samples"] == 5
    assert rows["stars", "acc"]["value"] == sum(right_answers(model, False)[:5]) / 5
    assert rows["reworded", "acc"]["samples"] == 24


METRICS = {"undefined": "math.nan", "infinite": "math.inf", "overflows": "math.exp(1e4)"}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_that_is_not_finite_is_no_row(
    model: LocalModel, tasks: LocalTasks, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(tasks.path, folder)
    added = f"  - metric: odd\n    aggregation: !function odd.{name}\n"
    for path in folder.glob("*.yaml"):
        if path.read_text().startswith("task: stars"):
            with path.open("a") as file:
                file.write(f"{added}process_results: !function odd.results\n")
    (folder / "odd.py").write_text(
        "import math\n"
        "def results(document, answers):\n    return {'acc': 1.0, 'acc_norm': 1.0, 'odd': 1.0}\n"
        f"def {name}(items):\n    return {METRICS[name]}\n"
    )
    asked: dict[str, Any] = {
        "model": model,
        "tasks": [{"name": "stars", "limit": 1}],
        "task_folder": LocalTasks(path=str(folder)),
    }
    if name != "undefined":
        with pytest.raises(NonFiniteError, match="stars: "):
            measure(tmp_path, **asked)
        return
    rows = measure(tmp_path, **asked)
    assert set(rows) == {("stars", "acc"), ("stars", "acc_norm")}
    assert rows["stars", "acc"]["stderr"] is None  # of one question there is none


def test_the_same_spec_gives_the_same_bytes(
    model: LocalModel, tasks: LocalTasks, corpus: FileCorpus, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "model": model,
        "tasks": [{"name": "stars", "num_fewshot": 1}],
        "task_folder": tasks,
        "perplexity": [{"name": "text", "corpus": corpus, "seqlen": 16}],
    }
    for folder in ("a", "b"):
        torch.rand(7)
        (tmp_path / folder).mkdir()
        measure(tmp_path / folder, **fields)
    for name in ("metrics.parquet", "requests.parquet"):
        first, second = (tmp_path / folder / name for folder in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


def test_perplexity_is_taken_on_the_corpus_in_its_own_order(
    model: LocalModel, corpus: FileCorpus, tmp_path: Path
) -> None:
    wanted = [{"name": "text", "corpus": corpus, "seqlen": 16, "max_windows": 4}]
    row = measure(tmp_path, model=model, perplexity=wanted)["text", "perplexity"]
    tokenizer = train_tokenizer([question["question"] for question in QUESTIONS], 300)
    ids = [
        token for question in QUESTIONS for token in tokenizer(question["question"])["input_ids"]
    ]
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float64)
    windows = torch.tensor(ids[:64]).view(4, 16)
    with torch.no_grad():
        losses = [float(network(window[None], labels=window[None]).loss) for window in windows]
    assert row["value"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)
    assert row["samples"] == 4


def test_the_testbeds_tasks_run_from_their_artifact(model: LocalModel, tmp_path: Path) -> None:
    spec = TestbedTasksSpec(questions=8)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "output").mkdir()
    testbed_tasks.run(spec, {}, tmp_path / "tasks")
    name = testbed_tasks.TASK_NAMES[0]
    rows = measure(
        tmp_path / "output",
        model=model,
        tasks=[{"name": name}],
        task_folder=spec,
        artifacts={spec.key: tmp_path / "tasks"},
    )
    assert rows[name, "acc"]["samples"] == 8


def test_tasks_can_be_asked_in_the_tokenizers_chat_template(
    model: LocalModel, tasks: LocalTasks, tmp_path: Path
) -> None:
    shutil.copytree(model.path, tmp_path / "chat")
    template = "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }} {% endfor %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    chat = LocalModel(path=str(tmp_path / "chat"), dtype="float32")
    values = {}
    for name, options in (("plain", {}), ("asked", {"chat_template": True})):
        (tmp_path / name).mkdir()
        rows = measure(
            tmp_path / name,
            model=chat,
            tasks=[{"name": "stars", "num_fewshot": 1}],
            task_folder=tasks,
            **options,
        )
        values[name] = rows["stars", "acc"]["chat_template"]
        requests = pq.read_table(tmp_path / name / "requests.parquet").to_pylist()
        values[f"{name} scores"] = [row["log_likelihoods"] for row in requests]
    assert values["plain"] == "none"
    assert len(values["asked"]) == 12
    assert values["plain scores"] != values["asked scores"]


def test_a_model_larger_than_memory_gives_the_same_numbers(
    model: LocalModel, tasks: LocalTasks, corpus: FileCorpus, tmp_path: Path
) -> None:
    """Of a pruned model, so that its masks, the dense model and the gains are read by layer too."""
    pruned = PruneSpec(model=model, pruner=Magnitude(), sparsity=0.5)
    (tmp_path / "pruned").mkdir()
    prune.run(pruned, {}, tmp_path / "pruned")
    text = {"corpus": corpus, "seqlen": 16}
    spec = EvaluateSpec.model_validate(
        {
            "model": pruned,
            "tasks": [{"name": "stars", "num_fewshot": 1}],
            "task_folder": tasks,
            "perplexity": [{**text, "name": "plain"}, {**text, "name": "compared", "kl": True}],
            "batch_tokens": 64,
        }
    )
    reports, rows = [], []
    for number, memory in enumerate((None, 1)):
        output = tmp_path / str(number)
        output.mkdir()
        options = {} if memory is None else {"memory_bytes": memory, "host_hidden_bytes": 0}
        reports.append(run(spec, {pruned.key: tmp_path / "pruned"}, output, **options))
        rows.append(pq.read_table(output / "requests.parquet").to_pylist())
    whole, streamed = reports
    assert streamed.pop("streamed") is True
    assert not streamed.pop("shared_contexts")
    assert whole.pop("shared_contexts")
    assert whole == streamed
    assert {row["metric"] for row in rows[0]} >= {"acc", "kl", "loss", "top_token_changes"}
    for one, other in zip(*rows, strict=True):
        for name in one:
            if name in ("value", "log_likelihoods"):
                assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), one
            else:
                assert other[name] == one[name]


def test_a_task_that_generates_is_refused_for_a_model_larger_than_memory(
    model: LocalModel, tasks: LocalTasks, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(tasks.path, folder)
    (folder / "writes.yaml").write_text(
        TASK.format(name="writes", wording="'{{question}}'")
        .replace("multiple_choice", "generate_until")
        .replace("  - metric: acc\n  - metric: acc_norm\n", "  - metric: exact_match\n")
        .replace('doc_to_choice: "{{choices}}"\n', "")
    )
    spec = EvaluateSpec.model_validate(
        {
            "model": model,
            "tasks": [{"name": "writes", "limit": 1}],
            "task_folder": LocalTasks(path=str(folder)),
        }
    )
    with pytest.raises(InputError, match=r"tasks: 'writes': generates, .* take evaluate\.backend"):
        run(spec, {}, tmp_path, memory_bytes=1)


def test_an_impossible_evaluation_is_refused(
    model: LocalModel,
    tasks: LocalTasks,
    corpus: FileCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "none").mkdir()
    few = task_manager(tmp_path / "none")  # to index all of lm-eval's tasks takes ten seconds
    monkeypatch.setattr("pipeline.evaluation.task_metrics.lm_eval_tasks", lambda: few)
    text = {"name": "text", "corpus": corpus, "seqlen": 16}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tasks": [{"name": "stars"}, {"name": "stars", "limit": 3}]}, "measured twice"),
        ({"tasks": [{"name": "stars"}], "perplexity": [{**text, "name": "stars"}]}, "twice"),
        ({"tasks": [{"name": "fixed", "num_fewshot": 2}]}, "fixes 0"),
        ({"tasks": [{"name": "no-such-task"}]}, "no-such-task"),
        ({"perplexity": [{**text, "seqlen": 100_000}]}, "lower seqlen"),
        ({"tasks": [{"name": "stars"}], "chat_template": True}, "the tokenizer has none"),
    ]
    for fields, message in cases:
        with pytest.raises(InputError, match=message):
            measure(tmp_path, model=model, task_folder=tasks, **fields)
