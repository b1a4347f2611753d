"""Print a results table for people."""

import pandas as pd
import pyarrow as pa
from rich.console import Console
from rich.table import Table

CELL = ["model", "pruner", "target", "calibration", "seed"]
VARIED = [
    "allocation",
    "allocation_options",
    "nsamples",
    "seqlen",
    "prefix_tokens",
    "drop_fraction",
    "num_samples",
    "temperature",
    "pruner_options",
]


def print_results(results: pa.Table, console: Console) -> None:
    """One row a cell, one column a metric; below it, why cells have no result."""
    frame = results.to_pandas()
    frame["target"] = [
        pattern if isinstance(pattern, str) and ":" in pattern else f"{sparsity:.0%}"
        for pattern, sparsity in zip(frame["pattern"], frame["sparsity"], strict=True)
    ]
    varied = [column for column in VARIED if frame[column].nunique(dropna=True) > 1]
    measured = frame[frame["metric"].notna()]
    columns = list(dict.fromkeys(zip(measured["task"], measured["metric"], strict=True)))
    table = Table(title=f"{frame['grid'].iloc[0]}: {frame['cell'].nunique()} cells")
    for heading in [*CELL, *varied]:
        table.add_column(heading)
    limits = measured.groupby("task")["limit"].min().dropna()
    for task, metric in columns:
        limited = f"\nfirst {limits[task]:.0f}" if task in limits else ""
        table.add_column(f"{task}\n{metric}{limited}", justify="right")
    for _, rows in frame.groupby("cell", sort=False):
        first = rows.iloc[0]
        values = {
            (row.task, row.metric): f"{row.value:.4g}" for row in rows.itertuples() if row.metric
        }
        shown = [values.get(column, first["status"]) for column in columns]
        table.add_row(*(_text(first[field]) for field in [*CELL, *varied]), *shown)
    console.print(table)
    if len(limits):
        console.print("first N: only so many questions of a task were asked; no paper's number")
    for _, row in frame[frame["status"] == "failed"].iterrows():
        cell = " ".join(_text(row[field]) for field in CELL)
        console.print(f"failed: {cell}: {row['error']}", markup=False, soft_wrap=True)
    missing = int((frame["status"] == "missing").sum())
    if missing:
        console.print(f"{missing} cells have not run yet")


def _text(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and pd.isna(value)):
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
