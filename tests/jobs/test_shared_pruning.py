"""Prunings that several actors share on a real Ray."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.run import run_graph
from cluster.store import Store
from cluster.worker import Aids
from jobs.check import check_plan
from jobs.grid import Grid
from jobs.plan import Plan, make_plan
from jobs.stages import execute, help_make, prepared
from pipeline.errors import InputError
from pipeline.specs import OutliersSpec, PruneSpec
from tests.made import make_here

Content = dict[str, Any]
Load = Callable[[Content], Grid]


@pytest.fixture
def small(content: Content, tiny_model_folder: Path) -> Content:
    model = {"kind": "local-model", "path": str(tiny_model_folder / "model"), "dtype": "float32"}
    content["models"] = {"tiny": model}
    content["calibrations"] = {"notes": {"corpus": "notes"}}
    content["cells"] = {
        "model": "tiny",
        "calibration": "notes",
        "pruner": ["wanda", "sparsegpt", "magnitude"],
        "sparsity": 0.5,
        "nsamples": 6,
        "seqlen": 32,
    }
    content["include"] = [{"pruner": "wanda", "allocation": "owl"}]
    content["evaluate"] = {"perplexity": [{"corpus": "true", "seqlen": 32, "max_windows": 2}]}
    content["window_groups"] = 3
    return content


def plan_of(load: Load, content: Content, actors: int) -> Plan:
    shared = {"outliers": {"actors": actors}, "prune": {"actors": actors, "replicas": {"max": 1}}}
    plan = make_plan(load(content | {"resources": shared}))
    assert not check_plan(plan)
    return plan


def bytes_of(keys: list[str], store: Store) -> dict[str, str]:
    """Return checksums of all files."""
    made = {}
    for key in keys:
        manifest = store.manifest(key)
        assert manifest is not None, key
        made |= {f"{key}/{name}": repr(entry) for name, entry in manifest.files.items()}
    return made


@pytest.mark.usefixtures("local_ray")
def test_two_actors_give_the_bytes_of_one_even_if_one_is_killed(
    small: Content, load: Load, tmp_path: Path
) -> None:
    """SparseGPT's Hessians, and the norms from which OWL counts outliers."""
    small["cells"]["pruner"] = "sparsegpt"
    alone, shared = plan_of(load, small, 1), plan_of(load, small, 2)
    targets = [
        key
        for key, spec in alone.specs.items()
        if isinstance(spec, OutliersSpec) or (isinstance(spec, PruneSpec) and not spec.stores_masks)
    ]
    assert len(targets) == 2
    stores = [Store(str(tmp_path / name)) for name in ("alone", "shared")]
    make_here(alone.graph, targets, stores[0])

    marker = tmp_path / "killed"

    def dying_once(
        payload: str, artifacts: Mapping[str, Path], cpus: int, member: int, members: int
    ) -> Any:
        part = help_make(payload, artifacts, cpus, member, members)
        observe = part.observe

        def observe_or_die(number: int, owners: Any) -> Any:
            if number == 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return observe(number, owners)

        part.observe = observe_or_die
        return part

    aids = Aids(prepared, dying_once)
    outcome = run_graph(shared.graph, targets, execute, stores[1], {}, aids=aids)
    assert not outcome.failed
    assert marker.exists()
    assert sum(outcome.repeated.values()) == 1
    assert bytes_of(targets, stores[1]) == bytes_of(targets, stores[0])


def test_only_stages_with_statistics_are_shared(small: Content, load: Load) -> None:
    plan = plan_of(load, small, 3)
    actors = {
        plan.graph[key].label: plan.graph[key].resources.actors
        for key, spec in plan.specs.items()
        if spec.kind in ("prune", "outliers")
    }
    assert sorted(actors.values()) == [1, 3, 3, 3, 3]
    assert actors["prune magnitude 50%"] == 1


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"window_groups": 2}, "resources.prune.actors", "window_groups is 2"),
        ({"window_groups": 7}, "window_groups", "a cell has 6 windows"),
        ({"resources": {"score": {"actors": 2}}}, "score.actors", "only outliers and prune"),
    ],
)
def test_actors_without_work_are_refused(
    small: Content, load: Load, changes: Content, field: str, message: str
) -> None:
    resources = {"resources": {"prune": {"actors": 3}}}
    with pytest.raises(InputError, match=message) as caught:
        make_plan(load(small | resources | changes))
    assert caught.value.field.endswith(field)
