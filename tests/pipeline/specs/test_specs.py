import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.specs import (
    OWL,
    RIA,
    DescribeSpec,
    DrawSpec,
    EvaluateSpec,
    FileCorpus,
    FilterSpec,
    GenerateSpec,
    HubCorpus,
    HubModel,
    LocalModel,
    Magnitude,
    OutliersSpec,
    Pattern,
    PerplexitySpec,
    PretrainSpec,
    PruneSpec,
    ScoreSpec,
    ShardSpec,
    SparseGPT,
    StageSpec,
    TaskSpec,
    TestbedCorpus,
    TestbedTasksSpec,
    Wanda,
    WindowsSpec,
    canonical_json,
    spec_fields,
)

KEYS = Path(__file__).parents[1] / "keys.json"


def examples() -> dict[str, StageSpec]:
    testbed = PretrainSpec(mixture={"facts": 3.0, "code": 1.0})
    corpus = TestbedCorpus(mixture={"facts": 1.0})
    generated = GenerateSpec(model=testbed, prefixes=corpus, num_samples=130)
    scores = ScoreSpec(samples=generated, model=testbed)
    states = ScoreSpec(samples=generated, model=testbed, hidden_states=True)
    drawn = DrawSpec(source=corpus, model=testbed, num_samples=130)
    of_drawn = ScoreSpec(samples=drawn, model=testbed)
    windows = WindowsSpec(
        source=FilterSpec(scores=scores, drop_fraction=0.2), model=testbed, packing="concat"
    )
    pruned = PruneSpec(
        model=testbed, pruner=Wanda(), sparsity=0.5, pattern="2:4", calibration=windows
    )
    owl = PruneSpec(
        model=testbed, pruner=Magnitude(), sparsity=0.7, allocation=OWL(), calibration=windows
    )
    assert owl.outliers is not None
    llama = HubModel(name="meta-llama/Llama-2-7b-hf", revision="01c7f73d771dfac7d292323805ebc428")
    c4 = HubCorpus(path="allenai/c4", name="en")
    return {
        "pretrain": testbed,
        "generate": generated,
        "generate from a pruned model": GenerateSpec(model=pruned, prefixes=c4),
        "shard of generate": generated.shards()[2],
        "score": scores,
        "shard of score": scores.shards()[0],
        "filter": FilterSpec(scores=scores, drop_fraction=0.1),
        "filter by a rule that draws": FilterSpec(
            scores=scores, drop_fraction=0.2, drop_by="random", seed=3
        ),
        "draw": drawn,
        "shard of score of drawn samples": of_drawn.shards()[1],
        "filter of drawn samples": FilterSpec(scores=of_drawn, drop_fraction=0.2, drop_by="zipcal"),
        "score with hidden states": states,
        "filter within clusters": FilterSpec(
            scores=states, drop_fraction=0.2, drop_by="igsp", within="cluster"
        ),
        "windows of a file": WindowsSpec(
            source=FileCorpus(path="notes.jsonl", fingerprint="ab"), model=llama
        ),
        "prune by Wanda": pruned,
        "prune by magnitude": PruneSpec(
            model=LocalModel(path="here", fingerprint="cd"), pruner=Magnitude(), sparsity=0.7
        ),
        "prune by SparseGPT": PruneSpec(
            model=llama,
            pruner=SparseGPT(damping=0.1),
            sparsity=0.6,
            calibration=WindowsSpec(source=c4, model=llama),
        ),
        "describe": DescribeSpec(calibration=windows, model=testbed, reference=windows),
        "outliers": owl.outliers,
        "prune by magnitude with OWL": owl,
        "testbed tasks": TestbedTasksSpec(),
        "evaluate": EvaluateSpec(
            model=pruned,
            perplexity=(PerplexitySpec(name="c4", corpus=c4),),
            tasks=(TaskSpec(name="boolq", num_fewshot=5, limit=10),),
        ),
    }


def test_keys_are_those_of_the_last_release() -> None:
    """A key that changes orphans artifacts that took GPU-hours: raise the version of a stage whose
    output changed, write down the new keys, and say so in the changelog."""
    assert {name: spec.key for name, spec in examples().items()} == json.loads(KEYS.read_text())


def test_every_example_has_a_key_of_its_own() -> None:
    keys = [spec.key for spec in examples().values()]
    assert len(set(keys)) == len(keys)


