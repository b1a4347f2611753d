"""The paper's suite on local copies, and lm-eval by hand on what is exported."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.store import Store
from jobs.check import check_plan
from jobs.gather import gather
from jobs.grid import load_grid
from jobs.plan import make_plan
from pipeline.evaluation import evaluate
from pipeline.models.checkpoint import write_checkpoint
from pipeline.pruning import prune
from pipeline.specs import EvaluateSpec, LocalModel, LocalTasks, Magnitude, PruneSpec
from pipeline.specs import TestbedTasksSpec as TasksSpec
from pipeline.testbed import tasks as testbed_tasks
from tests.made import make_here

EXAMPLES = Path(__file__).parents[2] / "examples"


def write_copies(folder: Path, questions: int) -> None:
    spec = importlib.util.spec_from_file_location("copies", EXAMPLES / "local_datasets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_datasets(folder, questions)


def test_the_papers_suite_runs_on_local_copies(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = tmp_path / "local-datasets"
    write_copies(copies, 10)
    example = (EXAMPLES / "paper-local.yaml").read_text()
    grid = tmp_path / "paper-local.yaml"
    grid.write_text(example.replace("path: local-datasets", f"path: {copies}"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan, store = make_plan(load_grid(grid)), Store(str(begun))
    assert check_plan(plan) == []
    make_here(plan.graph, plan.targets, store)
    rows = gather(plan, store).to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    for pruner in ("dense", "wanda"):
        own = {(row["task"], row["metric"]): row for row in rows if row["pruner"] == pruner}
        names = ["boolq", "winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge"]
        names.append("mmlu_flan_n_shot_loglikelihood")
        mmlu = own[names[-1], "acc"]["value"]  # of 57 subjects with two questions each
        assert abs(mmlu - 0.25) < 4.2 * math.sqrt(0.25 * 0.75 / 114)
        mean = sum(own[name, "acc"]["value"] for name in names) / 7
        assert own["paper-all", "acc_average"]["value"] == pytest.approx(mean)
        for corpus in ("wikitext2", "c4-validation", "alpaca"):
            assert own[corpus, "perplexity"]["value"] > own[corpus, "bits_per_byte"]["value"] > 0
    pruned = next(row for row in rows if row["pruner"] == "wanda")
    assert pruned["bytes_masks"] < pruned["bytes_compressed"] < pruned["bytes_dense"]
    assert pruned["speed_2_4"].startswith(("not measured: no GPU", "0.", "1.", "2."))


def test_lm_eval_by_hand_on_an_exported_checkpoint_gives_the_same_numbers(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    dense = LocalModel(path=str(tiny_model_folder / "model"), dtype="float32")
    spec = PruneSpec(model=dense, pruner=Magnitude(), sparsity=0.3)
    for name in ("tasks", "pruned", "ours", "by-hand"):
        (tmp_path / name).mkdir()
    prune.run(spec, {}, tmp_path / "pruned")
    artifacts = {spec.key: tmp_path / "pruned"}
    write_checkpoint(spec, artifacts, tmp_path / "checkpoint")
    testbed_tasks.run(TasksSpec(questions=60), {}, tmp_path / "tasks")
    measured = EvaluateSpec.model_validate(
        {
            "model": spec,
            "tasks": [{"name": name, "num_fewshot": 1} for name in testbed_tasks.TASK_NAMES],
            "task_folder": LocalTasks(path=str(tmp_path / "tasks")),
        }
    )
    evaluate.run(measured, artifacts, tmp_path / "ours")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'checkpoint'},dtype=float32"]
    command += ["--tasks", ",".join(testbed_tasks.TASK_NAMES), "--num_fewshot", "1"]
    command += ["--include_path", str(tmp_path / "tasks"), "--batch_size", "16"]
    command += ["--output_path", str(tmp_path / "by-hand")]
    subprocess.run(command, cwd=tmp_path / "tasks", check=True, capture_output=True)
    (path,) = (tmp_path / "by-hand").rglob("results_*.json")
    by_hand: dict[str, dict[str, Any]] = json.loads(path.read_text())["results"]
    rows = pq.read_table(tmp_path / "ours" / "metrics.parquet").to_pylist()
    assert len(rows) == 3 * 2
    for row in rows:
        expected = by_hand[row["task"]]
        assert row["value"] == expected[f"{row['metric']},none"]
        assert row["stderr"] == expected[f"{row['metric']}_stderr,none"]
