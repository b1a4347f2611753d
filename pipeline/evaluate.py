"""Measuring a model: perplexities on corpora, and lm-eval tasks."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpora import documents
from pipeline.errors import InputError
from pipeline.models import Artifacts, load_model, load_tokenizer
from pipeline.perplexity import joined_windows, perplexity
from pipeline.specs import EvaluateSpec, LocalTasks, TaskSpec
from pipeline.tasks import copy_tasks, existing_folder, lm_eval_tasks, task_manager
from pipeline.windows import tokenize_with, tokenized

SEED = 1234
"""Draws few-shot examples and bootstrap samples; lm-eval's own default, and the same everywhere."""

BOOTSTRAP_SAMPLES = 1000
"""Of metrics whose standard error has no closed form."""

SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "metric": pa.string(),
        "value": pa.float64(),
        "stderr": pa.float64(),
        "samples": pa.int64(),
    }
)


class Metric(NamedTuple):
    """One number about a model; `samples` are questions, or windows for a perplexity."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None


def run(spec: EvaluateSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Take all perplexities and run all tasks; write `metrics.parquet`, sorted by task and metric.

    Raises:
        InputError: if a name is used twice, a corpus is too short or a task is not to be had.
    """
    names = [entry.name for entry in spec.perplexity] + [task.name for task in spec.tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError("name", name, "is measured twice in one evaluation: name each once")
    model = load_model(spec.model, artifacts)
    tokenizer = load_tokenizer(spec.model, artifacts)
    tokenize = tokenize_with(tokenizer, special_tokens=True)
    metrics = []
    for wanted in spec.perplexity:
        texts = tokenized(documents(wanted.corpus), tokenize)
        windows = joined_windows(texts, wanted.seqlen, wanted.max_windows)
        measured = perplexity(model, windows, spec.batch_size)
        metrics.append(
            Metric(wanted.name, "perplexity", measured.value, measured.stderr, measured.windows)
        )
    if spec.tasks:
        folder = _task_folder(spec, artifacts)
        metrics += task_metrics(model, tokenizer, spec.tasks, folder, spec.batch_size)
    metrics.sort()
    columns = dict(zip(Metric._fields, zip(*metrics, strict=True), strict=True))
    pq.write_table(pa.table(columns, schema=SCHEMA), output / "metrics.parquet")
    return {"metrics": len(metrics)}


def _task_folder(spec: EvaluateSpec, artifacts: Artifacts) -> Path | None:
    match spec.task_folder:
        case None:
            return None
        case LocalTasks():
            return existing_folder(spec.task_folder.path)
        case _:
            return artifacts[spec.task_folder.key]


# ------------------------------------------------------------------------------------------ tasks


def task_metrics(
    model: Any,
    tokenizer: Any,
    tasks: Iterable[TaskSpec],
    task_folder: Path | None = None,
    batch_size: int = 32,
) -> list[Metric]:
    """Run lm-eval tasks and groups; the tasks of a group have rows of their own.

    A name that `task_folder` has means the task there, even if lm-eval has one of that name. Its
    data are prepared in a temporary folder, so that evaluations side by side share no cache.
    lm-eval seeds the process's random generators with a fixed seed.

    Raises:
        InputError: if a task is not known, or fixes another number of few-shot examples.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    metrics: list[Metric] = []
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        own = None
        if task_folder is not None:
            copy_tasks(task_folder, Path(scratch, "tasks"), Path(scratch, "cache"))
            own = task_manager(Path(scratch, "tasks"))
        alike: dict[tuple[Any, int, int | None], list[str]] = {}
        for task in tasks:
            manager = own if own and task.name in own.all_tasks else lm_eval_tasks()
            if task.name not in manager.all_tasks:
                raise InputError("tasks", task.name, "neither lm-eval nor the task folder has it")
            alike.setdefault((manager, task.num_fewshot, task.limit), []).append(task.name)
        language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        for (manager, num_fewshot, limit), names in alike.items():
            results = simple_evaluate(
                model=language_model,
                tasks=names,
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=BOOTSTRAP_SAMPLES,
                log_samples=False,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
            for name, used in results["n-shot"].items():
                if used != num_fewshot:
                    remedy = f"its own file fixes {used}, which lm-eval keeps to: ask for {used}"
                    raise InputError("num_fewshot", f"{name}: {num_fewshot}", remedy)
            metrics += _rows(results["results"])
    return metrics


def _rows(results: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    """lm-eval's `<metric>,<filter>` and `<metric>_stderr,<filter>`, the filter `none` unnamed."""
    for task, measured in results.items():
        for name, value in measured.items():
            metric, comma, chosen = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = measured.get(f"{metric}_stderr,{chosen}")
            yield Metric(
                task,
                metric if chosen == "none" else name,
                float(value),
                float(stderr) if isinstance(stderr, int | float) else None,
                measured.get("sample_len"),
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and lm-eval's remarks; errors still rise."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
