import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from rich.console import Console

from cluster.graph import Resources
from cluster.store import Store
from jobs.check import check_plan
from jobs.cost import (
    CHOOSE_SECONDS,
    CORE_FLOPS,
    GPU_FLOPS,
    LOAD_SECONDS,
    UNKNOWN_PARAMETERS,
    Estimate,
    ModelSize,
    estimate,
    expected_seconds,
    model_size,
    rate,
)
from jobs.grid import Cost, Grid, load_grid
from jobs.plan import Plan, count_stages, make_plan, print_plan
from jobs.stages import LINES, STAGES, StageWork
from pipeline import specs
from pipeline.specs import (
    OWL,
    DescribeSpec,
    EvaluateSpec,
    GenerateSpec,
    HubCorpus,
    HubModel,
    LocalTasks,
    Magnitude,
    PretrainSpec,
    Pruner,
    PruneSpec,
    ScoreSpec,
    ShardedSpec,
    ShardSpec,
    SparseGPT,
    StageSpec,
    TaskSpec,
    Wanda,
    WindowsSpec,
)

Content = dict[str, Any]
Load = Callable[[Content], Grid]
PAPER_GRIDS = sorted(Path("jobs/grids").glob("paper-*.yaml"))


def kinds(plan: Plan) -> Counter[str]:
    return Counter(spec.kind for spec in plan.specs.values())


def test_cells_share_stages(content: Content, load: Load) -> None:
    plan = make_plan(load(content))
    assert len(plan.cells) == 1 + 2 + 8
    counts = kinds(plan)
    assert counts["pretrain"] == counts["testbed-tasks"] == 1
    assert counts["generate"] == counts["score"] == counts["filter"] == 2  # a seed
    assert counts["shard"] == 2 * (2 + 2)  # 80 samples are two shards, generated and scored
    assert counts["windows"] == 4
    assert counts["prune"] == 10
    assert counts["evaluate"] == 11


def test_other_drop_fractions_need_no_new_scores(content: Content, load: Load) -> None:
    content["cells"] |= {"calibration": "own", "seed": 0, "drop_fraction": [0.1, 0.2, 0.4]}
    counts = kinds(make_plan(load(content)))
    assert counts["generate"] == counts["score"] == 1
    assert counts["filter"] == counts["windows"] == 3


def test_rules_that_read_no_score_need_no_score_pass(content: Content, load: Load) -> None:
    axes = {"drop_by": ["random", "zipcal"], "seed": 0, "calibration": "own"}
    content["cells"] |= axes
    plan = make_plan(load(content))
    counts = kinds(plan)
    assert counts["generate"] == 1
    assert counts["filter"] == 2
    assert counts["score"] == 0
    assert counts["shard"] == 2  # of generate
    assert "score" not in {line.stage for line in count_stages(plan, set())}


def test_hidden_states_cost_the_same_pass(content: Content, load: Load) -> None:
    content["cells"] |= {"calibration": "own", "seed": 0, "drop_by": ["igsp", "cola"]}
    plan = make_plan(load(content))
    scores = [key for key, spec in plan.specs.items() if spec.kind == "score"]
    assert len(scores) == 2
    assert len({plan.graph[key].seconds for key in scores}) == 1
    sizes = [estimate(plan.specs[key], plan.grid.cost, plan.sizes) for key in scores]
    assert sorted(each.bytes for each in sizes if each) == [80 * 96, 80 * (96 + 1536)]


def test_outliers_are_counted_once_for_all_pruners_and_sparsities(
    content: Content, load: Load
) -> None:
    content["cells"]["allocation"] = ["uniform", "owl", {"name": "owl", "spread": 0.1}]
    plan = make_plan(load(content))
    counts = kinds(plan)
    assert counts["windows"] == counts["outliers"] == 4  # calibrations and seeds
    # targets times magnitude and Wanda as they are, and both with OWL by calibrations and seeds
    assert counts["prune"] == 2 * (1 + 4 + 2 * 4 * 2)
    lines = {line.stage: line for line in count_stages(plan, set())}
    assert list(lines)[-4:] == ["windows", "outliers", "prune", "evaluate"]
    assert lines["outliers"].to_make == 4
    assert lines["outliers"].device_hours > 0


