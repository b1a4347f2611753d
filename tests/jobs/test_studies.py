"""The studies' grid files: their plans, and the time of all of them on the testbed."""

from pathlib import Path

import pytest

import analysis
from analysis.studies import STUDIES
from jobs.check import check_plan
from jobs.grid import load_grid
from jobs.plan import Plan, make_plan
from pipeline.real.prepare import REAL_FOLDER, prepare_books
from pipeline.specs import EvaluateSpec, GenerateSpec, PretrainSpec, PruneSpec, ShardSpec, StageSpec

GRIDS = sorted((Path(analysis.__file__).parent / "studies").glob("*.yaml"))
REAL = [path for path in GRIDS if path.stem.startswith("real-")]

CORES = 2
TARGET_SECONDS = 3 * 60 * 60


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {path.stem: make_plan(load_grid(path)) for path in GRIDS if path not in REAL}


def core_seconds(spec: StageSpec) -> float:
    """Seconds of a stage on one idle core, rounded up from a recorded run: with a million weights
    most of it does not grow with the data."""
    match spec:
        case PretrainSpec():
            return 200 if spec.steps * spec.batch_size > 5000 else 60
        case ShardSpec(of=GenerateSpec() as samples):
            return 0.1 * min(samples.num_samples, samples.shard_size)
        case PruneSpec(calibration=None):
            return 0.5
        case PruneSpec(calibration=windows):
            assert windows is not None
            fitted = (
                0.05 * windows.nsamples * spec.reconstruction.epochs if spec.reconstruction else 0
            )
            return 1.5 + windows.nsamples / 100 + fitted
        case EvaluateSpec():
            return 1.0 + 5.0 * bool(spec.tasks)
        case _:
            return 0.3


def test_every_study_has_a_grid_without_mistakes(plans: dict[str, Plan]) -> None:
    assert {*plans, *(path.stem for path in REAL)} == set(STUDIES)
    for name, plan in plans.items():
        assert plan.grid.name == name
        # Where the amount of text is what a study varies, or nearly all is dropped.
        assert all("will overlap" in note for note in check_plan(plan))


@pytest.mark.whole_run
def test_every_study_of_the_real_model_has_a_grid_without_mistakes(
    real_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / REAL_FOLDER
    folder.mkdir()
    for name in ("model", "text"):
        (folder / name).symlink_to(real_folder / name)
    prepare_books(folder)
    grids = [path.absolute() for path in REAL]
    monkeypatch.chdir(tmp_path)
    assert len(grids) == 6
    for path in grids:
        plan = make_plan(load_grid(path))
        assert plan.grid.name == path.stem
        assert "instruct model" in plan.grid.note
        assert all("transformers generates" in note for note in check_plan(plan))


def test_all_studies_together_take_less_than_three_hours_on_two_cores(
    plans: dict[str, Plan],
) -> None:
    stages = {key: spec for plan in plans.values() for key, spec in plan.specs.items()}
    assert sum(map(core_seconds, stages.values())) / CORES < TARGET_SECONDS


def test_studies_share_model_and_calibration_sets(plans: dict[str, Plan]) -> None:
    models = {
        key
        for plan in plans.values()
        for key, spec in plan.specs.items()
        if spec.kind == "pretrain"
    }
    assert len(models) == 16  # eight trainings, and two of four more shapes for the prefix length
    alone = sum(len(plan.specs) for plan in plans.values())
    together = len({key for plan in plans.values() for key in plan.specs})
    assert together < 0.95 * alone


def test_every_comparison_has_enough_seeds_for_an_interval(plans: dict[str, Plan]) -> None:
    for name, plan in plans.items():
        seeds = {cell.seed for cell in plan.cells.values() if cell.seed is not None}
        assert len(seeds) >= 4, name


def test_the_prefix_study_has_three_shapes_and_both_kinds_of_attention(
    plans: dict[str, Plan],
) -> None:
    models = list(plans["prefix-length"].grid.models.values())
    assert all(isinstance(model, PretrainSpec) for model in models)
    shapes = {(model.num_layers, model.hidden_size) for model in models}
    heads = {model.hidden_size // model.head_dim == model.num_key_value_heads for model in models}
    assert len(shapes) >= 3
    assert heads == {True, False}
