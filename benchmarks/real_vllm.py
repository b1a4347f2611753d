"""Compare vLLM with the transformers engine on a real model: the same prefixes, one CPU thread.

This runs in a process of its own, since vLLM leaves settings behind.
"""

import multiprocessing
import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks.real_model import on_cpu
from benchmarks.targets import Target
from jobs.grid import GeneratedCalibration
from pipeline.generation.generate import Engine
from pipeline.generation.sampling import Sampling
from pipeline.generation.transformers_engine import TransformersEngine
from pipeline.generation.vllm_engine import VllmEngine, vllm_version
from pipeline.specs import GenerateSpec, LocalModel, TestbedCorpus, Vllm


def chosen_by_auto() -> bool:
    """Return whether `backend: auto` means vLLM on this machine."""
    choice = GeneratedCalibration.model_validate({"prefixes": "any", "backend": "auto"})
    return isinstance(choice.backend, Vllm)


def measure_vllm(folder: Path, prefixes: list[list[int]], seqlen: int, rounds: int) -> list[Target]:
    """Compare both engines. Where `auto` does not choose vLLM there is no target.

    Returns:
        An empty list if vLLM is not installed.
    """
    if vllm_version() is None:
        return []
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds = pool.apply(_measure, (folder, prefixes, seqlen, rounds))
    tokens = sum(seqlen - len(prefix) for prefix in prefixes)
    chosen = chosen_by_auto()
    note = "chosen by auto" if chosen else "not chosen by auto"
    return [
        Target("transformers engine: tokens/s", None, tokens / seconds["transformers"]),
        Target("vLLM: tokens/s", None, tokens / seconds["vllm"]),
        Target("vLLM: seconds to start", None, seconds["start"]),
        Target(
            f"vLLM ({note}): times the transformers engine",
            1.0 if chosen else None,
            seconds["transformers"] / seconds["vllm"],
        ),
    ]


def _measure(folder: Path, prefixes: list[list[int]], seqlen: int, rounds: int) -> dict[str, float]:
    """Return wall seconds, since vLLM may use more than one thread."""
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    start = time.perf_counter()
    spec = GenerateSpec(
        model=LocalModel(path=str(folder)),
        prefixes=TestbedCorpus(mixture={"facts": 1.0}),  # unused: the prefixes are given
        num_samples=len(prefixes),
        seqlen=seqlen,
        shard_size=len(prefixes),
        backend=Vllm(enforce_eager=True),
    )
    vllm = VllmEngine(spec, {})
    started = time.perf_counter() - start
    engines: dict[str, Engine] = {"transformers": TransformersEngine(on_cpu(folder)), "vllm": vllm}
    numbers = range(len(prefixes))
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(rounds + 1):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.write(
                prefixes,
                numbers,
                [],
                range(vllm.rows),
                sampling=Sampling(),
                seqlen=seqlen,
                seed=round_,
            )
            seconds[name].append(time.perf_counter() - start)
    vllm.close()
    # The first round allocates and compiles.
    return {"start": started} | {name: statistics.median(own[1:]) for name, own in seconds.items()}