def test_prunings_with_different_allocations_have_different_labels(
    content: Content, load: Load
) -> None:
    content["cells"] |= {
        "pruner": "wanda",
        "sparsity": 0.5,
        "seed": 0,
        "allocation": ["uniform", "owl"],
    }
    labels = {stage.label for stage in make_plan(load(content)).graph.values()}
    assert {"prune true wanda 50%", "prune true wanda 50% owl", "outliers true"} <= labels


def test_every_stage_comes_after_its_inputs(content: Content, load: Load) -> None:
    plan = make_plan(load(content))
    seen: set[str] = set()
    for key, stage in plan.graph.items():
        assert seen.issuperset(stage.inputs)
        seen.add(key)


def test_memory_budgets_reach_the_stages_that_take_them_and_change_no_key(
    content: Content, load: Load
) -> None:
    before = make_plan(load(content))
    hidden = {"device_hidden_bytes": 0, "host_hidden_bytes": 7}
    asked = {
        "prune": {**hidden, "memory_bytes": 10**9},
        "evaluate": {**hidden, "memory_bytes": 10**9},
        "score": {**hidden, "memory_bytes": 10**9},
        "generate": {"memory_bytes": 10**9},
    }
    content["resources"] = asked
    plan = make_plan(load(content))
    assert plan.graph.keys() == before.graph.keys()
    expected = {"prune": hidden, "evaluate": asked["evaluate"], "score": asked["score"]}
    for key, stage in plan.graph.items():
        settings = StageWork.model_validate_json(stage.payload).settings
        joins = isinstance(plan.specs[key], ShardedSpec)
        assert settings == ({} if joins else expected.get(stage.kind, {}))


def printed(plan: Plan, folder: Path) -> str:
    console = Console(record=True, width=120)
    print_plan(plan, Store(str(folder)), console)
    return console.export_text()


def test_a_plan_says_which_models_are_larger_than_the_memory_of_which_stages(
    content: Content, load: Load, tmp_path: Path
) -> None:
    assert "one decoder layer at a time" not in printed(make_plan(load(content)), tmp_path)
    plan = make_plan(load(content))
    (dense,) = (spec for spec in plan.specs.values() if isinstance(spec, PretrainSpec))
    size = model_size(dense, {})
    assert size is not None
    least = math.ceil(4 * size.whole / 0.8)  # float32
    for memory, by_layer in ((least, False), (least - 1, True)):
        content["resources"] = {name: {"memory_bytes": memory} for name in ("evaluate", "score")}
        lines = printed(make_plan(load(content)), tmp_path).splitlines()
        for name in ("evaluate", "score"):
            found = [line for line in lines if line.startswith(f"{name}: reads pretrain one dec")]
            assert len(found) == by_layer


def test_a_plan_says_on_which_gpus_models_are_larger_than_memory(
    content: Content, load: Load, tmp_path: Path
) -> None:
    content["models"]["large"] = {"kind": "hub-model", "name": "l", "dtype": "bfloat16"}
    content["cells"] |= {"model": "large", "calibration": "true"}
    content["cost"] = {"parameters": {"large": 70e9}}
    content["resources"] = {"evaluate": {"gpus": 1, "memory_bytes": 10**9}}
    text = printed(make_plan(load(content)), tmp_path)
    assert "evaluate: reads l one decoder layer at a time: on a GPU with less than 175 GB" in text
    content["evaluate"]["perplexity"][0]["kl"] = True  # the dense model beside it
    assert "less than 350 GB" in printed(make_plan(load(content)), tmp_path)
    content["cost"] = {"parameters": {"large": 1e9}}
    assert "one decoder layer at a time" not in printed(make_plan(load(content)), tmp_path)


