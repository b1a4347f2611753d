from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.store import Store
from jobs.gather import gather
from jobs.grid import Grid
from jobs.plan import make_plan

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