def test_a_spec_survives_json_with_its_key() -> None:
    for spec in examples().values():
        again = type(spec).model_validate_json(spec.model_dump_json())
        assert again == spec
        assert again.key == spec.key


def test_a_lineage_tells_the_spec_that_it_is_of() -> None:
    for spec in examples().values():
        lineage = json.loads(canonical_json(spec.lineage))
        assert type(spec).model_validate(spec_fields(lineage)) == spec


def test_a_lineage_with_another_constant_has_no_spec() -> None:
    """No fields give its key."""
    spec = examples()["score"]
    lineage = {**json.loads(canonical_json(spec.lineage)), "min_k_fraction": 0.3}
    with pytest.raises(ValidationError, match="min_k_fraction"):
        ScoreSpec.model_validate(spec_fields(lineage))


def rekeyed(monkeypatch: pytest.MonkeyPatch, kind: type) -> set[str]:
    """The examples whose keys change when the version of a stage or a pruner is raised."""
    before = {name: spec.key for name, spec in examples().items()}
    monkeypatch.setattr(kind, "version", 99)
    return {name for name, spec in examples().items() if spec.key != before[name]}


def test_raising_a_stages_version_changes_its_key_and_all_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert rekeyed(monkeypatch, FilterSpec) == {
        "filter",
        "filter by a rule that draws",
        "filter of drawn samples",
        "filter within clusters",
        "describe",
        "outliers",
        "prune by magnitude with OWL",
        "prune by Wanda",
        "evaluate",
        "generate from a pruned model",
    }


def test_raising_a_pruners_version_changes_what_it_prunes_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = {"prune by Wanda", "evaluate", "generate from a pruned model"}
    assert rekeyed(monkeypatch, Wanda) == changed


def owl_of(**changes: object) -> PruneSpec:
    model = PretrainSpec(mixture={"facts": 1.0})
    fields = {
        "model": model,
        "pruner": Wanda(),
        "sparsity": 0.6,
        "allocation": OWL(),
        "calibration": WindowsSpec(source=HubCorpus(path="c"), model=model),
        **changes,
    }
    return PruneSpec(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"pruner": Magnitude()},
        {"pruner": SparseGPT()},
        {"sparsity": 0.5, "pattern": "2:4"},
        {"allocation": OWL(spread=0.1)},
    ],
)
def test_outliers_are_shared_between_pruners_sparsities_and_spreads(
    changes: dict[str, object],
) -> None:
    one, other = owl_of(), owl_of(**changes)
    assert one.key != other.key
    assert one.outliers == other.outliers
    assert isinstance(one.outliers, OutliersSpec)


def test_another_threshold_counts_other_outliers() -> None:
    assert owl_of().outliers != owl_of(allocation=OWL(threshold=2.5)).outliers


def test_a_pruning_reads_the_outliers_and_the_windows_only_if_its_pruner_takes_data() -> None:
    kinds = [stage.kind for stage in owl_of().inputs()]
    assert kinds == ["pretrain", "windows", "outliers"]
    assert [stage.kind for stage in owl_of(pruner=Magnitude()).inputs()] == ["pretrain", "outliers"]
    uniform = owl_of(allocation={"name": "uniform"})
    assert [stage.kind for stage in uniform.inputs()] == ["pretrain", "windows"]
    assert uniform.outliers is None


def test_a_pruning_reads_the_windows_that_its_weights_are_fitted_to() -> None:
    other = owl_of().calibration.model_copy(update={"seed": 1})  # type: ignore[union-attr]
    fitted = owl_of(allocation={"name": "uniform"}, reconstruction={})
    assert [stage.kind for stage in fitted.inputs()] == ["pretrain", "windows"]
    assert not fitted.stores_masks
    apart = owl_of(allocation={"name": "uniform"}, reconstruction={"calibration": other})
    assert [stage.key for stage in apart.inputs()[1:]] == [other.key, fitted.calibration.key]  # type: ignore[union-attr]
    magnitude = owl_of(allocation={"name": "uniform"}, reconstruction={}, pruner=Magnitude())
    assert [stage.kind for stage in magnitude.inputs()] == ["pretrain", "windows"]


