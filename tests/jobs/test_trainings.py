"""Several trainings of a model under one name."""

from collections.abc import Callable
from typing import Any

import pytest

from jobs.cells import expand
from jobs.grid import Grid
from jobs.plan import make_plan
from pipeline.errors import InputError
from pipeline.specs import PretrainSpec
from pipeline.testbed.presets import PRETRAIN_PRESETS

Content = dict[str, Any]
Load = Callable[[Content], Grid]


def test_trainings_are_models_that_differ_in_their_seed_alone(content: Content, load: Load) -> None:
    content["models"] = {"testbed": {"preset": "testbed-tiny", "trainings": 3, "seed": 5}}
    models = load(content).models
    tiny = PRETRAIN_PRESETS["tiny"]
    assert models == {f"testbed-{k}": tiny.model_copy(update={"seed": 5 + k}) for k in range(3)}
    assert all(isinstance(model, PretrainSpec) for model in models.values())


def test_the_name_of_trainings_stands_for_all_wherever_a_model_is_named(
    content: Content, load: Load
) -> None:
    content["models"] = {
        "testbed": {"preset": "testbed-tiny", "trainings": 2},
        "one": "testbed-tiny",
    }
    content["cells"]["model"] = ["testbed", "one"]
    content["include"] = [{"model": "testbed", "sparsity": 0.7}]
    content["exclude"] = [{"model": "testbed", "sparsity": "2:4"}]
    cells = expand(load(content))
    sparsities = {
        model: {
            (cell.sparsity, cell.pattern) for cell in cells if cell.model == model and cell.pruner
        }
        for model in ("testbed-0", "testbed-1", "one")
    }
    assert sparsities["testbed-0"] == sparsities["testbed-1"] == {(0.5, None), (0.7, None)}
    assert sparsities["one"] == {(0.5, None), (0.5, "2:4")}


def test_the_first_training_is_the_preset_itself_so_that_grids_share_it(
    content: Content, load: Load
) -> None:
    alone = make_plan(load(content)).specs
    content["models"] = {"testbed": {"preset": "testbed-tiny", "trainings": 2}}
    assert alone.keys() <= make_plan(load(content)).specs.keys()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"m": {"preset": "testbed-tiny", "trainings": 0}}, r"models\.m\.trainings: 0: must be"),
        ({"m": {"preset": "testbed-tiny", "trainings": True}}, r"models\.m\.trainings: True"),
        (
            {"m": {"preset": "testbed-tiny", "trainings": 2}, "m-1": "testbed-tiny"},
            r"models\.m-1: .*models\.m stands for: rename one",
        ),
        (
            {"m": {"kind": "hub-model", "name": "a/b", "trainings": 2}},
            r"models\.m\.trainings: 2: only a model that the testbed trains",
        ),
    ],
)
def test_trainings_that_cannot_be_are_refused(
    content: Content, load: Load, models: Content, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load({**content, "models": models})
