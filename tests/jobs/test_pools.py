"""Calibrations that choose from a pool of real text, from the grid's text to the results table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.store import Store
from jobs.cells import Cell, candidate_names, expand, prune_spec
from jobs.check import check_plan
from jobs.cost import estimate
from jobs.export_calibration import export_calibration
from jobs.gather import gather
from jobs.grid import Grid
from jobs.plan import make_plan
from pipeline.data.windows import read_windows
from pipeline.errors import InputError
from pipeline.specs import CorpusMixture, DrawSpec, FilterSpec, ScoreSpec, WindowsSpec
from tests.made import make_here

Content = dict[str, Any]
Load = Callable[[Content], Grid]

POOL = {"corpus": "true", "pool": 80, "drop_fraction": 0.75}
RULES = ["perplexity", "random", "min-k-plus-plus", "zipcal", "cola", "igsp"]


@pytest.fixture
def pooled(content: Content) -> Content:
    """The small grid with one pruner, and a pool besides a corpus and generated text."""
    content["calibrations"]["pool"] = POOL
    content["cells"] |= {
        "calibration": ["true", "own", "pool"],
        "pruner": "wanda",
        "sparsity": 0.5,
        "seed": 3,
    }
    return content


def calibrations(grid: Grid) -> dict[Cell, WindowsSpec]:
    found = {}
    for cell in expand(grid):
        pruned = prune_spec(grid, cell)
        if pruned is not None and pruned.calibration is not None:
            found[cell] = pruned.calibration
    return found


def test_a_pool_is_drawn_scored_and_filtered_by_the_stages_of_generated_text(
    pooled: Content, load: Load
) -> None:
    pooled["cells"] |= {"calibration": "pool", "drop_by": "zipcal"}
    grid = load(pooled)
    (windows,) = calibrations(grid).values()
    assert isinstance(windows.source, FilterSpec)
    scores = windows.source.scores
    drawn = DrawSpec(
        source=grid.corpora["true"], model=windows.model, num_samples=80, seqlen=64, seed=3
    )
    assert (windows.packing, windows.nsamples, windows.seed) == ("sample", 16, 3)
    assert (windows.source.drop_by, windows.source.drop_fraction) == ("zipcal", 0.75)
    assert scores == ScoreSpec(samples=drawn, model=windows.model)


def test_a_pool_leaves_the_other_calibrations_as_they_are(content: Content, load: Load) -> None:
    before = {cell: spec.key for cell, spec in calibrations(load(content)).items()}
    content["calibrations"]["pool"] = POOL
    content["cells"]["calibration"] = ["true", "own", "pool"]
    after = {cell: spec.key for cell, spec in calibrations(load(content)).items()}
    assert {cell: after[cell] for cell in before} == before
    assert len(after) == len(before) * 3 / 2


def test_the_axes_of_the_filter_are_those_of_a_pool_and_the_others_mean_nothing_to_it(
    pooled: Content, load: Load
) -> None:
    axes = {"drop_fraction": [0.0, 0.5], "drop_by": ["zipcal", "random"], "num_samples": [70, 75]}
    pooled["cells"] |= axes
    cells = [cell for cell in expand(load(pooled)) if cell.calibration == "pool"]
    assert [(cell.drop_fraction, cell.drop_by, cell.within) for cell in cells] == [
        (0.0, "perplexity", "set"),
        (0.5, "zipcal", "set"),
        (0.5, "random", "set"),
    ]
    # Only text that a model wrote has these, and so it is known in the results.
    assert {(cell.prefix_tokens, cell.num_samples, cell.temperature) for cell in cells} == {
        (None, None, None)
    }
    assert sorted(set(candidate_names(cells).values()))[0] == (
        "pool, drop_fraction 0.0, drop_by perplexity"
    )


def test_rules_share_one_pool_and_another_model_may_score_it(pooled: Content, load: Load) -> None:
    pooled["models"]["judge"] = {"preset": "testbed-tiny", "steps": 3}
    pooled["calibrations"]["judged"] = {**POOL, "scorer": "judge"}
    pooled["cells"] |= {"calibration": ["pool", "judged"], "drop_by": RULES}
    plan = make_plan(load(pooled))
    kinds = [spec.kind for spec in plan.specs.values()]
    assert kinds.count("draw") == 1
    # Two scorers, each with and without hidden states; random and zipcal need neither.
    assert kinds.count("score") == 4
    assert kinds.count("filter") == 2 * len(RULES) - 2
    judges = [spec.model for spec in plan.specs.values() if isinstance(spec, ScoreSpec)]
    for name in ("testbed", "judge"):
        assert judges.count(plan.grid.models[name]) == 2


def test_a_mixed_pool_can_be_filtered_in_each_source(pooled: Content, load: Load) -> None:
    pooled["calibrations"]["pool"] = {
        **POOL,
        "corpus": {"true": 1, "other": 1},
        "within": "source",
    }
    pooled["cells"]["calibration"] = "pool"
    (windows,) = calibrations(load(pooled)).values()
    assert isinstance(windows.source, FilterSpec)
    samples = windows.source.scores.samples
    assert isinstance(samples, DrawSpec)
    assert isinstance(samples.source, CorpusMixture)
    assert windows.source.within == "source"


def test_the_plan_counts_what_a_pool_costs(pooled: Content, load: Load) -> None:
    """80 samples of 64 tokens: the same to score as those that a model wrote."""
    plan = make_plan(load(pooled))
    labels = {stage.label: plan.specs[key] for key, stage in plan.graph.items()}
    assert {"draw pool", "score pool shard 2 of 2", "filter pool", "windows pool"} <= set(labels)

    def cost(label: str) -> tuple[float, float]:
        found = estimate(labels[label], plan.grid.cost, plan.sizes)
        assert found is not None
        return found.seconds, found.bytes

    assert cost("draw pool") == (0.5, 80 * 64 * 8)
    for part in ("", " shard 1 of 2", " shard 2 of 2"):
        assert cost(f"score pool{part}") == cost(f"score own{part}")
    assert cost("filter pool")[1] == 80 * 64 * 8 / 4
    assert not check_plan(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": 60}, r"calibrations\.pool\.pool: 60: drop_fraction 0.75 leaves 15 samples, too "),
        ({"pool": 60}, r"16 windows of 64 tokens: raise pool, or lower drop_fraction or nsamples"),
        ({"pool": 100}, r"corpora\.notes: .*100 texts .*: lower seqlen or pool$"),
        ({"pool": 0}, r"calibrations\.pool\.pool: 0: must be at least 1"),
        ({"pool": None}, r"calibrations\.pool\.pool: None"),
        ({"prefix_tokens": 2}, r"pool\.prefix_tokens: 2: is for text that a model writes: remove"),
        ({"generator": "testbed"}, r"pool\.generator: 'testbed': is for text that a model writes"),
        ({"prefixes": "true"}, r"pool\.prefixes: 'true': is for text that a model writes"),
        ({"packing": "concat"}, r"pool\.packing: 'concat': each sample of a pool is a stretch of"),
        (
            {"within": "source"},
            r"calibrations\.pool\.within: 'source': all samples have one source",
        ),
        ({"drop_by": "zip"}, r"pool\.drop_by: 'zip': .*zipcal"),
        ({"scorer": "judge"}, r"calibrations\.pool\.scorer: 'judge': is not defined in the grid"),
        ({"drop_bye": "zipcal"}, r"pool\.drop_bye: .*did you mean 'drop_by'"),
    ],
)
def test_a_pool_that_cannot_be_is_refused_before_anything_runs(
    pooled: Content, load: Load, change: Content, message: str
) -> None:
    pooled["calibrations"]["pool"] = {**POOL, "corpus": "notes", **change}
    with pytest.raises(InputError, match=message):
        check_plan(make_plan(load(pooled)))


@pytest.mark.parametrize("field", ["drop_by", "drop_fraction", "within", "scorer", "banned_words"])
def test_a_rule_without_a_pool_is_refused(pooled: Content, load: Load, field: str) -> None:
    pooled["calibrations"]["true"] = {"corpus": "true", field: "zipcal"}
    message = rf"calibrations\.true\.{field}: 'zipcal': is for a choice among samples: .*add pool"
    with pytest.raises(InputError, match=message):
        load(pooled)


def test_every_rule_prunes_with_its_choice_from_the_pool(
    pooled: Content, load: Load, tmp_path: Path, tiny_model_folder: Path
) -> None:
    folder = str(tiny_model_folder / "model")
    pooled["models"] = {"tiny": {"kind": "local-model", "path": folder, "dtype": "float32"}}
    mixed = {"corpus": {"true": 1, "other": 1}}
    pooled["calibrations"] = {
        "plain": mixed,
        "pool": {**mixed, "pool": 16, "shard_size": 8, "drop_fraction": 0.5},
    }
    pooled["cells"] |= {
        "model": "tiny",
        "calibration": "pool",
        "nsamples": 8,
        "seqlen": 32,
        "drop_by": RULES,
    }
    pooled["include"] = [
        {"drop_by": "perplexity", "within": ["source", "cluster"]},
        {"nsamples": 16, "drop_fraction": 0.0, "calibration": ["plain", "pool"]},
    ]
    pooled["evaluate"] = {"perplexity": [{"corpus": "true", "seqlen": 32, "max_windows": 4}]}
    pooled["describe"] = {}
    plan = make_plan(load(pooled))
    assert not check_plan(plan)
    store = Store(str(tmp_path / "store"))
    make_here(plan.graph, plan.targets, store)

    table = gather(plan, store).to_pandas()
    pruned = table[(table["metric"] == "perplexity") & (table["pruner"] == "wanda")]
    assert (pruned["status"] == "ok").all()
    chosen = pruned[pruned["drop_fraction"] == 0.5]
    assert list(zip(chosen["drop_by"], chosen["within"], strict=True)) == [
        *((rule, "set") for rule in RULES),
        ("perplexity", "source"),
        ("perplexity", "cluster"),
    ]
    assert pruned[["num_samples", "prefix_tokens", "temperature"]].isna().all(axis=None)
    assert (pruned["seconds_generate"] == 0).all()
    scored = ~chosen["drop_by"].isin(["random", "zipcal"])
    assert ((chosen["seconds_score"] > 0) == scored).all()
    assert (chosen["calibration_tokens"] == 8 * 32).all()
    assert pruned["calibration_report"].notna().all()

    whole = {}
    for key, spec in plan.specs.items():
        if isinstance(spec, FilterSpec) and spec.drop_fraction:
            samples = pq.read_table(store.fetch(key) / "samples.parquet")
            rejected = pq.read_table(store.fetch(key) / "rejected.parquet")
            assert (len(samples), len(rejected)) == (8, 8)
            assert set(rejected["reason"].to_pylist()) == {spec.drop_by}
            if spec.within == "source":
                assert samples["source"].to_pylist().count("true") == 4
        elif isinstance(spec, WindowsSpec) and spec.nsamples == 16:
            whole[spec.source.kind] = sorted(read_windows(store.fetch(key)).tolist())
    assert whole["corpus-mixture"] == whole["filter"]  # nothing was dropped

    assert export_calibration(store, chosen["prune_key"].iloc[0], tmp_path / "exported") == 8
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "Stretches of real texts, filtered by calprune: 8 were kept" in card
    assert "synthetic" not in card
