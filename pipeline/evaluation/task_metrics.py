"""lm-eval tasks, asked of a language model: a row per metric and per question."""

import contextlib
import hashlib
import io
import json
import logging
import math
import numbers
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import progress
from pipeline.errors import InputError, NonFiniteError
from pipeline.evaluation.schemas import EvaluationResults, MetricRow, RequestRow, TaskRun
from pipeline.evaluation.task_data import copy_tasks, data_set_folder, reading_data_sets
from pipeline.evaluation.tasks import lm_eval_tasks, task_manager
from pipeline.specs import LocalDatasets, TaskSpec

SEED = 1234
"""Seed of few-shot examples and bootstrap samples: lm-eval's own default, the same everywhere."""

BOOTSTRAP_SAMPLES = 1000
"""For metrics whose standard error has no closed form."""


def task_metrics(
    language_model: Any,
    tasks: Iterable[TaskSpec],
    task_folder: Path | None = None,
    datasets: LocalDatasets | None = None,
    chat_template: bool = False,
) -> EvaluationResults:
    """Run lm-eval tasks and groups; the tasks of a group have rows of their own.

    A task of `task_folder` comes before lm-eval's task of that name. Its data are prepared in a
    temporary folder, so that evaluations side by side share no cache. lm-eval seeds the process's
    random generators with a fixed seed.

    Raises:
        InputError: if a task is unknown, fixes another number of few-shot examples, or asks what
            cannot be scored.
        NonFiniteError: if the model's answers, or a task's metrics of them, are not finite.
    """
    from lm_eval import simple_evaluate

    results = EvaluationResults([], [])
    undefined: list[str] = []
    whole = "" if getattr(language_model, "shares", True) else ", each request read as a whole"
    tasks = list(tasks)
    own_folder = None if task_folder is None else task_folder.resolve()  # the folder changes below
    with tempfile.TemporaryDirectory() as scratch, _quiet(), contextlib.ExitStack() as stack:
        names = [task.name for task in tasks]
        folder = data_set_folder(names, datasets, Path(scratch, "copies"))
        if folder is not None:
            stack.enter_context(reading_data_sets(folder, Path(scratch, "prepared")))
        own = None
        if own_folder is not None:
            copy_tasks(own_folder, Path(scratch, "tasks"), Path(scratch, "cache"))
            own = task_manager(Path(scratch, "tasks"))
        alike: dict[tuple[Any, int, int | None], list[str]] = {}
        for task in tasks:
            manager = own if own and task.name in own.all_tasks else lm_eval_tasks()
            if task.name not in manager.all_tasks:
                raise InputError("tasks", task.name, "neither lm-eval nor the task folder has it")
            alike.setdefault((manager, task.num_fewshot, task.limit), []).append(task.name)
        for (manager, num_fewshot, limit), names in alike.items():
            with progress.phase(f"tasks {', '.join(names)}{whole}"), _overflow_is_infinite(names):
                found = simple_evaluate(
                    model=language_model,
                    tasks=names,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    task_manager=manager,
                    bootstrap_iters=BOOTSTRAP_SAMPLES,
                    apply_chat_template=chat_template,
                    random_seed=SEED,
                    numpy_random_seed=SEED,
                    torch_random_seed=SEED,
                    fewshot_random_seed=SEED,
                )
            for name, used in found["n-shot"].items():
                if used != num_fewshot:
                    remedy = f"its own file fixes {used}, which lm-eval keeps to: ask for {used}"
                    raise InputError("num_fewshot", f"{name}: {num_fewshot}", remedy)
            for metric in _metric_rows(found, num_fewshot, limit):
                if math.isnan(metric.value):
                    undefined.append(f"{metric.task} {metric.metric}")
                else:
                    results.metrics.append(metric)
            results.requests.extend(_request_rows(found["samples"]))
    return results._replace(undefined=tuple(sorted(undefined)))


@contextlib.contextmanager
def _overflow_is_infinite(names: list[str]) -> Iterator[None]:
    """Name the tasks whose metric is too large for a number: lm-eval's perplexities raise."""
    try:
        yield
    except OverflowError as error:
        raise NonFiniteError(f"{', '.join(names)}: a metric is infinite ({error})") from error


def _metric_rows(
    results: dict[str, Any], num_fewshot: int, limit: int | None
) -> Iterator[MetricRow]:
    """Yield lm-eval's `<metric>,<filter>` and `<metric>_stderr,<filter>`; filter `none` is unnamed.

    A value may be NaN: the model's answers are finite, so it is the mean of no question. A standard
    error that lm-eval does not give, or gives as NaN, is None.

    Raises:
        NonFiniteError: if a value or an error is infinite.
    """
    for task, measured in results["results"].items():
        version = results["versions"].get(task)
        task_run = TaskRun(
            limit,
            num_fewshot,
            None if version is None else str(version),
            metadata.version("lm-eval"),
        )
        for name, value in measured.items():
            metric, comma, filter_name = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
                continue
            stderr = measured.get(f"{metric}_stderr,{filter_name}")
            known = isinstance(stderr, numbers.Real) and not math.isnan(stderr)
            if math.isinf(value) or (known and math.isinf(stderr)):
                raise NonFiniteError(f"{task}: {_unfiltered(name)} is {value:g} ± {stderr}")
            yield MetricRow(
                task,
                _unfiltered(name),
                float(value),
                float(stderr) if known else None,
                measured.get("sample_len"),
                task_run,
            )


def _request_rows(samples: dict[str, list[dict[str, Any]]]) -> Iterator[RequestRow]:
    for task, asked_about in samples.items():
        for document in asked_about:
            asked = _request_hash(document["arguments"])
            scores = [_log_likelihood(answer) for answer in document["filtered_resps"]]
            for metric in document["metrics"]:
                value = document[metric]
                is_number = isinstance(value, numbers.Real) and math.isfinite(value)
                yield RequestRow(
                    task,
                    document["doc_id"],
                    _unfiltered(f"{metric},{document['filter']}"),
                    float(value) if is_number else None,
                    document["doc_hash"][:16],
                    asked,
                    [score for score in scores if score is not None],
                )


def _request_hash(arguments: Iterable[Any]) -> str:
    """Return 16 hexadecimal digits that stand for a document's requests, as lm-eval words them."""
    text = json.dumps(list(arguments), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _log_likelihood(answer: Any) -> float | None:
    """Return the log-likelihood of a choice or a text; None for a generation."""
    if isinstance(answer, list | tuple) and answer:
        answer = answer[0]
    return float(answer) if isinstance(answer, float) else None


def _unfiltered(name: str) -> str:
    return name.removesuffix(",none")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and lm-eval's remarks; errors are still raised.

    After every call lm-eval also describes the machine. That starts a dozen programs, pip among
    them, and takes seconds.
    """
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level, describe_machine = logger.level, evaluator.add_env_info
    logger.setLevel(logging.ERROR)
    evaluator.add_env_info = lambda results: None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        evaluator.add_env_info = describe_machine
