"""The stage `evaluate`: perplexities on corpora, and lm-eval tasks."""

import functools
import gc
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import progress
from pipeline.data.corpora import read_documents
from pipeline.environment import scratch_folder
from pipeline.errors import InputError, NonFiniteError
from pipeline.evaluation.compression import bytes_by_format, speed_2_4
from pipeline.evaluation.divergence import Compared, compare_with_dense
from pipeline.evaluation.finished_answers import FinishedAnswers
from pipeline.evaluation.perplexity import (
    batches,
    bits_per_byte,
    losses,
    per_token,
    perplexity,
    protocol_windows,
)
from pipeline.evaluation.schemas import (
    METRICS_SCHEMA,
    REQUESTS_SCHEMA,
    EvaluationResults,
    MetricRow,
    RequestRow,
)
from pipeline.evaluation.task_metrics import task_metrics
from pipeline.evaluation.tasks import existing_folder
from pipeline.generation.vllm_engine import vllm_version
from pipeline.models.loading import load_tokenizer, open_model
from pipeline.models.memory import ModelMemory
from pipeline.models.nonfinite import nonfinite_error
from pipeline.models.output_layer import OutputLayer, check_causal
from pipeline.models.weight_files import unexpected_tensors
from pipeline.specs import (
    EvaluateSpec,
    LocalTasks,
    Model,
    PerplexitySpec,
    PruneSpec,
    Vllm,
    canonical_json,
    dense_model,
)
from pipeline.stage import Artifacts, Keep


def run(
    spec: EvaluateSpec,
    artifacts: Artifacts,
    output: Path,
    keep: Keep | None = None,
    **memory: Any,
) -> dict[str, Any]:
    """Measure all perplexities and run all tasks.

    Write `metrics.parquet`, sorted by task and metric, and `requests.parquet`, sorted by task,
    document and metric.

    Args:
        keep: keeps the model's answers; kept ones are not asked for again.
        memory: fields of `pipeline.models.memory.ModelMemory`, for both models if there are two.

    Returns:
        The report: numbers of metrics and requests, unused tensors, and a pruned model's gains.

    Raises:
        InputError: if a name is used twice, a corpus is too short or there is no such task.
        NonFiniteError: if the model gives NaN or infinity, with the text and the decoder layer.
    """
    check_names(spec)
    tokenizer = load_tokenizer(spec.model, artifacts)
    same = {
        "dtype": spec.model.dtype,
        "tokenizer": _tokenizer_hash(tokenizer),  # before lm-eval gives it a padding token
        "chat_template": _template_hash(tokenizer) if spec.chat_template else "none",
    }
    metrics: list[MetricRow] = []
    requests: list[RequestRow] = []
    with tempfile.TemporaryDirectory(prefix="calprune-", dir=scratch_folder()) as scratch:

        def opened(which: Model, name: str) -> Any:
            given = ModelMemory(**memory)
            return open_model(which, artifacts, Path(scratch, name), given, 1 + spec.compares)

        model = opened(spec.model, "model")
        check_causal(model)
        layer = OutputLayer(model)
        answers = FinishedAnswers(_model_identity(spec), Path(scratch, "answers"), keep)
        dense = None
        if spec.compares:
            dense = OutputLayer(opened(dense_model(spec.model), "dense"))
        for wanted in spec.perplexity:
            with progress.phase(f"perplexity {wanted.name}"):
                results = measure_perplexity(
                    layer,
                    tokenizer,
                    wanted,
                    spec.batch_tokens,
                    answers,
                    dense if wanted.kl else None,
                )
            metrics += results.metrics
            requests += results.requests
        del dense
        with progress.phase("measuring size and speed"):
            report = {**unexpected_tensors(model), **_gains(spec, model)}
        if layer.streamed:
            report["streamed"] = True
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

                del model, layer  # the engine loads its own
                gc.collect()
                with vllm_language_model(spec, artifacts) as engine:
                    results = ask(engine)
                report |= {"backend": "vllm", "backend_version": vllm_version()}
            else:
                with progress.phase("importing lm-eval"):  # takes seconds
                    from pipeline.evaluation.sharing_lm import SharingLM

                language_model = SharingLM(model, tokenizer, spec.batch_tokens, answers)
                results = ask(language_model)
                report |= {
                    "requests": language_model.asked,
                    "shared_contexts": language_model.shares,
                }
            metrics += results.metrics
            requests += results.requests
            if results.undefined:
                report["undefined_metrics"] = list(results.undefined)
        report["resumed_requests"] = answers.resumed
    metrics.sort(key=lambda row: (row.task, row.metric))
    requests.sort(key=lambda row: (row.task, row.doc_id, row.metric))
    _write([{**row.columns(), **same} for row in metrics], METRICS_SCHEMA, output / "metrics")
    _write([row._asdict() for row in requests], REQUESTS_SCHEMA, output / "requests")
    return {"metrics": len(metrics), **report}


