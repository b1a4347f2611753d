"""Prune or round a model with calprune, and report the CPU time; the counterpart of `theirs.py`.

It reports the time that the matrix products alone need as well (`benchmarks.floor`).

Run it as `python -m benchmarks.llm_compressor.ours`.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file

from benchmarks.floor import floating_point_operations, layer_products
from benchmarks.geometry import Geometry
from benchmarks.measure import pruner_spec
from benchmarks.timing import best_of
from pipeline.models.heap import keep_freed_memory
from pipeline.models.loading import load_model
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.prune import prune_model
from pipeline.specs import GPTQ, LocalModel

_RATE_SECONDS = 5.0
"""For which the rate of products is measured. The best one counts: a floor must not be too high."""


def main(
    model: Annotated[Path, typer.Option(help="Folder of a checkpoint.")],
    windows: Annotated[Path, typer.Option(help=".npy of token ids [nsamples, seqlen].")],
    pruner: Annotated[str, typer.Option(help="wanda, sparsegpt or gptq.")],
    output: Annotated[Path, typer.Option(help="JSON file.")],
    weights: Annotated[Path, typer.Option(help="safetensors file.")],
    pattern: Annotated[str | None, typer.Option(help="Such as 2:4; unset, half of each row.")] = (
        None
    ),
) -> None:
    """Prune half of the weights, or round all to 4 bits, on one thread, and write the CPU seconds
    that it took."""
    keep_freed_memory()  # as every stage does
    torch.set_num_threads(1)
    loaded = load_model(LocalModel(path=str(model), dtype="float32"), {}, torch.device("cpu"))
    ids = torch.from_numpy(np.load(windows))  # [nsamples, seqlen]
    rounds = pruner == "gptq"
    spec = GPTQ(group_size=64) if rounds else pruner_spec(pruner)
    target = LayerTarget.parse(0.0 if rounds else 0.5, pattern)
    start = time.process_time()
    report = prune_model(loaded, ids, spec, ModelTarget(target))
    seconds = time.process_time() - start
    modules = dict(loaded.named_modules())
    save_file({each.matrix: modules[each.matrix].weight for each in report.matrices}, weights)
    found = {
        "cpu_seconds": seconds,
        "sparsity": report.sparsity,
        "floor_seconds": floor_seconds(Geometry.of(loaded.config, *ids.shape), pruner),
    }
    output.write_text(json.dumps(found))


def floor_seconds(geometry: Geometry, pruner: str) -> float:
    """Return the seconds that the pruner's matrix products take at a decoder layer's best rate."""
    cpu = torch.device("cpu")
    operations, multiply = layer_products(geometry, cpu, torch.float32)
    seconds = best_of({"layer": lambda: multiply}, _RATE_SECONDS, cpu)["layer"]
    return floating_point_operations(geometry, pruner) * seconds / operations


if __name__ == "__main__":
    typer.run(main)
