"""Print the state of a grid and its results."""

import math
from collections.abc import Mapping

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from cluster.store import Store
from jobs.cells import GENERATED_FIELDS
from jobs.plan import Plan
from jobs.stages import LINES, line_of
from pipeline.specs import target_name

_CELL = ["model", "pruner", "target", "calibration", "seed"]
_FIELDS_IF_VARIED = [
    "allocation",
    "allocation_options",
    "reconstruction",
    "nsamples",
    "seqlen",
    *GENERATED_FIELDS,
    "pruner_options",
]

_EVEN_OVERLAP = math.exp(-1)
"""Mean share of tokens that windows have in common if they are cut at random from a text as long as
all of them. A larger share means that there was less text."""


STATES = ("done", "under way", "failed", "missing")


def states_of(plan: Plan, store: Store) -> dict[str, str]:
    """Return which of `STATES` each stage is in, by key, from the store alone."""
    done, under_way, failed = store.keys(), store.names("leases"), store.names("failures")
    states = {}
    for key in plan.graph:
        is_in = (key in done, key in under_way, key in failed, True)
        states[key] = STATES[is_in.index(True)]
    return states


def count_states(plan: Plan, states: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Return how many stages of each kind are in each of `STATES`."""
    counts = {line: dict.fromkeys(STATES, 0) for line in LINES}
    for key, spec in plan.specs.items():
        counts[line_of(spec)][states[key]] += 1
    return {line: numbers for line, numbers in counts.items() if any(numbers.values())}


def print_state(plan: Plan, store: Store, console: Console) -> None:
    """Print the state of each kind of stage, from the store alone, so on any machine."""
    counts = count_states(plan, states_of(plan, store))
    done = sum(numbers["done"] for numbers in counts.values())
    table = Table(title=f"{plan.grid.name}: {done} of {len(plan.graph)} stages are done")
    table.add_column("stage")
    for heading in STATES:
        table.add_column(heading, justify="right")
    for line, numbers in counts.items():
        table.add_row(line, *map(str, numbers.values()))
    console.print(table)


def _target(pattern: object, sparsity: float, bits: float) -> str:
    patterned = isinstance(pattern, str) and ":" in pattern
    return target_name(
        sparsity, str(pattern) if patterned else None, None if math.isnan(bits) else int(bits)
    )


def print_results(results: pa.Table, console: Console) -> None:
    """Print a row for each cell and a column for each metric, then why cells have no result."""
    frame = results.to_pandas()
    named = zip(frame["pattern"], frame["sparsity"], frame["bits"], strict=True)
    frame["target"] = [_target(*each) for each in named]
    varied = [column for column in _FIELDS_IF_VARIED if frame[column].nunique(dropna=True) > 1]
    measured = frame[frame["metric"].notna()]
    columns = list(dict.fromkeys(zip(measured["task"], measured["metric"], strict=True)))
    table = Table(title=f"{frame['grid'].iloc[0]}: {frame['cell'].nunique()} cells")
    for heading in [*_CELL, *varied]:
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
        table.add_row(*(_text(first[field]) for field in [*_CELL, *varied]), *shown)
    console.print(table)
    if len(limits):
        console.print("first N: only the first N questions of a task were asked; papers ask all")
    for _, row in frame[frame["status"] == "failed"].iterrows():
        cell = " ".join(_text(row[field]) for field in _CELL)
        console.print(f"failed: {cell}: {row['error']}", markup=False, soft_wrap=True)
    for note in frame["note"].dropna().unique():
        console.print(f"note: {note}", markup=False, highlight=False)
    overlapping = frame[frame["calibration_overlap"] > _EVEN_OVERLAP]
    for name, rows in overlapping.groupby("calibration"):
        tokens, share = rows["calibration_tokens"].min(), rows["calibration_overlap"].max()
        overlap = f"windows overlap by up to {share:.0%}: as few as {tokens:.0f} distinct tokens"
        console.print(f"calibration {name}: {overlap}", markup=False, soft_wrap=True)
    missing = int((frame["status"] == "missing").sum())
    if missing:
        console.print(f"{missing} cells have not run yet")


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
