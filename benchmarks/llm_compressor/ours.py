"""Prune a model with calprune, and report the CPU time; the counterpart of `theirs.py`.

Run it as `python -m benchmarks.llm_compressor.ours`.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.measure import pruner_spec
from cluster.heap import keep_freed_memory
from pipeline.models.loading import load_model
from pipeline.pruning.allocation import LayerTarget
from pipeline.pruning.prune import prune_model
from pipeline.specs import LocalModel, Uniform


def main(
    model: Annotated[Path, typer.Option(help="Folder of a checkpoint.")],
    windows: Annotated[Path, typer.Option(help=".npy of token ids [nsamples, seqlen].")],
    pruner: Annotated[str, typer.Option(help="wanda or sparsegpt.")],
    output: Annotated[Path, typer.Option(help="JSON file.")],
    pattern: Annotated[str | None, typer.Option(help="Such as 2:4; unset, half of each row.")] = (
        None
    ),
) -> None:
    """Prune half of the weights on one thread, and write the CPU seconds that it took."""
    keep_freed_memory()  # as every stage does
    torch.set_num_threads(1)
    loaded = load_model(LocalModel(path=str(model), dtype="float32"), {}, torch.device("cpu"))
    ids = torch.from_numpy(np.load(windows))  # [nsamples, seqlen]
    target = LayerTarget.parse(0.5, pattern)
    start = time.process_time()
    report = prune_model(loaded, ids, pruner_spec(pruner), target, Uniform())
    seconds = time.process_time() - start
    output.write_text(json.dumps({"cpu_seconds": seconds, "sparsity": report.sparsity}))


if __name__ == "__main__":
    typer.run(main)
