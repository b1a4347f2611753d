"""The tables that an evaluation leaves. Whoever reads them needs no torch."""

from typing import Any, NamedTuple

import pyarrow as pa

METRICS_SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "metric": pa.string(),
        "value": pa.float64(),
        "stderr": pa.float64(),
        "samples": pa.int64(),
        "limit": pa.int64(),
        "num_fewshot": pa.int64(),
        "task_version": pa.string(),
        "lm_eval": pa.string(),
        "dtype": pa.string(),
        "tokenizer": pa.string(),
        "chat_template": pa.string(),
    }
)
"""`metrics.parquet`: one row per number."""

REQUESTS_SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "doc_id": pa.int64(),
        "metric": pa.string(),
        "value": pa.float64(),
        "doc_hash": pa.string(),
        "request_hash": pa.string(),
        "log_likelihoods": pa.list_(pa.float64()),
    }
)
"""`requests.parquet`: one row per number about one question or window."""


class TaskRun(NamedTuple):
    """How lm-eval ran a task; a perplexity has none of these."""

    limit: int | None = None
    num_fewshot: int | None = None
    task_version: str | None = None
    lm_eval: str | None = None


class MetricRow(NamedTuple):
    """One number about a model."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None
    """Questions, or windows of a perplexity."""
    task_run: TaskRun = TaskRun()

    def columns(self) -> dict[str, Any]:
        """Return the row's columns in `METRICS_SCHEMA`, those of model and tokenizer excepted."""
        columns = self._asdict()
        task_run: TaskRun = columns.pop("task_run")
        return columns | task_run._asdict()


class RequestRow(NamedTuple):
    """One number about one question or window."""

    task: str
    doc_id: int
    metric: str
    value: float | None
    """None if the metric is no mean over questions (F1), or has no value for this one."""
    doc_hash: str
    request_hash: str
    """Hash of all that the model was asked about it."""
    log_likelihoods: list[float]
    """One for each choice; for a window, the window's."""


class EvaluationResults(NamedTuple):
    """What was measured, and what it was made of."""

    metrics: list[MetricRow]
    requests: list[RequestRow]
    undefined: tuple[str, ...] = ()
    """Metrics without a value, since no question of their kind was asked."""
