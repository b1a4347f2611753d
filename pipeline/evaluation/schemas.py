"""The tables that an evaluation leaves; apart, since whoever reads them needs no torch."""

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
"""Of `metrics.parquet`: a row a number."""

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
"""Of `requests.parquet`: a row a number about one question or window."""
