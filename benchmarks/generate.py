"""Measure how fast text is generated: `python -m benchmarks.generate`.

Three ways continue the same prefixes with the same model to the same length, in turns in one run:
vLLM, our batches on transformers, and the paper's script, which calls `generate` with batches of
32. The model has the shape of the testbed's `small`, random weights, and no EOS.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

from benchmarks.geometry import TESTBED
from benchmarks.record import machine, write_json
from pipeline.generation.sampling import Sampling
from pipeline.generation.transformers_engine import TransformersEngine
from pipeline.generation.vllm_engine import VllmEngine, vllm_version
from pipeline.models.heap import keep_freed_memory
from pipeline.models.loading import default_device
from pipeline.specs import GenerateSpec, LocalModel, TestbedCorpus, Vllm

SCRIPT_BATCH = 32
"""Samples in a batch of the paper's script."""

ContinuePrefixes = Callable[[list[list[int]]], int]
"""Continues prefixes and returns how many tokens it wrote."""


def ways(spec: GenerateSpec, model: Any) -> Iterator[tuple[str, ContinuePrefixes]]:
    """Yield each way with its name; vLLM only if it is installed."""
    sampling = Sampling()
    engines: dict[str, Any] = {"transformers": TransformersEngine(model)}
    if vllm_version() is not None:
        engines["vllm"] = VllmEngine(spec, {})

    def by_engine(engine: Any) -> ContinuePrefixes:
        def generate(prefixes: list[list[int]]) -> int:
            count = 0
            for first in range(0, len(prefixes), spec.shard_size):
                shard = prefixes[first : first + spec.shard_size]
                numbers = range(first, first + len(shard))
                known = range(model.config.vocab_size)
                written = engine.write(
                    shard, numbers, [], known, sampling=sampling, seqlen=spec.seqlen, seed=0
                )
                count += sum(map(len, written))
            return count

        return generate

    def as_the_script(prefixes: list[list[int]]) -> int:
        settings = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            max_new_tokens=spec.seqlen - len(prefixes[0]),
            pad_token_id=0,
        )
        count = 0
        for first in range(0, len(prefixes), SCRIPT_BATCH):
            batch = torch.tensor(prefixes[first : first + SCRIPT_BATCH], device=model.device)
            written = model.generate(batch, generation_config=settings)
            count += written.numel() - batch.numel()
        return count

    yield "script", as_the_script
    for name, engine in engines.items():
        yield name, by_engine(engine)


def main(
    samples: Annotated[int, typer.Option(min=1)] = 128,
    tokens: Annotated[int, typer.Option(min=8, help="In each sample, with its prefix.")] = 512,
    shard_size: Annotated[int, typer.Option(min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for all ways.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Of each way; the fastest counts.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Compare the tokens per second of vLLM, transformers and the paper's script."""
    keep_freed_memory()
    geometry = replace(TESTBED, seqlen=tokens)
    model = geometry.model(default_device(), getattr(torch, dtype))
    random = np.random.default_rng(0)
    prefixes = random.integers(3, model.config.vocab_size, (samples, 2)).tolist()
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        spec = GenerateSpec(
            model=LocalModel.model_validate({"path": folder, "dtype": dtype}),
            prefixes=TestbedCorpus(mixture={"facts": 1.0}),
            num_samples=samples,
            seqlen=tokens,
            shard_size=shard_size,
            backend=Vllm(enforce_eager=default_device().type == "cpu"),
        )
        contenders = dict(ways(spec, model))
        for generate in contenders.values():
            generate(prefixes[:2])  # first calls allocate and compile
        for _ in range(rounds):
            for name, generate in contenders.items():
                started = time.perf_counter()
                written = generate(prefixes)
                rate = written / (time.perf_counter() - started)
                assert written == samples * (tokens - 2)
                rates[name] = max(rate, rates.get(name, 0.0))
    table = Table("way", "tokens/s", "times the script")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / rates['script']:.2f}")
    Console(width=100).print(table)
    write_json(output, {**machine(model.device, model.dtype), "tokens_per_second": rates})


if __name__ == "__main__":
    typer.run(main)
