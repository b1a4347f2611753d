"""Every rule of the filter in one small grid, from the text to the results table."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from cluster.store import Store
from jobs.check import check_plan
from jobs.export_calibration import export_calibration
from jobs.gather import gather, write_table
from jobs.grid import Grid
from jobs.plan import Plan, make_plan
from pipeline.specs import FilterSpec
from tests.made import make_here

Content = dict[str, Any]
Load = Callable[[Content], Grid]

RULES = ["perplexity", "random", "min-k-plus-plus", "zipcal", "cola", "igsp"]
"""Of the whole set; within sources and clusters two more."""


@pytest.fixture
def plan(content: Content, load: Load, tiny_model_folder: Path) -> Plan:
    model = {"kind": "local-model", "path": str(tiny_model_folder / "model"), "dtype": "float32"}
    content["models"] = {"tiny": model}
    own = {"prefixes": {"other": 1, "true": 1}, "num_samples": 16, "shard_size": 8}
    content["calibrations"] = {"own": own | {"drop_fraction": 0.25}}
    content["cells"] = {
        "model": "tiny",
        "calibration": "own",
        "pruner": "wanda",
        "sparsity": 0.5,
        "seed": 0,
        "nsamples": 4,
        "seqlen": 32,
        "drop_by": RULES,
    }
    content["include"] = [{"drop_by": "perplexity", "within": ["source", "cluster"]}]
    content["evaluate"] = {"perplexity": [{"corpus": "true", "seqlen": 32, "max_windows": 4}]}
    found = make_plan(load(content))
    assert not check_plan(found)
    return found


def test_all_rules_run_side_by_side_and_stand_in_the_table(plan: Plan, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    make_here(plan.graph, plan.targets, store)
    write_table(gather(plan, store), plan.grid.name, store)
    content = store.read(f"results/{plan.grid.name}.csv")
    assert content is not None

    table = gather(plan, store).to_pandas()
    pruned = table[(table["metric"] == "perplexity") & (table["pruner"] == "wanda")]
    assert list(zip(pruned["drop_by"], pruned["within"], strict=True)) == [
        *((rule, "set") for rule in RULES),
        ("perplexity", "source"),
        ("perplexity", "cluster"),
    ]
    assert (pruned["status"] == "ok").all()
    free = pruned["drop_by"].isin(["random", "zipcal"])
    assert (pruned.loc[free, "seconds_score"] == 0).all()
    assert (pruned.loc[~free, "seconds_score"] > 0).all()
    dense = table[table["pruner"] == "dense"]
    assert dense[["drop_by", "within"]].isna().all(axis=None)
    assert {"drop_by", "within"} <= set(csv.read_csv(io.BytesIO(content)).column_names)

    kept = {}
    for key, spec in plan.specs.items():
        if isinstance(spec, FilterSpec):
            samples = pq.read_table(store.fetch(key) / "samples.parquet")
            rejected = pq.read_table(store.fetch(key) / "rejected.parquet")
            assert (len(samples), len(rejected)) == (12, 4)
            assert set(rejected["reason"].to_pylist()) == {spec.drop_by}
            assert ("perplexity" in samples.column_names) == spec.reads_scores
            kept[spec.drop_by, spec.within] = frozenset(samples["sample_id"].to_pylist())
            if spec.within == "source":
                assert samples["source"].to_pylist().count("true") == 6
            assert export_calibration(store, key, tmp_path / key) == 12
    assert len(set(kept.values())) >= 6  # rules differ in what they keep
