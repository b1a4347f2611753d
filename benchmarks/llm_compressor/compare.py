"""Prune or round one model on the same windows by llm-compressor and calprune, in turns, each in a
new process."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.targets import Target
from pipeline.models.loading import load_model
from pipeline.specs import LocalModel

FASTER_THAN_LLM_COMPRESSOR: dict[tuple[str, str | None], float] = {
    ("wanda", None): 1.5,
    ("sparsegpt", None): 2.0,
    ("sparsegpt", "2:4"): 2.0,
    ("gptq", None): 1.5,
}
"""Targets by pruner and pattern: llm-compressor's CPU time over ours."""

THEIRS = Path(__file__).with_name("theirs.py")

BATCH_SIZE = 1
"""Windows in a forward pass: llm-compressor's default; with 8 it is no faster."""


def compare_cpu_seconds(python: Path, model: Path, windows: Tensor, rounds: int) -> list[Target]:
    """Compare the CPU seconds of llm-compressor and calprune, by the medians of rounds in turns.

    Args:
        python: of an environment made from `requirements.txt` in this folder.
        model: folder of a checkpoint.
        windows: token ids `[nsamples, seqlen]`.

    Raises:
        RuntimeError: if either does not prune half of the weights where it should.
        subprocess.CalledProcessError: if a process fails; its output has been printed.
    """
    ours = [sys.executable, "-m", "benchmarks.llm_compressor.ours"]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder, "windows.npy")
        np.save(ids, windows.numpy())
        for (pruner, pattern), wanted in FASTER_THAN_LLM_COMPRESSOR.items():
            options = ["--model", str(model), "--windows", str(ids), "--pruner", pruner]
            options += [] if pattern is None else ["--pattern", pattern]
            batch = ["--batch-size", str(BATCH_SIZE)]
            weights = {side: Path(folder, f"{side}.safetensors") for side in ("theirs", "ours")}
            runs = [
                (
                    _run([str(python), str(THEIRS), *options, *batch], pruner, weights["theirs"]),
                    _run([*ours, *options], pruner, weights["ours"]),
                )
                for _ in range(rounds)
            ]
            theirs = statistics.median(each["cpu_seconds"] for each, _ in runs)
            own = statistics.median(each["cpu_seconds"] for _, each in runs)
            floor = statistics.median(each["floor_seconds"] for _, each in runs)
            name = pruner if pattern is None else f"{pruner} {pattern}"
            found += [
                Target(f"{name}: CPU seconds", None, own),
                Target(f"{name}: llm-compressor's CPU seconds", None, theirs),
                Target(f"{name}: times llm-compressor", wanted, theirs / own),
                Target(f"{name}: the same if it were matrix products alone", None, theirs / floor),
            ]
            if pruner == "gptq":
                ratios = error_ratios(model, windows, weights["theirs"], weights["ours"])
                found += [
                    Target(f"{name}: llm-compressor's output error over ours", 0.98, ratios[1]),
                    Target(f"{name}: the same, the lowest of a matrix", None, ratios[0]),
                    Target(f"{name}: the same, the highest of a matrix", None, ratios[2]),
                ]
    return found


def error_ratios(
    model: Path, windows: Tensor, theirs: Path, ours: Path
) -> tuple[float, float, float]:
    """Return their squared change of a matrix's outputs over ours, at the inputs of the dense
    model: lowest, median and highest of all matrices."""
    dense = load_model(LocalModel(path=str(model), dtype="float32"), {}, torch.device("cpu"))
    changed = {"theirs": load_file(theirs), "ours": load_file(ours)}
    errors: dict[str, list[float]] = {side: [] for side in changed}

    def measure(name: str, matrix: nn.Linear, inputs: Tensor) -> None:
        products = inputs.flatten(0, -2).T @ inputs.flatten(0, -2)
        for side, weights in changed.items():
            change = weights[name] - matrix.weight
            errors[side].append(float((change @ products * change).sum()))

    for name in changed["ours"]:
        matrix = dense.get_submodule(name)
        matrix.register_forward_hook(
            lambda module, inputs, _, name=name: measure(name, module, inputs[0])
        )
    with torch.inference_mode():
        dense(windows, use_cache=False, logits_to_keep=1)
    ratios = np.divide(errors["theirs"], errors["ours"])
    return float(ratios.min()), float(np.median(ratios)), float(ratios.max())


def _run(command: list[str], pruner: str, weights: Path) -> dict[str, float]:
    """Run a process that writes the weights, and return what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        process = subprocess.run(
            [*command, "--weights", str(weights), "--output", str(output)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode:
            print(process.stdout, file=sys.stderr)
            process.check_returncode()
        result: dict[str, float] = json.loads(output.read_text())
    if pruner != "gptq" and abs(result["sparsity"] - 0.5) > 1e-3:
        raise RuntimeError(
            f"{command[1]} left {result['sparsity']:.4f} of the weights zero, not 0.5"
        )
    return result
