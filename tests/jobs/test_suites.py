import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import jobs.suites
from cluster.store import Store
from jobs.check import check_plan
from jobs.gather import gather
from jobs.grid import Grid
from jobs.plan import make_plan
from jobs.show import print_results
from jobs.suites import SUITES_FOLDER, Suite, load_suite
from pipeline.data.presets import CORPUS_PRESETS
from pipeline.errors import InputError
from pipeline.evaluation.schemas import METRICS_SCHEMA, REQUESTS_SCHEMA
from pipeline.evaluation.tasks import lm_eval_tasks, missing_tasks
from pipeline.specs import EvaluateSpec

Content = dict[str, Any]
Load = Callable[[Content], Grid]
SUITES = sorted(path.stem for path in SUITES_FOLDER.glob("*.yaml"))


def test_the_suites_exist() -> None:
    assert SUITES == ["capabilities", "multilingual", "paper", "testbed"]


@pytest.mark.parametrize("name", SUITES)
def test_everything_that_a_suite_names_exists(name: str) -> None:
    suite = load_suite(name)
    assert missing_tasks([entry.name for entry in suite.tasks], suite.task_folder) == []
    assert {entry.corpus for entry in suite.perplexity} <= set(CORPUS_PRESETS)
    assert {task for members in suite.averages.values() for task in members} <= {
        entry.name for entry in suite.tasks
    }


@pytest.mark.parametrize("name", [name for name in SUITES if name != "testbed"])
def test_lm_eval_has_the_metrics_that_a_suite_names(name: str) -> None:
    """Otherwise an average would silently be missing."""
    index = lm_eval_tasks().task_index
    for entry in load_suite(name).tasks:
        settings = index[entry.name].cfg
        metrics = settings.get("aggregate_metric_list") or settings["metric_list"]
        base, _, chosen = entry.metric.partition(",")
        assert base in {each["metric"] for each in metrics}, entry.name
        assert chosen in {"", *(each["name"] for each in settings.get("filter_list") or [])}
        assert settings.get("num_fewshot") != 0 or entry.num_fewshot == 0


def evaluation(content: Content, load: Load, **fields: Any) -> EvaluateSpec:
    content["evaluate"] = fields
    plan = make_plan(load(content))
    spec = plan.specs[next(iter(plan.cells))]
    assert isinstance(spec, EvaluateSpec)
    return spec


def test_a_suite_expands_to_its_tasks_and_perplexities(content: Content, load: Load) -> None:
    spec = evaluation(content, load, suites=["paper"])
    assert {task.name: task.num_fewshot for task in spec.tasks} == {
        "boolq": 0,
        "winogrande": 0,
        "piqa": 0,
        "hellaswag": 0,
        "arc_easy": 0,
        "arc_challenge": 0,
        "mmlu_flan_n_shot_loglikelihood": 5,
    }
    wikitext, c4, alpaca = spec.perplexity
    assert (wikitext.name, wikitext.joined_by, wikitext.max_windows) == ("wikitext2", "\n\n", None)
    assert (c4.name, c4.joined_by, c4.texts) == ("c4-validation", " ", 1100)
    assert (alpaca.name, alpaca.unit, alpaca.texts) == ("alpaca", "text", 10_000)
    assert {entry.seqlen for entry in spec.perplexity} == {2048}


def test_the_grids_own_entries_replace_those_of_a_suite(content: Content, load: Load) -> None:
    content["corpora"]["wikitext2"] = content["corpora"]["notes"]
    spec = evaluation(
        content,
        load,
        suites=[{"name": "paper", "limit": 7, "seqlen": 64}, "testbed"],
        tasks=[{"name": "boolq", "num_fewshot": 3}],
    )
    limits = {task.name: task.limit for task in spec.tasks}
    assert limits["piqa"] == 7
    assert limits["boolq"] is None
    assert limits["testbed_facts"] is None
    assert next(task for task in spec.tasks if task.name == "boolq").num_fewshot == 3
    assert {entry.name: entry.seqlen for entry in spec.perplexity} == {
        "wikitext2": 64,
        "c4-validation": 64,
        "alpaca": 64,
        "testbed-heldout": 128,
    }
    assert spec.perplexity[0].corpus.kind == "file-corpus"
    assert spec.task_folder is not None


def test_suites_that_disagree_on_a_task_are_refused(content: Content, load: Load) -> None:
    suites = ["paper", {"name": "capabilities", "limit": 3}]
    with pytest.raises(InputError, match=r"'.*' is measured in two ways"):
        evaluation(content, load, suites=suites)
    evaluation(content, load, suites=["paper", "capabilities"])  # what they share, they agree on


