"""lm-eval's own code of the paper's tasks, on local copies of their data sets."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.evaluation import evaluate
from pipeline.specs import EvaluateSpec, LocalDatasets, LocalModel
from pipeline.testbed.tokenizer import train_tokenizer
from tests.pipeline.tiny_models import tiny_llama

EXAMPLE = Path(__file__).parents[3] / "examples" / "local_datasets.py"

QUESTIONS = 120

CHANCE = {
    "boolq": 1 / 2,
    "winogrande": 1 / 2,
    "piqa": 1 / 2,
    "hellaswag": 1 / 4,
    "arc_easy": 1 / 4,
    "arc_challenge": 1 / 4,
    "mmlu_flan_n_shot_loglikelihood_anatomy": 1 / 4,
}
"""Of the paper suite's tasks; of MMLU's 57 subjects, which take long to load, one."""


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("local_datasets", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> LocalDatasets:
    folder = tmp_path_factory.mktemp("datasets")
    example().write_datasets(folder, QUESTIONS, subjects=["anatomy"])
    return LocalDatasets(path=str(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([example().WORDS], 400)
    tokenizer.save_pretrained(folder)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    tiny_llama(len(tokenizer), 1024, **ends).save_pretrained(folder)
    return LocalModel(path=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def measured(
    model: LocalModel, datasets: LocalDatasets, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("output")
    tasks = [{"name": name, "num_fewshot": 5 if "mmlu" in name else 0} for name in CHANCE]
    texts = {"kind": "file-corpus", "path": f"{datasets.path}/Salesforce/wikitext/*/test*.parquet"}
    spec = EvaluateSpec.model_validate(
        {
            "model": model,
            "tasks": [*tasks, {"name": "wikitext"}, {"name": "c4"}],
            "perplexity": [{"name": "wikitext2", "corpus": texts, "seqlen": 64}],
            "datasets": datasets,
        }
    )
    evaluate.run(spec, {}, output)
    return output


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return found


def test_a_model_that_knows_nothing_is_at_chance_on_every_task(measured: Path) -> None:
    """Within a binomial bound that chance exceeds less than one time in 4,000, over all tasks."""
    found = {row["task"]: row for row in rows(measured) if row["metric"] == "acc"}
    for task, chance in CHANCE.items():
        row = found[task]
        wide = 4.2 * math.sqrt(chance * (1 - chance) / row["samples"])
        assert 0 < wide < chance
        assert abs(row["value"] - chance) < wide, task
        assert 0 < row["stderr"] < wide


def test_all_questions_are_asked_and_every_row_says_how(measured: Path) -> None:
    found = {row["task"]: row for row in rows(measured) if row["metric"] == "acc"}
    assert {found[task]["samples"] for task in CHANCE} == {QUESTIONS}
    assert found["mmlu_flan_n_shot_loglikelihood_anatomy"]["num_fewshot"] == 5
    assert found["boolq"]["num_fewshot"] == 0
    assert found["boolq"]["task_version"] == "2.0"
    for row in rows(measured):
        assert row["dtype"] == "float32"
        assert row["chat_template"] == "none"
        assert len(row["tokenizer"]) == 12
        assert row["limit"] is None
        assert (row["lm_eval"] is None) == (row["task"] == "wikitext2")


def test_every_accuracy_is_the_mean_over_its_requests(measured: Path) -> None:
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows(measured, "requests"):
        values.setdefault((row["task"], row["metric"]), []).append(row["value"])
        choices = {"hellaswag": 4, "boolq": 2, "winogrande": 2}.get(row["task"])
        assert choices in (None, len(row["log_likelihoods"]))
    compared = 0
    for row in rows(measured):
        own = values.get((row["task"], row["metric"]))
        if row["metric"] in ("acc", "acc_norm") and own is not None:
            assert row["value"] == pytest.approx(sum(own) / len(own))
            assert row["samples"] == len(own)
            compared += 1
    assert compared == 7 + 4  # four of the seven have acc_norm, too


def test_request_hashes_differ_by_what_was_asked(measured: Path) -> None:
    asked = [row for row in rows(measured, "requests") if row["metric"] == "acc"]
    boolq = [row for row in asked if row["task"] == "boolq"]
    assert len({row["request_hash"] for row in boolq}) == len(boolq) == QUESTIONS
    assert [row["doc_id"] for row in boolq] == list(range(QUESTIONS))


def test_perplexities_of_lm_eval_are_there_too(measured: Path) -> None:
    found = {(row["task"], row["metric"]): row["value"] for row in rows(measured)}
    for task in ("wikitext", "c4"):
        bits, word = found[task, "bits_per_byte"], found[task, "word_perplexity"]
        assert 1 < bits < word
    windows = [row for row in rows(measured, "requests") if row["task"] == "wikitext2"]
    mean = sum(row["value"] for row in windows) / len(windows)
    assert found["wikitext2", "perplexity"] == pytest.approx(math.exp(mean))


def test_a_folder_that_is_not_there_is_refused(model: LocalModel, tmp_path: Path) -> None:
    nowhere = LocalDatasets(path=str(tmp_path / "nowhere"))
    spec = EvaluateSpec.model_validate(
        {"model": model, "tasks": [{"name": "boolq"}], "datasets": nowhere}
    )
    with pytest.raises(InputError, match="is no folder"):
        evaluate.run(spec, {}, tmp_path)


def test_the_copies_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        example().write_datasets(tmp_path / name, 10)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append([(path.relative_to(tmp_path / name), path.read_bytes()) for path in files])
    assert contents[0] == contents[1]
