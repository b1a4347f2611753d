import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from cluster.store import Store
from jobs.gather import gather
from jobs.grid import Grid
from jobs.plan import make_plan
from jobs.show import print_results

Content = dict[str, Any]
Load = Callable[[Content], Grid]


def test_a_row_tells_the_allocation_and_what_differs_from_its_defaults(
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


def test_a_row_tells_its_calibration_sets_description_and_what_generating_it_took(
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
