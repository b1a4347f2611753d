"""Measure how fast text is generated: `python -m benchmarks.generate`.

Three ways go on from the same prefixes with the same model to the same length, taking turns in one
run: vLLM, our batches on transformers, and the manner of the paper's script, `generate` with
batches of 32. The model has the shape of the testbed's `small`, random weights, and no EOS.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from cluster.heap import keep_freed_memory
from pipeline.generation.sampling import Sampling
from pipeline.generation.transformers_engine import TransformersEngine
from pipeline.generation.vllm_engine import VllmEngine, vllm_version
from pipeline.models.loading import default_device
from pipeline.specs import GenerateSpec, LocalModel, TestbedCorpus, Vllm
from pipeline.testbed.presets import PRETRAIN_PRESETS

SCRIPT_BATCH = 32
"""Samples of a batch in the paper's script."""

Generate = Callable[[list[list[int]]], int]
"""Goes on from prefixes and tells how many tokens it wrote."""


def small_model(seqlen: int) -> LlamaForCausalLM:
    """The testbed's `small` shape with random weights, for texts of `seqlen` tokens."""
    shape = PRETRAIN_PRESETS["small"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.hidden_size // shape.head_dim,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=seqlen,
        initializer_range=shape.hidden_size**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def ways(spec: GenerateSpec, model: Any) -> Iterator[tuple[str, Generate]]:
    """Each way under its name; vLLM only where it is installed."""
    sampling = Sampling()
    engines: dict[str, Any] = {"transformers": TransformersEngine(model)}
    if vllm_version() is not None:
        engines["vllm"] = VllmEngine(spec, {})

    def by_engine(engine: Any) -> Generate:
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
    tokens: Annotated[int, typer.Option(min=8, help="Of a sample, the prefix included.")] = 512,
    shard_size: Annotated[int, typer.Option(min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for all ways.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Turns; the best counts.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Compare tokens per second of vLLM, of transformers, and of the script's manner."""
    keep_freed_memory()
    model = small_model(tokens).to(getattr(torch, dtype)).to(default_device())
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
    table = Table("way", "tokens/s", "times the script's manner")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / rates['script']:.2f}")
    Console(width=100).print(table)
    if output is not None:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": dtype}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**machine, "tokens_per_second": rates}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
