"""Two replicas of the real engine on Ray, one of which is killed."""

import functools
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.graph import Resources, Stage
from cluster.run import run
from cluster.store import Partial, Store
from jobs.stages import execute
from pipeline import generate
from pipeline.specs import GenerateSpec, LocalModel, StageSpec, TestbedCorpus, Vllm
from pipeline.vllm_engine import vllm_version

STEPS_BEFORE_DEATH = 10


def stage(spec: StageSpec, pool: str | None) -> Stage:
    return Stage(
        key=spec.key,
        kind=spec.kind,
        label=spec.key,
        spec={},
        payload=spec.model_dump_json(),
        inputs=tuple(before.key for before in spec.inputs()),
        resources=Resources(min_replicas=2, max_replicas=2),
        pool=pool,
    )


def execute_or_die(
    payload: str,
    artifacts: Mapping[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
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
    if "VLLM_CACHE_ROOT" in os.environ:
        (notes / f"cache-{os.getpid()}").write_text(os.environ["VLLM_CACHE_ROOT"])
    return report


@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed; see the Makefile")
@pytest.mark.usefixtures("local_ray")
def test_a_replica_that_is_killed_in_the_middle_of_a_shard_costs_that_shard_only(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = GenerateSpec(
        model=LocalModel(path=str(tiny_model_folder / "model"), dtype="float32"),
        prefixes=TestbedCorpus(mixture={"facts": 1.0, "code": 1.0}),
        num_samples=48,
        seqlen=48,
        shard_size=12,
        backend=Vllm(enforce_eager=True),
    )
    shards = spec.shards()
    plan = {each.key: stage(each, "replicas") for each in shards}
    plan[spec.key] = stage(spec, None)
    notes = tmp_path / "notes"
    notes.mkdir()
    victim = plan[shards[1].key].payload
    store = Store(str(tmp_path / "store"))
    dying = functools.partial(execute_or_die, victim=victim, notes=notes)
    outcome = run(plan, [spec.key], dying, store, {})
    assert outcome.failed == {}
    assert (notes / "died").exists()

    attempts = [line.split() for line in (notes / "attempts").read_text().splitlines()]
    assert sum(is_victim == "True" for _, is_victim, _ in attempts) == 2
    assert len(attempts) == len(shards) + 1 + 1  # the join, and the victim once more
    assert all(visible == str(None) for _, _, visible in attempts)  # not blanked
    caches = [path.read_text() for path in notes.glob("cache-*")]
    assert len(set(caches)) == len(caches)

    for shard in shards:  # the same bytes as from one engine in one process
        folder = tmp_path / shard.key
        folder.mkdir()
        generate.run_shard(spec, shard.index, {}, folder)
        alone = (folder / "samples.parquet").read_bytes()
        assert (store.fetch(shard.key) / "samples.parquet").read_bytes() == alone
