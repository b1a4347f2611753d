"""The engine that a grid names: defaults, plan and refusals."""

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig

from cluster.store import Store
from jobs.check import _check_vllm_positions, check_plan
from jobs.grid import GeneratedCalibration, Grid
from jobs.plan import Plan, make_plan, print_plan
from pipeline.errors import InputError
from pipeline.specs import EvaluateSpec, GenerateSpec, Vllm

Content = dict[str, Any]
Load = Callable[[Content], Grid]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Pretend that vLLM is installed, or is not."""
    find = importlib.util.find_spec

    def install(there: bool) -> None:
        def found(name: str, package: str | None = None) -> ModuleSpec | None:
            if name == "vllm":
                return ModuleSpec("vllm", None) if there else None
            return find(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", found)

    return install


def own(content: Content, load: Load) -> Any:
    calibration = load(content).calibrations["own"]
    assert isinstance(calibration, GeneratedCalibration)
    return calibration.backend


def generations(plan: Plan) -> list[GenerateSpec]:
    return [spec for spec in plan.specs.values() if isinstance(spec, GenerateSpec)]


def test_auto_is_the_engine_installed_where_the_grid_is_read(
    content: Content, load: Load, installed: Callable[[bool], None]
) -> None:
    assert own(content, load) == "transformers"
    content["calibrations"]["own"]["backend"] = "auto"
    keys = {}
    for there, engine in ((True, Vllm()), (False, "transformers")):
        installed(there)
        assert own(content, load) == engine
        keys[there] = {spec.key for spec in generations(make_plan(load(content)))}
    assert keys[True].isdisjoint(keys[False])
    del content["calibrations"]["own"]["backend"]
    assert {spec.key for spec in generations(make_plan(load(content)))} == keys[False]


def test_engine_settings_are_part_of_the_key_and_the_plan_prints_the_engine(
    content: Content, load: Load, tmp_path: Path
) -> None:
    content["calibrations"]["own"]["backend"] = "vllm"
    keys = {spec.key for spec in generations(make_plan(load(content)))}
    content["calibrations"]["own"]["backend"] = {"name": "vllm", "enforce_eager": True}
    plan = make_plan(load(content))
    assert keys.isdisjoint(spec.key for spec in generations(plan))
    console = Console(record=True, width=120)
    print_plan(plan, Store(str(tmp_path)), console)
    assert "calibrations.own: vllm enforce_eager=True generates" in console.export_text()


def test_engines_for_other_windows_do_not_share_a_replica(content: Content, load: Load) -> None:
    content["cells"]["seqlen"] = [32, 64]
    content["cells"]["seed"] = [0, 1]
    for backend, pools in (("transformers", 1), ("vllm", 2)):
        content["calibrations"]["own"]["backend"] = backend
        stages = make_plan(load(content)).graph.values()
        assert len({s.pool for s in stages if s.kind == "generate" and s.pool}) == pools


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("vlm", r"own\.backend: 'vlm': .*known are transformers and vllm"),
        ({"name": "vllm", "tensor_paralel_size": 2}, r"tensor_paralel_size: 2: there is no such"),
        (
            {"name": "vllm", "tensor_parallel_size": 0},
            r"tensor_parallel_size: 0: .*at least 1",
        ),
        ({"name": "vllm", "gpu_memory_utilization": 1.5}, r"gpu_memory_utilization: 1\.5"),
    ],
)
def test_a_wrong_engine_is_named_with_its_field_and_value(
    content: Content, load: Load, backend: object, message: str
) -> None:
    content["calibrations"]["own"]["backend"] = backend
    with pytest.raises(InputError, match=message):
        load(content)


ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("rope", ROPES)
def test_vllm_is_refused_if_its_positions_differ_from_transformers(rope: str) -> None:
    longest = 256
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=longest,
        rope_parameters={**ROPES[rope], "rope_theta": 10_000.0},
    )
    for tokens in (None, 65):
        with pytest.raises(InputError, match=r"backend: 'vllm': positions of model phi depend"):
            _check_vllm_positions("phi", config, tokens)
    if rope == "longrope":
        _check_vllm_positions("phi", config, 64)
    _check_vllm_positions("phi", LlamaConfig(max_position_embeddings=longest), None)


def test_a_temperature_that_vllm_refuses_is_an_error_that_names_its_calibration(
    content: Content, load: Load
) -> None:
    content["calibrations"]["own"] |= {"backend": "vllm", "temperature": 0.001}
    with pytest.raises(InputError, match=r"calibrations\.own.*no temperature between 0 and 0\.01"):
        make_plan(load(content))


@pytest.mark.parametrize(
    ("backend", "gpus", "message"),
    [
        ({"tensor_parallel_size": 3}, 3, r"tensor_parallel_size: 3: .*2 attention heads"),
        ({"pipeline_parallel_size": 9}, 9, r"pipeline_parallel_size: 9: .*2 layers"),
        ({"tensor_parallel_size": 2}, 1, r"resources\.generate\.gpus: 1.*set it to 2"),
        ({"tensor_parallel_size": 2}, 0, r"resources\.generate\.gpus: 0.*set it to 2"),
        ({}, 0.5, r"gpu_memory_utilization: 0\.9: .*0\.5 of a GPU"),
    ],
)
def test_an_engine_that_does_not_fit_its_model_or_resources_is_refused(
    content: Content,
    load: Load,
    installed: Callable[[bool], None],
    backend: Content,
    gpus: float,
    message: str,
) -> None:
    installed(True)
    content["calibrations"]["own"]["backend"] = {"name": "vllm", **backend}
    content["resources"] = {"generate": {"gpus": gpus}}
    with pytest.raises(InputError, match=message):
        check_plan(make_plan(load(content)))


def test_an_engine_that_fits_passes_only_where_it_is_installed(
    content: Content, load: Load, installed: Callable[[bool], None]
) -> None:
    content["calibrations"]["own"]["backend"] = {"name": "vllm", "tensor_parallel_size": 2}
    content["resources"] = {"generate": {"gpus": 2}}
    installed(True)
    check_plan(make_plan(load(content)))
    installed(False)
    with pytest.raises(InputError, match=r"backend: 'vllm': .*install calprune\[vllm\]"):
        check_plan(make_plan(load(content)))


@pytest.mark.parametrize(
    ("replicas", "bounds"),
    [(4, (4, 4)), ({"min": 2, "max": 8}, (2, 8)), ({"max": 3}, (1, 3)), ({"min": 2}, (2, None))],
)
def test_replicas_are_a_number_or_bounds(
    content: Content, load: Load, replicas: object, bounds: tuple[int, int | None]
) -> None:
    content["resources"] = {"generate": {"replicas": replicas}}
    pooled = [s for s in make_plan(load(content)).graph.values() if s.kind == "generate" and s.pool]
    assert {(s.resources.min_replicas, s.resources.max_replicas) for s in pooled} == {bounds}


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (0, r"resources\.generate\.replicas.*at least 1"),
        ({"min": 3, "max": 2}, r"max 2 is less than min 3"),
        ({"least": 3}, r"least: 3: there is no such field"),
    ],
)
def test_wrong_replicas_are_named(
    content: Content, load: Load, replicas: object, message: str
) -> None:
    content["resources"] = {"generate": {"replicas": replicas}}
    with pytest.raises(InputError, match=message):
        load(content)


def test_an_evaluations_engine_is_planned_and_checked_as_a_calibrations(
    content: Content, load: Load, installed: Callable[[bool], None], tmp_path: Path
) -> None:
    def evaluations(plan: Plan) -> dict[str, EvaluateSpec]:
        return {key: spec for key, spec in plan.specs.items() if isinstance(spec, EvaluateSpec)}

    with_transformers = evaluations(make_plan(load(content)))
    content["evaluate"]["backend"] = {"name": "vllm", "tensor_parallel_size": 2}
    content["resources"] = {"evaluate": {"gpus": 1}}
    installed(True)
    plan = make_plan(load(content))
    assert {spec.backend for spec in evaluations(plan).values()} == {Vllm(tensor_parallel_size=2)}
    assert evaluations(plan).keys().isdisjoint(with_transformers)
    with pytest.raises(InputError, match=r"resources\.evaluate\.gpus: 1.*set it to 2"):
        check_plan(plan)
    content["resources"] = {"evaluate": {"gpus": 2}}
    check_plan(make_plan(load(content)))
    console = Console(record=True, width=120)
    print_plan(plan, Store(str(tmp_path)), console)
    assert "evaluate: vllm tensor_parallel_size=2 answers tasks" in console.export_text()