def test_every_spec_of_a_stage_has_a_row() -> None:
    stages = [
        kind
        for kind in vars(specs).values()
        if isinstance(kind, type) and issubclass(kind, StageSpec)
    ]
    without = {StageSpec, ShardedSpec, ShardSpec}
    assert {kind.spec for kind in STAGES.values()} == set(stages) - without
    assert set(LINES) >= set(STAGES)


def test_a_stage_without_a_row_is_an_error_and_not_left_out_of_the_plan(
    content: Content, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = load(content)
    plan = make_plan(grid)
    monkeypatch.delitem(STAGES, "filter")
    with pytest.raises(KeyError, match="filter"):
        make_plan(grid)
    monkeypatch.setattr("jobs.plan.LINES", tuple(line for line in LINES if line != "filter"))
    with pytest.raises(KeyError, match="filter"):
        count_stages(plan, ())


def test_shards_take_the_resources_of_their_stage_and_the_join_none(
    content: Content, load: Load
) -> None:
    content["resources"] = {"generate": {"gpus": 1, "cpus": 4}, "prune": {"cpus": 2}}
    plan = make_plan(load(content))
    for key, stage in plan.graph.items():
        shard = isinstance(plan.specs[key], ShardSpec)
        assert (stage.pool is not None) == (shard or stage.kind == "prune")
        if stage.kind == "generate":
            assert (stage.resources.gpus, stage.resources.cpus) == ((1, 4) if shard else (0, 1))
        if stage.kind == "prune":
            assert stage.resources.cpus == 2


def test_models_do_not_share_a_pool(content: Content, load: Load) -> None:
    content["models"]["second"] = {"preset": "testbed-tiny", "seed": 1}
    content["cells"]["model"] = ["testbed", "second"]
    plan = make_plan(load(content))
    pools = {stage.pool for stage in plan.graph.values() if stage.kind == "generate" and stage.pool}
    assert len(pools) == 2


@pytest.mark.parametrize("path", PAPER_GRIDS, ids=lambda path: path.stem)
def test_the_plan_of_the_papers_grids_estimates_hours_and_bytes(path: Path, tmp_path: Path) -> None:
    plan = make_plan(load_grid(path))
    counts = {line.stage: line for line in count_stages(plan, set())}
    assert counts["prune"].unique < len(plan.cells) == counts["evaluate"].unique
    assert counts["prune"].device_hours > 0
    # every pruned model is a 7B one at least, in a bit a weight or in two bytes
    prunings = [spec for spec in plan.specs.values() if isinstance(spec, PruneSpec)]
    least = sum(6.7 / 8 if spec.stores_masks else 6.7 * 2 for spec in prunings)
    assert counts["prune"].gigabytes >= least
    if "generate" in counts:
        assert counts["generate"].unique < len(plan.cells)
        assert counts["generate shard"].device_hours > 0
    console = Console(record=True, width=120)
    print_plan(plan, Store(str(tmp_path)), console)
    assert "not in the estimate" not in console.export_text()


def test_the_papers_grids_exist() -> None:
    assert {path.stem for path in PAPER_GRIDS} == {
        f"paper-{name}" for name in ("main", "sparsity", "amount", "prefix", "filter")
    }


def test_one_grid_has_every_pruner_with_every_allocation_and_pattern() -> None:
    plan = make_plan(load_grid(Path("jobs/grids/pruners.yaml")))
    assert check_plan(plan) == []
    prunings = [spec for spec in plan.specs.values() if isinstance(spec, PruneSpec)]
    found = {(spec.pruner.name, spec.allocation.name, spec.pattern) for spec in prunings}
    pruners = {kind().name for kind in get_args(get_args(Pruner)[0]) if kind.prunes}
    allocations = ("uniform", "owl", "arithmetic-progression")
    assert found >= set(product(pruners, allocations, (None, "2:4", "4:8")))
    assert "by-hand" in {spec.allocation.name for spec in prunings}
    assert {spec.target_name for spec in prunings} >= {"3 bit", "4 bit", "4 bit 60%", "4 bit 2:4"}


def test_checkpoints_true_stores_checkpoints_instead_of_masks(content: Content, load: Load) -> None:
    content["cells"]["pruner"] = ["wanda", "sparsegpt"]
    content["checkpoints"] = True
    prunings = [s for s in make_plan(load(content)).specs.values() if isinstance(s, PruneSpec)]
    assert {(spec.pruner.name, spec.checkpoint) for spec in prunings} == {
        ("wanda", True),
        ("sparsegpt", False),
    }
    assert not any(spec.stores_masks for spec in prunings)


def test_a_stage_that_reads_masks_also_reads_their_dense_model(
    content: Content, load: Load
) -> None:
    content["cells"]["pruner"] = ["wanda", "sparsegpt"]
    plan = make_plan(load(content))
    for key, spec in plan.specs.items():
        if isinstance(spec, EvaluateSpec) and isinstance(spec.model, PruneSpec):
            kinds = {plan.graph[before].kind for before in plan.graph[key].inputs}
            masks = spec.model.pruner.name == "wanda"
            assert kinds == {"prune", "testbed-tasks", *(["pretrain"] if masks else [])}


def test_stored_artifacts_are_not_counted_as_work(content: Content, load: Load) -> None:
    plan = make_plan(load(content))
    everything = count_stages(plan, set(plan.graph))
    assert all(line.to_make == 0 and line.device_hours == 0 for line in everything)
    some = {key for key, spec in plan.specs.items() if spec.kind == "prune"}
    lines = {line.stage: line for line in count_stages(plan, some)}
    assert lines["prune"].stored == lines["prune"].unique == 10
    assert lines["windows"].to_make == 0  # only prune reads them
    assert lines["pretrain"].to_make == 1  # the dense evaluation reads it


def test_the_plan_states_that_its_estimate_lacks_a_model_of_unknown_size(
    content: Content, load: Load, tmp_path: Path
) -> None:
    content["models"]["llama"] = {"kind": "hub-model", "name": "meta-llama/Llama-2-7b-hf"}
    content["cells"]["model"] = "llama"
    console = Console(record=True, width=120)
    print_plan(make_plan(load(content)), Store(str(tmp_path)), console)
    assert "give cost.parameters.llama" in console.export_text()


def test_estimates_are_flop_over_rate() -> None:
    model = HubModel(name="m")
    windows = WindowsSpec(source=HubCorpus(path="c"), model=model, nsamples=128, seqlen=2048)
    pruned = PruneSpec(model=model, pruner=Wanda(), sparsity=0.5, calibration=windows)
    cost = Cost(flops_per_second=1e14)
    gpu = Resources(gpus=1)

    def guess(spec: StageSpec, cost: Cost = cost, resources: Resources = gpu) -> Estimate:
        found = estimate(spec, cost, {"m": ModelSize.of(7e9)}, resources)
        assert found is not None
        return found

    # two passes of 2 FLOP a parameter and token, at half the rate, besides what tokens do not move
    empty = windows.model_copy(update={"nsamples": 0})
    fixed = guess(pruned.model_copy(update={"calibration": empty})).seconds
    passes = 2 * 2 * 7e9 * 128 * 2048
    assert guess(pruned).seconds - fixed == pytest.approx(passes / 0.5e14)
    assert fixed == pytest.approx(
        STAGES["prune"].fixed_seconds + 7e9 * (LOAD_SECONDS + CHOOSE_SECONDS[1])
    )
    assert guess(pruned).bytes == 7e9 / 8
    assert guess(pruned.model_copy(update={"checkpoint": True})).bytes == 14e9
    assert estimate(pruned, cost, {}) is None
    owl = PruneSpec(
        model=model, pruner=Magnitude(), sparsity=0.5, allocation=OWL(), calibration=windows
    )
    assert owl.outliers is not None
    # statistics and outputs, as Wanda needs them
    assert guess(owl.outliers).seconds == pytest.approx(
        guess(pruned).seconds - 7e9 * CHOOSE_SECONDS[1]
    )
    assert guess(owl).seconds == pytest.approx(fixed)
    limited = EvaluateSpec(model=pruned, tasks=(TaskSpec(name="t", limit=10),))
    unlimited = EvaluateSpec(model=pruned, tasks=(TaskSpec(name="t"),))
    assert guess(limited).seconds < guess(unlimited).seconds
    # where the grid gives no rate, that of the cores or GPUs that the stage asks for
    for resources, flops, choose in (
        (Resources(cpus=3), 3 * 0.65 * CORE_FLOPS, CHOOSE_SECONDS[0] / 3),
        (Resources(cpus=3, gpus=2), 2 * 0.5 * GPU_FLOPS, CHOOSE_SECONDS[1]),
    ):
        fixed = STAGES["prune"].fixed_seconds + 7e9 * (LOAD_SECONDS + choose)
        assert guess(pruned, Cost(), resources).seconds - fixed == pytest.approx(passes / flops)


def test_tokens_pass_the_output_layer_but_for_prunings_and_never_an_embedding_of_its_own() -> None:
    model = HubModel(name="m")
    cost, sizes = Cost(flops_per_second=1e12), {"m": ModelSize(1e9, layers=6e8, output=2e8)}

    def passed(kind: type[PruneSpec] | type[DescribeSpec], **own: Any) -> float:
        """Return the seconds of a multiplication in each parameter that a token passes."""
        seconds = []
        for nsamples in (1, 2):
            windows = WindowsSpec(
                source=HubCorpus(path="c"), model=model, nsamples=nsamples, seqlen=100
            )
            found = estimate(kind(model=model, calibration=windows, **own), cost, sizes)
            assert found is not None
            seconds.append(found.seconds)
        return (seconds[1] - seconds[0]) / 100 / 2

    reached = rate("prune", cost, Resources())
    own = Wanda()
    wanted = 6e8 * own.forward_passes / reached
    assert passed(PruneSpec, pruner=own, sparsity=0.5) == pytest.approx(wanted)
    wanted = 8e8 / rate("describe", cost, Resources())
    assert passed(DescribeSpec) == pytest.approx(wanted)


def test_sparsegpts_columns_cost_the_same_for_few_tokens_as_for_many() -> None:
    """The estimate for LLaMA-2-7B's shape, with 4,096 inputs, is within a factor of two."""
    model = HubModel(name="m")
    cost, seconds = Cost(flops_per_second=1e12), []
    for nsamples in (0, 1, 2):
        windows = WindowsSpec(source=HubCorpus(path="c"), model=model, nsamples=1, seqlen=2048)
        windows = windows.model_copy(update={"nsamples": nsamples})
        spec = PruneSpec(model=model, pruner=SparseGPT(), sparsity=0.5, calibration=windows)
        found = estimate(spec, cost, {"m": ModelSize.of(6.7e9)})
        assert found is not None
        seconds.append(found.seconds)
    none, one, two = seconds
    assert two - one == pytest.approx(one - none)
    fixed = STAGES["prune"].fixed_seconds + 6.7e9 * (LOAD_SECONDS + CHOOSE_SECONDS[0])
    columns = (none - fixed) * 1e12 / (2 * 6.7e9)
    assert 0.5 < columns / (4 * 4096) < 2


def test_questions_in_a_tasks_folder_are_counted(tmp_path: Path) -> None:
    lines = [f'{{"question": "{"x" * length}"}}\n' for length in (100, 300, 700)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    task = {"dataset_kwargs": {"data_files": {"test": "t.jsonl"}}, "test_split": "test"}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(task))
    model = HubModel(name="m")
    cost, sizes = Cost(flops_per_second=1e10), {"m": ModelSize.of(1e8)}
    tokens = []
    for limit, name in ((2, "t"), (None, "t"), (2, "other")):
        asked = (TaskSpec(name=name, limit=limit),)
        folder = LocalTasks(path=str(tmp_path))
        spec = EvaluateSpec(model=model, tasks=asked, task_folder=folder)
        found = estimate(spec, cost, sizes)
        assert found is not None
        passes = found.seconds - STAGES["evaluate"].fixed_seconds - 1e8 * LOAD_SECONDS
        tokens.append(passes * rate("evaluate", cost, Resources()) / 2e8)
    questions = list(map(len, lines))
    assert tokens[0] == pytest.approx(sum(questions[:2]) / 4)
    assert tokens[1] == pytest.approx(sum(questions) / 4)
    assert tokens[2] == pytest.approx(2 * 600)


def test_the_expected_time_of_a_stage_is_positive_and_grows_with_its_work(
    content: Content, load: Load
) -> None:
    content["models"]["llama"] = {"kind": "hub-model", "name": "meta-llama/Llama-2-7b-hf"}
    content["cells"]["model"] = ["testbed", "llama"]  # the second is of unknown size
    content["cells"]["pruner"] = ["magnitude", "wanda", "sparsegpt"]
    plan = make_plan(load(content))
    assert min(stage.seconds for stage in plan.graph.values()) > 0
    of_pruner: dict[str, set[float]] = {}
    for key, spec in plan.specs.items():
        if isinstance(spec, PruneSpec) and isinstance(spec.model, HubModel):
            of_pruner.setdefault(spec.pruner.name, set()).add(plan.graph[key].seconds)
    assert max(of_pruner["magnitude"]) < min(of_pruner["wanda"])
    assert max(of_pruner["wanda"]) < min(of_pruner["sparsegpt"])


def test_a_model_of_unknown_size_is_expected_to_take_as_long_as_the_default_size() -> None:
    model = HubModel(name="m")
    windows = WindowsSpec(source=HubCorpus(path="c"), model=model, nsamples=128, seqlen=2048)
    pruned = PruneSpec(model=model, pruner=Wanda(), sparsity=0.5, calibration=windows)
    cost = Cost(flops_per_second=1e14)
    stated = {"m": ModelSize.of(UNKNOWN_PARAMETERS)}
    assert expected_seconds(pruned, cost, {}) == expected_seconds(pruned, cost, stated)
    known = estimate(pruned, cost, stated)
    assert known is not None
    assert expected_seconds(pruned, cost, stated) == known.seconds
    assert 0 < expected_seconds(windows, cost, {}) < expected_seconds(pruned, cost, {})


def test_the_testbeds_size_is_counted_from_its_spec() -> None:
    spec = PretrainSpec(mixture={"facts": 1.0}, num_layers=1, hidden_size=64, intermediate_size=96,
                        head_dim=32, num_key_value_heads=1, vocab_size=512)  # fmt: skip
    query, key_value, output = 64 * 64, 2 * 64 * 32, 64 * 64
    layers = query + key_value + output + 3 * 64 * 96
    assert model_size(spec, {}) == ModelSize(layers + 512 * 64, layers, 512 * 64)


def test_planning_lists_a_stages_shards_equally_often_for_few_and_many_shards(
    content: Content, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning must take time in proportion to the number of shards."""
    listed: list[str] = []
    for kind in (GenerateSpec, ScoreSpec):
        whole = kind.shards

        def shards(spec: Any, whole: Any = whole) -> Any:
            listed.append(spec.kind)
            return whole(spec)

        monkeypatch.setattr(kind, "shards", shards)
    counts = []
    for samples in (10, 40):
        content["calibrations"]["own"] |= {"num_samples": samples, "shard_size": 1}
        listed.clear()
        labels = {stage.label for stage in make_plan(load(content)).graph.values()}
        counts.append(len(listed))
        assert {
            f"generate own seed 1 shard {samples} of {samples}",
            f"score own seed 1 shard 1 of {samples}",
        } <= labels
    assert 0 < counts[0] == counts[1]


def test_the_command_line_starts_without_what_takes_seconds_to_import() -> None:
    program = (
        "import sys, jobs.__main__\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'pandas', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