def test_a_pruning_without_reconstruction_has_the_key_that_it_had() -> None:
    assert owl_of().key == owl_of(reconstruction=None).key
    assert "reconstruction" not in owl_of().lineage
    keys = {owl_of(reconstruction=options).key for options in ({}, {"epochs": 1}, None)}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pruner": {"name": "gptq"}}, "would move what gptq rounded"),
        ({"window_groups": 2}, "window_groups 2: reconstruction .* set it to 1"),
        (
            {"window_groups": 2, "pruner": {"name": "wandapp"}, "reconstruction": None},
            "wandapp run",
        ),
        ({"checkpoint": True}, "reconstruction leaves a checkpoint anyway"),
        ({"reconstruction": {"epochs": 0}}, r"reconstruction\.epochs"),
        ({"reconstruction": {"rate": 1}}, "rate: 1: there is no such field"),
    ],
)
def test_contradictory_reconstructions_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        owl_of(**{"reconstruction": {}, **changes})


def test_another_set_to_fit_to_needs_a_pruner_that_takes_data() -> None:
    fitted = {"calibration": owl_of().calibration}
    with pytest.raises(ValidationError, match="magnitude takes no data: give the set"):
        owl_of(pruner=Magnitude(), allocation={"name": "uniform"}, reconstruction=fitted)


def test_outliers_of_another_version_change_what_is_pruned_by_them_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluated = EvaluateSpec(model=owl_of(), tasks=(TaskSpec(name="boolq"),)).key
    changed = {"outliers", "prune by magnitude with OWL"}
    assert rekeyed(monkeypatch, OutliersSpec) == changed
    assert EvaluateSpec(model=owl_of(), tasks=(TaskSpec(name="boolq"),)).key != evaluated


def test_the_order_of_a_mixture_does_not_change_the_key() -> None:
    one = PretrainSpec(mixture={"facts": 3.0, "code": 1})
    two = PretrainSpec(mixture={"code": 1.0, "facts": 3})
    assert one.key == two.key


def test_the_lineage_of_an_evaluation_names_every_stage_before_it() -> None:
    lineage = json.dumps(examples()["evaluate"].lineage)
    for stage in ("evaluate", "prune", "windows", "filter", "score", "generate", "pretrain"):
        assert f'"kind": "{stage}"' in lineage


def test_shards_cover_all_samples_and_read_only_their_own_part() -> None:
    scores = examples()["score"]
    assert isinstance(scores, ScoreSpec)
    assert len(scores.samples.shards()) == 3  # 130 samples, 64 a shard
    part = scores.shards()[1]
    assert {spec.key for spec in part.inputs()} == {
        ShardSpec(of=scores.samples, index=1).key,
        scores.model.key,  # type: ignore[union-attr]
    }


def test_every_shard_of_scores_reads_all_drawn_samples() -> None:
    """They are one artifact: each shard would read the corpus again."""
    testbed = PretrainSpec(mixture={"facts": 3.0, "code": 1.0})
    drawn = DrawSpec(source=HubCorpus(path="c"), model=testbed, num_samples=130)
    scores = ScoreSpec(samples=drawn, model=testbed)
    parts = scores.shards()
    assert len(parts) == 3  # 130 samples, 64 a shard
    assert all({spec.key for spec in part.inputs()} == {drawn.key, testbed.key} for part in parts)
    judge = PretrainSpec(mixture={"facts": 1.0}, seed=7)
    judged = ScoreSpec(samples=drawn, model=judge).shards()[0]
    assert {spec.key for spec in judged.inputs()} == {drawn.key, testbed.key, judge.key}


