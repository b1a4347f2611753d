"""Measuring a model: perplexities on corpora, and lm-eval tasks."""

import contextlib
import functools
import gc
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
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import progress
from pipeline.data.corpora import documents
from pipeline.errors import InputError, NonFiniteError
from pipeline.evaluation.compression import bytes_by_format, speed_2_4
from pipeline.evaluation.finished_answers import FinishedAnswers
from pipeline.evaluation.perplexity import (
    Window,
    batches,
    bits_per_byte,
    losses,
    perplexity,
    protocol_windows,
)
from pipeline.evaluation.schemas import METRICS_SCHEMA, REQUESTS_SCHEMA
from pipeline.evaluation.tasks import (
    copy_tasks,
    existing_folder,
    link_data_sets,
    lm_eval_tasks,
    task_manager,
)
from pipeline.generation.vllm_engine import vllm_version
from pipeline.models.loading import load_model, load_tokenizer, model_dtype
from pipeline.models.nonfinite import nonfinite_error
from pipeline.models.output_layer import check_causal, head_is_linear
from pipeline.models.positions import length_dependence
from pipeline.models.weight_files import unexpected_tensors
from pipeline.specs import (
    EvaluateSpec,
    LocalDatasets,
    LocalTasks,
    PerplexitySpec,
    PruneSpec,
    TaskSpec,
    Vllm,
    canonical_json,
)
from pipeline.stage import Artifacts, Keep

SEED = 1234
"""Draws few-shot examples and bootstrap samples; lm-eval's own default, and the same everywhere."""

BOOTSTRAP_SAMPLES = 1000
"""Of metrics whose standard error has no closed form."""