def test_an_unknown_suite_is_refused_with_the_nearest(content: Content, load: Load) -> None:
    with pytest.raises(InputError, match=r"no suite 'papre'; did you mean 'paper'"):
        evaluation(content, load, suites=["papre"])


def test_a_task_that_the_installed_lm_eval_lacks_is_found_when_the_grid_is_planned(
    content: Content, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "old.yaml").write_text("tasks: [{name: boolq-of-old, metric: acc}]\n")
    monkeypatch.setattr(jobs.suites, "SUITES_FOLDER", tmp_path)
    content["evaluate"] = {"suites": ["old"]}
    with pytest.raises(InputError, match=r"evaluate\.suites\.old: 'boolq-of-old'.*lm-eval 0"):
        check_plan(make_plan(load(content)))


def test_an_average_is_of_tasks_of_its_suite() -> None:
    with pytest.raises(ValueError, match="needs tasks of the suite"):
        Suite.model_validate({"averages": {"all": ["boolq"]}})


# ----------------------------------------------------------------------------------------- results


@pytest.fixture
def results(
    content: Content, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> pa.Table:
    """Results of a suite with two tasks, one of them limited, for the dense model and a pruned
    one."""
    suites = tmp_path / "suites"
    suites.mkdir()
    (suites / "pair.yaml").write_text(
        "retention: true\n"
        "tasks: [{name: testbed_facts, metric: acc},"
        " {name: testbed_foreign, metric: acc_norm, limit: 5}]\n"
        "task_folder: {kind: testbed-tasks}\n"
        "averages: {both: [testbed_facts, testbed_foreign]}\n"
    )
    monkeypatch.setattr(jobs.suites, "SUITES_FOLDER", suites)
    content["evaluate"] = {"suites": ["pair"]}
    content["cells"] |= {"pruner": "magnitude", "sparsity": 0.5}
    plan = make_plan(load(content))
    store = Store(str(tmp_path / "store"))
    for key, cell in plan.cells.items():
        facts, foreign = (0.8, 0.6) if cell.pruner is None else (0.5, 0.2)
        same = {"samples": 10, "num_fewshot": 0, "task_version": "1.0", "lm_eval": "0.4.13"}
        same |= {"dtype": "float32", "tokenizer": "a", "chat_template": "none"}
        rows = [
            {"task": "testbed_facts", "metric": "acc", "value": facts, "stderr": 0.03},
            {"task": "testbed_foreign", "metric": "acc", "value": 0.9, "stderr": 0.01, "limit": 5},
            {
                "task": "testbed_foreign",
                "metric": "acc_norm",
                "value": foreign,
                "stderr": 0.04,
                "limit": 5,
            },
        ]
        with store.attempt(key) as attempt:
            table = pa.Table.from_pylist([same | row for row in rows], schema=METRICS_SCHEMA)
            pq.write_table(table, attempt.folder / "metrics.parquet")
            asked = {"task": "testbed_facts", "metric": "acc", "request_hash": "a"}
            right = [1.0, 1.0] if cell.pruner is None else [1.0, 0.0]
            answers = [asked | {"doc_id": n, "value": value} for n, value in enumerate(right)]
            table = pa.Table.from_pylist(answers, schema=REQUESTS_SCHEMA)
            pq.write_table(table, attempt.folder / "requests.parquet")
            attempt.commit(
                kind="evaluate",
                spec=plan.specs[key].lineage,
                report={},
                seconds=1.0,
                peak_memory_bytes=None,
                versions={},
                host="here",
            )
    return gather(plan, store)


def test_a_suites_average_is_the_plain_mean_of_its_metrics(
    results: pa.Table,
) -> None:
    rows = {(row["pruner"], row["task"], row["metric"]): row for row in results.to_pylist()}
    dense = rows["dense", "pair-both", "acc_average"]
    assert dense["value"] == pytest.approx((0.8 + 0.6) / 2)
    assert dense["stderr"] == pytest.approx(math.sqrt(0.03**2 + 0.04**2) / 2)
    assert dense["limit"] == 5
    assert dense["dtype"] == "float32"
    pruned = rows["magnitude", "pair-both", "retention"]
    assert pruned["value"] == pytest.approx((0.5 + 0.2) / (0.8 + 0.6))
    assert rows["dense", "pair-both", "retention"]["value"] == 1.0
    assert rows["magnitude", "testbed_facts", "flips"]["value"] == 0.5
    assert ("dense", "testbed_facts", "flips") not in rows


def test_a_limited_task_is_marked_in_the_printed_table(results: pa.Table) -> None:
    printed = io.StringIO()
    print_results(results, Console(file=printed, width=200))
    assert printed.getvalue().count("first 5") == 4  # two metrics of the task, and what it is in
    assert "only the first N questions of a task were asked" in printed.getvalue()
