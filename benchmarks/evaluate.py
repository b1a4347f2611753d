"""Compare the evaluation of a grid's cells with lm-eval's command line: metrics and seconds.

    python -m benchmarks.evaluate [--cells 8] [--questions 200] [--output PATH]

The cells are one model of the testbed's shape `small`, pruned by magnitude to as many sparsities.
The tasks are those of the suite `testbed`. lm-eval's command line has to start once a cell. A third
way, lm-eval's model in one process with its tasks loaded once, shows how much of the difference is
start-up.
"""

import contextlib
import io
import json
import logging
import multiprocessing
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.geometry import TESTBED
from benchmarks.record import machine, write_json
from pipeline.models.heap import keep_freed_memory
from pipeline.specs import EvaluateSpec, LocalModel, LocalTasks, TestbedTasksSpec
from pipeline.testbed import tasks as testbed_tasks
from pipeline.testbed.tokenizer import train_tokenizer

logger = logging.getLogger("benchmarks")

_TARGET = 1.5
"""Times the speed of lm-eval's command line."""

_BATCH = 32
"""Requests in a batch of lm-eval."""

TaskMetrics = dict[tuple[str, str], float]


def write_cells(folder: Path, cells: int, questions: int) -> list[Path]:
    """Write tasks to `folder/tasks` and one checkpoint a cell; return the checkpoints."""
    (folder / "tasks").mkdir()
    testbed_tasks.run(TestbedTasksSpec(questions=questions), {}, folder / "tasks")
    texts = [
        json.loads(line)["question"]
        for path in sorted((folder / "tasks").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    tokenizer = train_tokenizer(texts, 1024)
    geometry = replace(TESTBED, vocabulary=len(tokenizer))
    model = geometry.model(torch.device("cpu"), torch.float32)
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    checkpoints = []
    for cell in range(cells):
        for layer in model.model.layers:
            for name, weight in layer.named_parameters():
                if name.endswith("proj.weight"):
                    rank = max(1, round(cell / cells * weight.numel()))
                    least = weight.detach().abs().flatten().kthvalue(rank).values
                    weight.data.mul_(weight.abs() > least)
        path = folder / f"cell-{cell}"
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        checkpoints.append(path)
    return checkpoints


def ours(checkpoints: list[Path], tasks: Path) -> list[TaskMetrics]:
    """Evaluate all cells in one process; load each model once for all its tasks."""
    from pipeline.evaluation import evaluate

    keep_freed_memory()  # as every stage does
    found = []
    for checkpoint in checkpoints:
        spec = EvaluateSpec.model_validate(
            {
                "model": LocalModel(path=str(checkpoint), dtype="float32"),
                "tasks": [{"name": name} for name in testbed_tasks.TASK_NAMES],
                "task_folder": LocalTasks(path=str(tasks)),
            }
        )
        with tempfile.TemporaryDirectory() as output:
            evaluate.run(spec, {}, Path(output))
            rows = pq.read_table(Path(output, "metrics.parquet")).to_pylist()
        found.append({(row["task"], row["metric"]): row["value"] for row in rows})
    return found


def command_line(checkpoints: list[Path], tasks: Path) -> list[TaskMetrics]:
    """Run `lm_eval` once a cell."""
    found = []
    for checkpoint in checkpoints:
        with tempfile.TemporaryDirectory() as output:
            arguments = [sys.executable, "-m", "lm_eval", "--model", "hf"]
            arguments += ["--model_args", f"pretrained={checkpoint}", "--device", _device()]
            arguments += ["--tasks", ",".join(testbed_tasks.TASK_NAMES)]
            arguments += ["--include_path", str(tasks), "--batch_size", str(_BATCH)]
            arguments += ["--output_path", output]
            subprocess.run(arguments, cwd=tasks, check=True, capture_output=True)
            (path,) = Path(output).rglob("results_*.json")
            found.append(_metrics(json.loads(path.read_text())["results"]))
    return found


def one_process(checkpoints: list[Path], tasks: Path) -> list[TaskMetrics]:
    """Evaluate all cells with lm-eval's model in one process; load its tasks once."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = []
    with contextlib.chdir(tasks), contextlib.redirect_stderr(io.StringIO()):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        for checkpoint in checkpoints:
            results = simple_evaluate(
                model=HFLM(pretrained=str(checkpoint), device=_device(), batch_size=_BATCH),
                tasks=list(testbed_tasks.TASK_NAMES),
                task_manager=manager,
            )
            found.append(_metrics(results["results"]))
    return found


def _metrics(results: dict[str, dict[str, Any]]) -> TaskMetrics:
    return {
        (task, name.removesuffix(",none")): value
        for task, measured in results.items()
        for name, value in measured.items()
        if name.endswith(",none") and not name.endswith("stderr,none")
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


_WAYS = {
    "ours": ours,
    "lm_eval in one process": one_process,
    "lm_eval's command line": command_line,
}


def main(
    cells: Annotated[int, typer.Option(min=1)] = 8,
    questions: Annotated[int, typer.Option(min=8, help="In each of three tasks.")] = 200,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Compare the seconds for all cells; fail if a metric differs in any digit."""
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, float] = {}
    found: dict[str, list[TaskMetrics]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = write_cells(Path(scratch), cells, questions)
        for way, run in _WAYS.items():
            started = time.perf_counter()
            with context.Pool(1) as pool:
                found[way] = pool.apply(run, (checkpoints, Path(scratch, "tasks")))
            seconds[way] = time.perf_counter() - started
            logger.info("%s: %.1f s", way, seconds[way])
    for way, metrics in found.items():
        if metrics != found["ours"]:
            raise SystemExit(f"{way}: metrics {metrics} differ from ours, {found['ours']}")
    table = Table("way", "seconds", "times ours", title=f"{cells} cells, {3 * questions} questions")
    for way, taken in seconds.items():
        table.add_row(way, f"{taken:.1f}", f"{taken / seconds['ours']:.2f}")
    console = Console(width=100)
    console.print(table)
    console.print("all metrics agree to the last digit")
    ratio = seconds["lm_eval's command line"] / seconds["ours"]
    console.print(f"target {_TARGET:g}: {'met' if ratio >= _TARGET else 'missed'}")
    here = machine(torch.device(_device()), torch.float32)
    write_json(output, {**here, "cells": cells, "questions": questions, "seconds": seconds})


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    typer.run(main)