class Metric(NamedTuple):
    """One number about a model; `samples` are questions, or windows for a perplexity."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None
    limit: int | None = None
    num_fewshot: int | None = None
    task_version: str | None = None
    lm_eval: str | None = None


class RequestMetric(NamedTuple):
    """One number about one question or window."""

    task: str
    doc_id: int
    metric: str
    value: float | None
    """None where the metric is no mean over questions (F1), or has no value for this one."""
    doc_hash: str
    request_hash: str
    """Of all that the model was asked about it."""
    log_likelihoods: list[float]
    """Of the choices; of a window, its one."""


class Results(NamedTuple):
    """What was measured, and what it was made of."""

    metrics: list[Metric]
    requests: list[RequestMetric]
    undefined: tuple[str, ...] = ()
    """Metrics that lm-eval has no number for, since no question of a kind was asked."""


def run(
    spec: EvaluateSpec, artifacts: Artifacts, output: Path, keep: Keep | None = None
) -> dict[str, Any]:
    """Take all perplexities and run all tasks; write `metrics.parquet`, sorted by task and metric,
    and `requests.parquet`, sorted by task, document and metric.

    Args:
        keep: keeps what the model has answered; that is not asked again.

    Raises:
        InputError: if a name is used twice, a corpus is too short or a task is not to be had.
        NonFiniteError: if the model gives NaN or infinity, with the text and the decoder layer.
    """
    names = [entry.name for entry in spec.perplexity] + [task.name for task in spec.tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError("name", name, "is measured twice in one evaluation: name each once")
    model = load_model(spec.model, artifacts)
    check_causal(model)
    tokenizer = load_tokenizer(spec.model, artifacts)
    same = {
        "dtype": model_dtype(spec.model),
        "tokenizer": _tokenizer_hash(tokenizer),  # before it is given a token to pad with
        "chat_template": _template_hash(tokenizer) if spec.chat_template else "none",
    }
    metrics: list[Metric] = []
    requests: list[RequestMetric] = []
    with tempfile.TemporaryDirectory() as scratch:
        answers = FinishedAnswers(_identity(spec), Path(scratch, "answers"), keep)
        for wanted in spec.perplexity:
            with progress.phase(f"perplexity {wanted.name}"):
                taken = take_perplexity(model, tokenizer, wanted, spec.batch_tokens, answers)
            metrics += taken.metrics
            requests += taken.requests
        with progress.phase("measuring size and speed"):
            report = {**unexpected_tensors(model), **_gains(spec, model)}
        if spec.tasks:
            ask = functools.partial(
                task_metrics,
                tasks=spec.tasks,
                task_folder=_task_folder(spec, artifacts),
                datasets=spec.datasets,
                chat_template=spec.chat_template,
            )
            if isinstance(spec.backend, Vllm):
                from pipeline.evaluation.vllm_lm import vllm_language_model

                del model  # the engine loads one of its own
                gc.collect()
                with vllm_language_model(spec, artifacts) as engine:
                    taken = ask(engine)
                report |= {"backend": "vllm", "backend_version": vllm_version()}
            else:
                with progress.phase("importing lm-eval"):  # takes seconds
                    from pipeline.evaluation.sharing_lm import SharingLM

                language_model = SharingLM(model, tokenizer, spec.batch_tokens, answers)
                taken = ask(language_model)
                report |= {
                    "requests": language_model.asked,
                    "shared_contexts": language_model.shares,
                }
            metrics += taken.metrics
            requests += taken.requests
            if taken.undefined:
                report["undefined_metrics"] = list(taken.undefined)
        report["resumed_requests"] = answers.resumed
    metrics.sort(key=lambda row: (row.task, row.metric))
    requests.sort(key=lambda row: (row.task, row.doc_id, row.metric))
    _write([{**row._asdict(), **same} for row in metrics], METRICS_SCHEMA, output / "metrics")
    _write([row._asdict() for row in requests], REQUESTS_SCHEMA, output / "requests")
    return {"metrics": len(metrics), **report}


def _gains(spec: EvaluateSpec, model: Any) -> dict[str, Any]:
    """Of a pruned model."""
    if not isinstance(spec.model, PruneSpec):
        return {}
    return {"bytes": bytes_by_format(model), "speed_2_4": speed_2_4(model)}


def _write(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path.with_suffix(".parquet"))


def _identity(spec: EvaluateSpec) -> bytes:
    """What tells this model, and what it is asked with, from all others."""
    return canonical_json([spec.lineage["model"], spec.batch_tokens])


def _tokenizer_hash(tokenizer: Any) -> str:
    """12 hexadecimal digits that stand for how text is tokenised."""
    if tokenizer.is_fast:
        content: str = tokenizer.backend_tokenizer.to_str()
    else:
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _template_hash(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    if template is None:
        raise InputError("chat_template", True, "the tokenizer has none: leave chat_template out")
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:12]


def _task_folder(spec: EvaluateSpec, artifacts: Artifacts) -> Path | None:
    match spec.task_folder:
        case None:
            return None
        case LocalTasks():
            return existing_folder(spec.task_folder.path)
        case _:
            return artifacts[spec.task_folder.key]


# ----------------------------------------------------------------------------------- perplexities


def take_perplexity(
    model: Any, tokenizer: Any, wanted: PerplexitySpec, batch_tokens: int, answers: FinishedAnswers
) -> Results:
    """A perplexity, the bits per byte that go with it, and the loss of each window.

    Raises:
        NonFiniteError: if a loss is NaN or infinite, or too large for a perplexity.
    """
    texts = documents(wanted.corpus, blank=wanted.joined_by is not None)
    windows = protocol_windows((document.text for document in texts), tokenizer, wanted)
    summed = [0.0] * len(windows)
    done = 0
    chunked = head_is_linear(model)
    vocabulary = None if chunked else model.config.get_text_config().vocab_size
    for places in batches(windows, batch_tokens, vocabulary, length_dependence(model.config)):
        batch = {place: windows[place] for place in places}
        asked = [
            window.first.to_bytes(8, "big") + window.ids.tobytes() for window in batch.values()
        ]

        def measure(batch: dict[int, Window] = batch) -> list[float]:
            measured = losses(model, list(batch.values()), chunked)
            for (place, window), loss in zip(batch.items(), measured, strict=True):
                if not math.isfinite(loss):
                    raise nonfinite_error(
                        f"{wanted.name}, window {place}", model, window.ids.tolist()
                    )
            return measured

        for place, loss in zip(places, answers.get(asked, measure), strict=True):
            summed[place] = loss
        done += len(batch)
        progress.report(done, len(windows), "windows")
    try:
        found = {
            _perplexity_name(wanted): perplexity(windows, summed, wanted),
            "bits_per_byte": bits_per_byte(windows, summed),
        }
    except NonFiniteError as error:
        raise NonFiniteError(f"{wanted.name}: {error}") from error
    metrics = [
        Metric(wanted.name, name, measured.value, measured.stderr, measured.windows)
        for name, measured in found.items()
    ]
    requests = []
    for number, (window, loss) in enumerate(zip(windows, summed, strict=True)):
        text = hashlib.sha256(window.ids.tobytes()).hexdigest()[:16]
        requests.append(
            RequestMetric(wanted.name, number, "loss", loss / window.scored, text, text, [-loss])
        )
    return Results(metrics, requests)


def _perplexity_name(wanted: PerplexitySpec) -> str:
    kind = "" if wanted.normalisation == "token" else f"{wanted.normalisation}_"
    return f"{kind}perplexity"


# ------------------------------------------------------------------------------------------ tasks


def task_metrics(
    language_model: Any,
    tasks: Iterable[TaskSpec],
    task_folder: Path | None = None,
    datasets: LocalDatasets | None = None,
    chat_template: bool = False,
) -> Results:
    """Run lm-eval tasks and groups; the tasks of a group have rows of their own.

    A name that `task_folder` has means the task there, even if lm-eval has one of that name. Its
    data are prepared in a temporary folder, so that evaluations side by side share no cache.
    lm-eval seeds the process's random generators with a fixed seed.

    Raises:
        InputError: if a task is not known, or fixes another number of few-shot examples, or asks
            what no model can be asked.
        NonFiniteError: if the model's answers, or what a task makes of them, are not finite.
    """
    from lm_eval import simple_evaluate

    taken = Results([], [])
    undefined: list[str] = []
    whole = "" if getattr(language_model, "shares", True) else ", each request read as a whole"
    tasks = list(tasks)
    own_folder = None if task_folder is None else task_folder.resolve()  # before it is left
    with tempfile.TemporaryDirectory() as scratch, _quiet(), contextlib.ExitStack() as stack:
        folder = _data_sets(tasks, datasets, Path(scratch, "copies"))
        if folder is not None:
            stack.enter_context(_among(folder, Path(scratch, "prepared")))
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
            with progress.phase(f"tasks {', '.join(names)}{whole}"), _in_range(names):
                results = simple_evaluate(
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
            for name, used in results["n-shot"].items():
                if used != num_fewshot:
                    remedy = f"its own file fixes {used}, which lm-eval keeps to: ask for {used}"
                    raise InputError("num_fewshot", f"{name}: {num_fewshot}", remedy)
            for metric in _metrics(results, num_fewshot, limit):
                if math.isnan(metric.value):
                    undefined.append(f"{metric.task} {metric.metric}")
                else:
                    taken.metrics.append(metric)
            taken.requests.extend(_requests(results["samples"]))
    return taken._replace(undefined=tuple(sorted(undefined)))


@contextlib.contextmanager
def _in_range(names: list[str]) -> Iterator[None]:
    """Say whose metric is too large for a number: lm-eval's perplexities raise."""
    try:
        yield
    except OverflowError as error:
        raise NonFiniteError(f"{', '.join(names)}: a metric is infinite ({error})") from error