def test_a_scorer_that_is_not_the_generator_reads_both_models() -> None:
    scores = examples()["score"]
    assert isinstance(scores, ScoreSpec)
    other = PretrainSpec(mixture={"facts": 1.0}, seed=7)
    part = ScoreSpec(samples=scores.samples, model=other).shards()[0]
    expected = {scores.samples.shards()[0].key, other.key, scores.samples.model.key}  # type: ignore[union-attr]
    assert {spec.key for spec in part.inputs()} == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 1.0, "pruner": Magnitude()}, "less than 1"),
        ({"sparsity": -0.1, "pruner": Magnitude()}, "greater than or equal to 0"),
        ({"sparsity": float("nan"), "pruner": Magnitude()}, "sparsity"),
        ({"sparsity": 0.5, "pruner": Magnitude(), "pattern": "5:4"}, "N must not exceed M"),
        ({"sparsity": 0.5, "pruner": Magnitude(), "pattern": "2-4"}, "form N:M"),
        ({"sparsity": 0.6, "pruner": Magnitude(), "pattern": "2:4"}, "set it to 0.5"),
        ({"sparsity": 0.5, "pruner": Wanda()}, "needs a calibration set"),
        ({"sparsity": 0.5, "pruner": Magnitude(), "allocation": OWL()}, "owl needs a calibration"),
        ({"sparsity": 0.5, "pruner": Magnitude(), "allocation": {"name": "by-hand"}}, "sparsities"),
        ({"sparsity": 0.5, "pruner": {"name": "wander"}}, "wander"),
        ({"sparsity": 0.5, "pruner": Wanda(variant=True), "pattern": "2:4"}, "no N:M pattern"),
        ({"sparsity": 0.5, "pruner": RIA(permutation=True)}, "serves N:M patterns"),
        ({"sparsity": 0.5, "pruner": {"name": "dsnot", "initial": "owl"}}, "initial"),
        ({"sparsity": 0.5, "pruner": Magnitude(), "speed": 1}, "speed: 1: there is no such field"),
        (
            {"sparsity": 0.5, "pruner": Magnitude(), "reconstruction": {}},
            "reconstruction needs a c",
        ),
    ],
)
def test_contradictory_prunings_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PruneSpec(model=HubModel(name="m"), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_new_tokens": 31, "prefix_tokens": 2, "seqlen": 32}, "min_new_tokens 31 after"),
        ({"temperature_tokens": 4}, "needs a temperature_end"),
        ({"temperature_end": 0.5, "temperature": 0.0}, "needs a temperature above 0"),
        ({"temperature_end": 0.5, "backend": "vllm"}, "leave temperature_end out"),
        ({"temperature_end": 0.0}, "temperature_end"),
        ({"prompt": "chat", "prefix_tokens": 0}, "chat needs a message: raise prefix_tokens"),
        ({"redraws": 2, "temperature": 0.0}, "redraws at temperature 0 give the same text"),
        ({"redraws": -1}, "redraws"),
        ({"prompt": "cooked"}, "prompt"),
        ({"prefixes": {"kind": "corpus-mixture", "parts": {}}}, "parts"),
    ],
)
def test_contradictory_generations_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GenerateSpec(**{"model": HubModel(name="m"), "prefixes": HubCorpus(path="c"), **fields})  # type: ignore[arg-type]


def test_data_for_a_pruner_that_takes_none_is_refused() -> None:
    model = HubModel(name="m")
    windows = WindowsSpec(source=HubCorpus(path="c"), model=model)
    with pytest.raises(ValidationError, match="leave calibration out"):
        PruneSpec(model=model, pruner=Magnitude(), sparsity=0.5, calibration=windows)


def test_asking_for_a_checkpoint_that_is_stored_anyway_is_refused() -> None:
    model = HubModel(name="m")
    windows = WindowsSpec(source=HubCorpus(path="c"), model=model)
    with pytest.raises(ValidationError, match="leave checkpoint out"):
        PruneSpec(
            model=model, pruner=SparseGPT(), sparsity=0.5, calibration=windows, checkpoint=True
        )


def test_shards_of_a_model_stored_as_masks_read_its_dense_model_too() -> None:
    generated = examples()["generate from a pruned model"]
    assert isinstance(generated, GenerateSpec)
    pruned = generated.model
    assert isinstance(pruned, PruneSpec)
    expected = {pruned.key, pruned.model.key}  # type: ignore[union-attr]
    assert {spec.key for spec in generated.shards()[0].inputs()} == expected
    scored = ScoreSpec(samples=generated, model=pruned).shards()[0]
    assert {spec.key for spec in scored.inputs()} == expected | {generated.shards()[0].key}
    windows = WindowsSpec(source=HubCorpus(path="c"), model=pruned)
    assert {spec.key for spec in windows.inputs()} == expected


def test_specs_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        HubModel(name="m").name = "n"  # type: ignore[misc]


def test_patterns_keep_n_of_m() -> None:
    assert Pattern.parse("2:4") == Pattern(kept=2, group=4)
    assert Pattern.parse("16:32") == Pattern(kept=16, group=32)
    assert str(Pattern(2, 4)) == "2:4"
    assert Pattern(1, 4).sparsity == 0.75
