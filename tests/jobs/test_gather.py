import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cluster.store import Store
from jobs.gather import gather
from jobs.grid import Grid
from jobs.plan import Plan, make_plan
from jobs.show import print_results

Content = dict[str, Any]
Load = Callable[[Content], Grid]


def test_a_row_has_the_allocation_and_its_options_that_differ_from_defaults(
    content: Content, load: Load, tmp_path: Path
) -> None:
    content["cells"] |= {
        "calibration": "true",
        "pruner": "wanda",
        "sparsity": 0.5,
        "seed": 0,
        "allocation": [
            "uniform",
            "owl",
            {"name": "owl", "spread": 0.1},
            {"name": "by-hand", "sparsities": [0.4, 0.6]},
        ],
    }
    rows = gather(make_plan(load(content)), Store(str(tmp_path / "store"))).to_pylist()
    assert [(row["allocation"], row["allocation_options"]) for row in rows] == [
        (None, "{}"),  # the dense model
        ("uniform", "{}"),
        ("owl", "{}"),
        ("owl", '{"spread": 0.1}'),
        ("by-hand", '{"sparsities": [0.4, 0.6]}'),
    ]


def test_a_row_has_the_options_of_the_reconstruction_and_nothing_without_one(
    content: Content, load: Load, tmp_path: Path
) -> None:
    content["cells"] |= {
        "calibration": "true",
        "pruner": "wanda",
        "sparsity": 0.5,
        "seed": 0,
        "reconstruction": [None, {}, {"epochs": 2, "calibration": "own"}],
    }
    rows = gather(make_plan(load(content)), Store(str(tmp_path / "store"))).to_pylist()
    found = [row["reconstruction"] for row in rows]
    assert found == [None, None, "{}", '{"calibration": "own", "epochs": 2}']
    assert len({row["cell"] for row in rows}) == 4


def _with_dense_metrics(store: Store, plan: Plan, metrics: Content) -> None:
    """A store with only the dense model's evaluation."""
    key = next(key for key, cell in plan.cells.items() if cell.pruner is None)
    with store.attempt(key) as attempt:
        pq.write_table(pa.table(metrics), attempt.folder / "metrics.parquet")
        attempt.commit(
            kind="evaluate",
            spec=plan.graph[key].spec,
            report={},
            seconds=1.0,
            peak_memory_bytes=None,
            versions={},
            host="here",
        )


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_cell_with_a_number_that_is_not_finite_has_failed(
    content: Content, load: Load, tmp_path: Path, value: float | None
) -> None:
    plan, store = make_plan(load(content)), Store(str(tmp_path / "store"))
    metrics = {
        "task": ["facts", "true", "true"],
        "metric": ["acc", "bits_per_byte", "perplexity"],
        "value": [1.0, 2.0, value],
        "stderr": [0.1, None, None],
    }
    _with_dense_metrics(store, plan, metrics)
    rows = [row for row in gather(plan, store).to_pylist() if row["pruner"] == "dense"]
    assert [(row["status"], row["metric"], row["value"]) for row in rows] == [
        ("failed", None, None)
    ]
    assert rows[0]["error"].startswith(f"true perplexity is {value}")


def test_a_standard_error_may_be_absent_but_not_infinite(
    content: Content, load: Load, tmp_path: Path
) -> None:
    plan = make_plan(load(content))
    for name, stderr in (("absent", None), ("there", 0.5), ("infinite", math.inf)):
        store = Store(str(tmp_path / name))
        metrics = {"task": ["true"], "metric": ["perplexity"], "value": [2.0], "stderr": [stderr]}
        _with_dense_metrics(store, plan, metrics)
        (row,) = (row for row in gather(plan, store).to_pylist() if row["pruner"] == "dense")
        assert row["status"] == ("failed" if name == "infinite" else "ok")


def test_a_row_has_the_description_and_the_cost_of_its_calibration_set(
    content: Content, load: Load, tmp_path: Path
) -> None:
    content["cells"] |= {"pruner": "wanda", "sparsity": 0.5, "seed": 0}
    plan = make_plan(load({**content, "describe": {"reference": "true"}}))
    store = Store(str(tmp_path / "store"))
    reports: dict[str, dict[str, Any]] = {
        "prune": {"sparsity": 0.5},
        "describe": {"loss": 1.5},
        "windows": {"distinct_tokens": 321, "overlap": 0.6},
    }
    for place, (key, spec) in enumerate(plan.specs.items()):
        with store.attempt(key) as attempt:
            if spec.kind == "evaluate":
                metrics = {"task": ["true"], "metric": ["perplexity"], "value": [2.0]}
                pq.write_table(pa.table(metrics), attempt.folder / "metrics.parquet")
            report = reports.get(spec.kind, {})
            attempt.commit(
                kind=spec.kind,
                spec=plan.graph[key].spec,
                report=report,
                seconds=place + 1.0,
                peak_memory_bytes=None,
                versions={},
                host="here",
            )
    rows = {row["calibration"]: row for row in gather(plan, store).to_pylist()}
    assert rows["none"]["seconds_generate"] is None
    assert rows["none"]["calibration_report"] is None
    assert rows["true"]["seconds_generate"] == 0.0
    assert rows["none"]["calibration_overlap"] is None
    assert rows["true"]["calibration_tokens"] == 321
    assert rows["true"]["calibration_overlap"] == 0.6
    shown = io.StringIO()
    print_results(gather(plan, store), Console(file=shown, width=200))
    assert (
        "calibration true: windows overlap by up to 60%: as few as 321 distinct tokens"
        in shown.getvalue()
    )
    assert json.loads(rows["true"]["calibration_report"]) == {"loss": 1.5}
    for stage in ("generate", "score"):
        shards = [
            key
            for key, spec in plan.specs.items()
            if spec.kind == "shard" and plan.graph[key].kind == stage
        ]
        manifests = [store.manifest(key) for key in shards]
        spent = [manifest.seconds for manifest in manifests if manifest is not None]
        assert rows["own"][f"seconds_{stage}"] == sum(spent)
        assert len(spent) == 2