def _data_sets(
    tasks: Iterable[TaskSpec], datasets: LocalDatasets | None, links: Path
) -> Path | None:
    """The folder that tasks find their data sets in; None where all come from the hub."""
    if datasets is None:
        return links if link_data_sets([task.name for task in tasks], links) else None
    if not Path(datasets.path).is_dir():
        raise InputError("datasets", datasets.path, "is no folder: give one with data sets")
    return Path(datasets.path)


@contextlib.contextmanager
def _among(folder: Path, prepared: Path) -> Iterator[None]:
    """In a folder of data sets: `datasets` takes a folder before it asks the hub."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = prepared
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def _metrics(results: dict[str, Any], num_fewshot: int, limit: int | None) -> Iterator[Metric]:
    """lm-eval's `<metric>,<filter>` and `<metric>_stderr,<filter>`, the filter `none` unnamed.

    A value may be NaN: the model's answers are finite, so it is the mean of no question. What
    standard error lm-eval does not give, or gives as NaN, there is not.

    Raises:
        NonFiniteError: if a value or an error is infinite.
    """
    for task, measured in results["results"].items():
        for name, value in measured.items():
            metric, comma, _ = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
                continue
            stderr = measured.get(f"{metric}_stderr,{name.partition(',')[2]}")
            known = isinstance(stderr, numbers.Real) and not math.isnan(stderr)
            if math.isinf(value) or (known and math.isinf(stderr)):
                raise NonFiniteError(f"{task}: {_unfiltered(name)} is {value:g} ± {stderr}")
            version = results["versions"].get(task)
            yield Metric(
                task,
                _unfiltered(name),
                float(value),
                float(stderr) if known else None,
                measured.get("sample_len"),
                limit,
                num_fewshot,
                None if version is None else str(version),
                metadata.version("lm-eval"),
            )


def _requests(samples: dict[str, list[dict[str, Any]]]) -> Iterator[RequestMetric]:
    from pipeline.evaluation.sharing_lm import fingerprint

    for task, asked_about in samples.items():
        for document in asked_about:
            asked = fingerprint(document["arguments"])
            scores = [_log_likelihood(answer) for answer in document["filtered_resps"]]
            for metric in document["metrics"]:
                value = document[metric]
                is_number = isinstance(value, numbers.Real) and math.isfinite(value)
                yield RequestMetric(
                    task,
                    document["doc_id"],
                    _unfiltered(f"{metric},{document['filter']}"),
                    float(value) if is_number else None,
                    document["doc_hash"][:16],
                    asked,
                    [score for score in scores if score is not None],
                )


def _log_likelihood(answer: Any) -> float | None:
    """That of a choice or a text; a generation has none."""
    if isinstance(answer, list | tuple) and answer:
        answer = answer[0]
    return float(answer) if isinstance(answer, float) else None


def _unfiltered(name: str) -> str:
    return name.removesuffix(",none")


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