def check_names(spec: EvaluateSpec) -> None:
    """Check that results can be told apart by their names.

    Raises:
        InputError: if a perplexity or task has the name of another.
    """
    names = [entry.name for entry in spec.perplexity] + [task.name for task in spec.tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError("name", name, "is measured twice in one evaluation: name each once")


def _gains(spec: EvaluateSpec, model: Any) -> dict[str, Any]:
    """Return size and speed of a pruned model; nothing for a dense one."""
    if not isinstance(spec.model, PruneSpec):
        return {}
    return {"bytes": bytes_by_format(model), "speed_2_4": speed_2_4(model)}


def _write(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path.with_suffix(".parquet"))


def _model_identity(spec: EvaluateSpec) -> bytes:
    """Return bytes that identify the model and the size of its batches."""
    return canonical_json([spec.lineage["model"], spec.batch_tokens])


def _tokenizer_hash(tokenizer: Any) -> str:
    """Return 12 hexadecimal digits that stand for how text is tokenised."""
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


# ------------------------------------------------------------------------------------- perplexity


def measure_perplexity(
    layer: OutputLayer,
    tokenizer: Any,
    wanted: PerplexitySpec,
    batch_tokens: int,
    answers: FinishedAnswers,
    dense: OutputLayer | None = None,
) -> EvaluationResults:
    """Measure a perplexity, the bits per byte that go with it, and the loss of each window.

    Args:
        layer: the model's.
        dense: that of the model to compare with; None compares with none.

    Raises:
        NonFiniteError: if a loss or divergence is NaN or infinite, or a loss is too large for a
            perplexity.
    """
    texts = read_documents(wanted.corpus, blank=wanted.joined_by is not None)
    windows = protocol_windows((document.text for document in texts), tokenizer, wanted)
    vocabulary = None if layer.chunked else layer.model.config.get_text_config().vocab_size
    tokens = layer.batch_tokens(batch_tokens)
    places = list(batches(windows, tokens, vocabulary, layer.lengths))
    batched = [[windows[place] for place in batch] for batch in places]
    asked = [
        [window.first.to_bytes(8, "big") + window.ids.tobytes() for window in batch]
        + ([] if dense is None else [b"compared with the dense model"])
        for batch in batched
    ]

    def measure(missing: list[int]) -> Iterator[list[Sequence[float]]]:
        unanswered = [batched[number] for number in missing]
        measured: Iterator[list[Any]]
        if dense is None:
            measured = ([(loss,) for loss in each] for each in losses(layer, unanswered))
        else:
            measured = compare_with_dense(layer, dense, unanswered)
        for number, batch, found in zip(missing, unanswered, measured, strict=True):
            for place, window, (loss, *others) in zip(places[number], batch, found, strict=True):
                where = f"{wanted.name}, window {place}"
                if not math.isfinite(loss):
                    raise nonfinite_error(where, layer.model, window.ids.tolist())
                if not all(map(math.isfinite, others)):
                    assert dense is not None
                    where = f"{where}, dense model"
                    raise nonfinite_error(where, dense.model, window.ids.tolist())
            yield found

    sums: dict[int, Sequence[float]] = {}
    for number, measured in answers.each(asked, measure):
        sums |= zip(places[number], measured, strict=True)
        progress.report(len(sums), len(windows), "windows")
    by_metric = zip(*(sums[place] for place in range(len(windows))), strict=True)
    by_token = dict(zip(Compared._fields, map(list, by_metric), strict=False))
    summed = by_token["loss"]
    try:
        found = {
            _perplexity_name(wanted): perplexity(windows, summed, wanted),
            "bits_per_byte": bits_per_byte(windows, summed),
        }
    except NonFiniteError as error:
        raise NonFiniteError(f"{wanted.name}: {error}") from error
    found |= {name: per_token(windows, each) for name, each in by_token.items() if name != "loss"}
    metrics = [
        MetricRow(wanted.name, name, measured.value, measured.stderr, measured.windows)
        for name, measured in found.items()
    ]
    requests = []
    for number, window in enumerate(windows):
        text = hashlib.sha256(window.ids.tobytes()).hexdigest()[:16]
        for name, each in by_token.items():
            likelihoods = [-each[number]] if name == "loss" else []
            value = each[number] / window.scored
            requests.append(RequestRow(wanted.name, number, name, value, text, text, likelihoods))
    return EvaluationResults(metrics, requests)


def _perplexity_name(wanted: PerplexitySpec) -> str:
    kind = "" if wanted.normalisation == "token" else f"{wanted.normalisation}_"
    return f"{kind}perplexity"
