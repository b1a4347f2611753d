"""Text that the real engine writes: on two replicas, of which one is killed within a shard, and in
this process alone."""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.graph import needed
from cluster.helpers import Helpers
from cluster.run import run_graph
from cluster.store import Partial, Store
from cluster.worker import Aids, Maker, Replica
from jobs.check import check_plan
from jobs.grid import Grid
from jobs.plan import Plan, make_plan
from jobs.stages import execute, prepared
from pipeline.generation.vllm_engine import vllm_version
from pipeline.specs import GenerateSpec, ShardSpec

Content = dict[str, Any]

STEPS_BEFORE_DEATH = 10


def execute_or_die(
    payload: str,
    artifacts: Mapping[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
    *,
    victim: str,
    notes: Path,
) -> dict[str, Any]:
    """Kills its process in the middle of the first attempt at `victim`; notes who made what."""
    with (notes / "attempts").open("a") as file:
        file.write(f"{os.getpid()} {payload == victim} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    marker = notes / "died"
    if payload == victim and not marker.exists():
        from vllm.v1.engine.llm_engine import LLMEngine

        steps = iter(range(STEPS_BEFORE_DEATH))
        step = LLMEngine.step

        def last_steps(engine: Any) -> Any:
            if next(steps, None) is None:
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return step(engine)

        LLMEngine.step = last_steps
    report = execute(payload, artifacts, output, cpus, partial)
    if "vllm" in sys.modules:
        (notes / f"cache-{os.getpid()}").write_text(os.environ["VLLM_CACHE_ROOT"])
    return report


@pytest.fixture
def plan(content: Content, load: Callable[[Content], Grid], tiny_model_folder: Path) -> Plan:
    model = {"kind": "local-model", "path": str(tiny_model_folder / "model"), "dtype": "float32"}
    content["models"] = {"testbed": model}
    content["calibrations"]["own"] = {
        "prefixes": {"true": 2, "other": 1},
        "num_samples": 48,
        "shard_size": 12,
        "backend": {"name": "vllm", "enforce_eager": True},
    }
    content["cells"] = {
        "model": "testbed",
        "calibration": "own",
        "pruner": "wanda",
        "sparsity": 0.5,
        "nsamples": 8,
        "seqlen": 48,
    }
    del content["evaluate"]["tasks"], content["evaluate"]["task_folder"]
    content["resources"] = {"generate": {"replicas": 2}}
    plan = make_plan(load(content))
    assert check_plan(plan) == []
    return plan


@pytest.fixture
def as_before() -> Iterator[None]:
    """What making stages in this process changes in it is put back."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


def files(store: Store) -> dict[str, Any]:
    paths = Path(store.url, "manifests").glob("*.json")
    return {path.stem: json.loads(path.read_text())["files"] for path in paths}


@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed; see the Makefile")
@pytest.mark.usefixtures("local_ray", "as_before")
def test_a_replica_killed_within_a_shard_costs_only_that_shard_and_changes_no_byte(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_flask: Any
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shards = [
        key
        for key, spec in plan.specs.items()
        if isinstance(spec, ShardSpec) and isinstance(spec.of, GenerateSpec)
    ]
    assert len(shards) == 4
    texts = [key for key, spec in plan.specs.items() if isinstance(spec, GenerateSpec)]
    notes = tmp_path / "notes"
    notes.mkdir()
    dying = functools.partial(execute_or_die, victim=plan.graph[shards[1]].payload, notes=notes)
    together = Store(str(tmp_path / "together"))
    outcome = run_graph(plan.graph, texts, dying, together, {})
    assert outcome.failed == {}
    assert (notes / "died").exists()

    attempts = [line.split() for line in (notes / "attempts").read_text().splitlines()]
    assert sum(is_victim == "True" for _, is_victim, _ in attempts) == 2
    assert len(attempts) == len(outcome.made) + 1  # the victim once more, and nothing else
    assert all(visible == str(None) for _, _, visible in attempts)  # not blanked
    caches = [path.read_text() for path in notes.glob("cache-*")]
    assert len(set(caches)) == len(caches)

    alone = Store(str(tmp_path / "alone"))
    maker = Maker(execute, alone.url, versions={}, run="alone", aids=Aids(prepared))
    with without_flask():
        for key in needed(plan.graph, texts, ()):
            Replica().make(plan.graph[key], maker, frozenset())
    assert files(together) == files(alone)
    assert texts[0] in files(alone)
