"""Prune one model with the same windows by llm-compressor and calprune, each in a new process."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.targets import Target

FASTER_THAN_LLM_COMPRESSOR: dict[tuple[str, str | None], float] = {
    ("wanda", None): 1.5,
    ("sparsegpt", None): 2.0,
    ("sparsegpt", "2:4"): 2.0,
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
        RuntimeError: if either does not prune half of the weights.
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
            runs = [
                (_run([str(python), str(THEIRS), *options, *batch]), _run([*ours, *options]))
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
    return found


def _run(command: list[str]) -> dict[str, float]:
    """Run a process, and return what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        process = subprocess.run(
            [*command, "--output", str(output)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode:
            print(process.stdout, file=sys.stderr)
            process.check_returncode()
        result: dict[str, float] = json.loads(output.read_text())
    if abs(result["sparsity"] - 0.5) > 1e-3:
        raise RuntimeError(
            f"{command[1]} left {result['sparsity']:.4f} of the weights zero, not 0.5"
        )
    return result
