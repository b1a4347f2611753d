"""Measure how fast samples are scored: `python -m benchmarks.score`.

Two ways score the same samples of mixed lengths with the same model: ours, in batches of similar
length with logits of a few positions at a time, and one text at a time with all its logits, as
published scripts do. Each has a process of its own, since peak memory is a process's. The model has
the shape of the testbed's `small` and random weights.
"""

import multiprocessing
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.geometry import TESTBED
from benchmarks.record import machine, write_json
from pipeline.models.loading import default_device
from pipeline.scoring.score import score_samples

_TARGET = 4.0
"""Times the speed of one text at a time."""

_WAYS = ("batches", "one at a time")


@torch.inference_mode()
def score_one_at_a_time(model: Any, token_ids: list[list[int]]) -> list[float]:
    """Return the perplexity of each text; compute its Min-K%++ too, with all logits at once."""
    found = []
    for ids in token_ids:
        inputs = torch.tensor([ids], device=model.device)
        output = model(inputs, labels=inputs, use_cache=False)
        log_probability = output.logits[0, :-1].float().log_softmax(dim=-1)
        probability = log_probability.exp()
        mean = (probability * log_probability).sum(dim=-1)
        variance = (probability * log_probability.square()).sum(dim=-1) - mean.square()
        own = log_probability.gather(1, inputs[0, 1:, None]).squeeze(1)
        ((own - mean) / variance.sqrt()).sort().values[: max(1, len(own) // 5)].mean().item()
        found.append(float(output.loss.exp()))
    return found


def measure_way(
    way: str, samples: int, tokens: int, vocab_size: int, rounds: int
) -> dict[str, float]:
    """Return tokens per second of the fastest round, peak bytes beyond the model, and mean
    perplexity."""
    geometry = replace(TESTBED, vocabulary=vocab_size, seqlen=tokens)
    model = geometry.model(default_device(), torch.float32)
    random = np.random.default_rng(0)
    lengths = random.integers(max(2, tokens // 8), tokens + 1, samples)
    token_ids = [random.integers(0, vocab_size, length).tolist() for length in lengths]

    def score(texts: list[list[int]]) -> list[float]:
        if way == "one at a time":
            return score_one_at_a_time(model, texts)
        scores = score_samples(model, texts, [1] * len(texts))
        return [one.perplexity for one in scores if one.perplexity is not None]

    score(token_ids[:2])  # first calls allocate
    before = _peak_bytes()
    seconds, perplexities = float("inf"), [0.0]
    for _ in range(rounds):
        started = time.perf_counter()
        perplexities = score(token_ids)
        seconds = min(seconds, time.perf_counter() - started)
    return {
        "tokens_per_second": float((lengths - 1).sum()) / seconds,
        "peak_bytes": _peak_bytes() - before,
        "perplexity": float(np.mean(perplexities)),
    }


def _peak_bytes() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main(
    samples: Annotated[int, typer.Option(min=1)] = 512,
    tokens: Annotated[int, typer.Option(min=16, help="In the longest sample.")] = 128,
    vocab_size: Annotated[int, typer.Option(min=64)] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="The fastest counts.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Compare scoring with one text at a time, by tokens per second and peak memory."""
    context = multiprocessing.get_context("spawn")
    results = {}
    for way in _WAYS:
        with context.Pool(1) as pool:
            results[way] = pool.apply(measure_way, (way, samples, tokens, vocab_size, rounds))
    values = [result["perplexity"] for result in results.values()]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)  # both did the same work
    base = results["one at a time"]["tokens_per_second"]
    table = Table("way", "tokens/s", "times one at a time", "peak MiB beyond the model")
    for way, result in results.items():
        rate, peak = result["tokens_per_second"], result["peak_bytes"] / 2**20
        table.add_row(way, f"{rate:,.0f}", f"{rate / base:.2f}", f"{peak:,.0f}")
    console = Console(width=100)
    console.print(table)
    ratio = results["batches"]["tokens_per_second"] / base
    console.print(f"target {_TARGET:g}: {'met' if ratio >= _TARGET else 'missed'}")
    here = machine(default_device(), torch.float32)
    write_json(output, {**here, "vocab_size": vocab_size, "ways": results})


if __name__ == "__main__":
    typer.run(main)
