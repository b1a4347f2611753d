"""Evaluation of a grid's cells against lm-eval's own command line: same metrics, and how fast.

    python -m benchmarks.evaluate [--cells 8] [--questions 200] [--output PATH]

The cells are a model of the testbed's shape `small`, pruned by magnitude to as many sparsities, the
tasks those of the suite `testbed`. lm-eval's command line is started once a cell, as it has to be;
its model in one process, with its tasks loaded once, tells what of the difference is no start-up.
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
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.heap import keep_freed_memory
from pipeline.specs import EvaluateSpec, LocalModel, LocalTasks, TestbedTasksSpec
from pipeline.testbed import tasks as testbed_tasks
from pipeline.testbed.presets import PRETRAIN_PRESETS
from pipeline.testbed.tokenizer import train_tokenizer

logger = logging.getLogger("benchmarks")

TARGET = 1.5
"""Times the speed of lm-eval's command line."""

BATCH = 32
"""Requests of a batch of lm-eval's."""

Metrics = dict[tuple[str, str], float]


def write_cells(folder: Path, cells: int, questions: int) -> list[Path]:
    """Tasks in `folder/tasks`, and a checkpoint a cell; returns the checkpoints."""
    (folder / "tasks").mkdir()
    testbed_tasks.run(TestbedTasksSpec(questions=questions), {}, folder / "tasks")
    texts = [
        json.loads(line)["question"]
        for path in sorted((folder / "tasks").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    tokenizer = train_tokenizer(texts, 1024)
    shape = PRETRAIN_PRESETS["small"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.hidden_size // shape.head_dim,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.seqlen,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
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


def ours(checkpoints: list[Path], tasks: Path) -> list[Metrics]:
    """One process, one load of a model for all its tasks."""
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


def command_line(checkpoints: list[Path], tasks: Path) -> list[Metrics]:
    """`lm_eval` once a cell."""
    found = []
    for checkpoint in checkpoints:
        with tempfile.TemporaryDirectory() as output:
            arguments = [sys.executable, "-m", "lm_eval", "--model", "hf"]
            arguments += ["--model_args", f"pretrained={checkpoint}", "--device", _device()]
            arguments += ["--tasks", ",".join(testbed_tasks.TASK_NAMES)]
            arguments += ["--include_path", str(tasks), "--batch_size", str(BATCH)]
            arguments += ["--output_path", output]
            subprocess.run(arguments, cwd=tasks, check=True, capture_output=True)
            (path,) = Path(output).rglob("results_*.json")
            found.append(_metrics(json.loads(path.read_text())["results"]))
    return found


def one_process(checkpoints: list[Path], tasks: Path) -> list[Metrics]:
    """lm-eval's model, with its tasks loaded once."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = []
    with contextlib.chdir(tasks), contextlib.redirect_stderr(io.StringIO()):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        for checkpoint in checkpoints:
            results = simple_evaluate(
                model=HFLM(pretrained=str(checkpoint), device=_device(), batch_size=BATCH),
                tasks=list(testbed_tasks.TASK_NAMES),
                task_manager=manager,
            )
            found.append(_metrics(results["results"]))
    return found


def _metrics(results: dict[str, dict[str, Any]]) -> Metrics:
    return {
        (task, name.removesuffix(",none")): value
        for task, measured in results.items()
        for name, value in measured.items()
        if name.endswith(",none") and not name.endswith("stderr,none")
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


WAYS = {"ours": ours, "lm_eval in one process": one_process, "lm_eval's command line": command_line}


def main(
    cells: Annotated[int, typer.Option(min=1)] = 8,
    questions: Annotated[int, typer.Option(min=8, help="Of each of three tasks.")] = 200,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Compare by seconds for all cells; stop if a metric differs in any digit."""
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, float] = {}
    found: dict[str, list[Metrics]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = write_cells(Path(scratch), cells, questions)
        for way, run in WAYS.items():
            started = time.perf_counter()
            with context.Pool(1) as pool:
                found[way] = pool.apply(run, (checkpoints, Path(scratch, "tasks")))
            seconds[way] = time.perf_counter() - started
            logger.info("%s: %.1f s", way, seconds[way])
    for way, metrics in found.items():
        if metrics != found["ours"]:
            raise SystemExit(f"{way} has other metrics: {metrics} and not {found['ours']}")
    table = Table("way", "seconds", "times ours", title=f"{cells} cells, {3 * questions} questions")
    for way, taken in seconds.items():
        table.add_row(way, f"{taken:.1f}", f"{taken / seconds['ours']:.2f}")
    console = Console(width=100)
    console.print(table)
    console.print("all metrics are the same to the last digit")
    ratio = seconds["lm_eval's command line"] / seconds["ours"]
    console.print(f"target {TARGET:g}: {'met' if ratio >= TARGET else 'missed'}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        record = {"cells": cells, "questions": questions, "device": _device(), "seconds": seconds}
        output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    typer.run(main)
