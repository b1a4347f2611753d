"""Measure calprune on a real language model: `python -m benchmarks.real`.

It prints which targets are met. Each target is a ratio of two ways, measured in turns in one run on
one thread; docs/benchmarks.md describes the ways.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.llm_compressor.compare import compare_cpu_seconds
from benchmarks.makespan import measure_makespan
from benchmarks.real_model import (
    PREFIX,
    measure_bfloat16,
    measure_generation,
    measure_reconstruction,
    measure_scoring,
    on_cpu,
    real_windows,
)
from benchmarks.real_vllm import measure_vllm
from benchmarks.record import machine, write_json
from benchmarks.tables import targets_table
from benchmarks.targets import Target
from pipeline.models.heap import keep_freed_memory
from pipeline.real.prepare import DISCLOSURE, REAL_FOLDER

_MODEL = Path(REAL_FOLDER, "model")

_SEQLEN = 256
"""Tokens in a window, and in a sample."""

_SAMPLES = 40
"""Samples in the generated batch."""

_WINDOWS = 32
"""Windows that both prune with in the comparison with llm-compressor."""

logger = logging.getLogger("benchmarks")


@dataclass(frozen=True)
class RealReport:
    """All that was measured in one run."""

    machine: dict[str, Any]
    model: str
    targets: list[Target]


def measure_model(folder: Path, model: Any, samples: int, seqlen: int) -> list[Target]:
    """Measure what needs only a model.

    Args:
        folder: the model's checkpoint.
        model: loaded in the type that stages use.
        samples: in the generated batch; the other measurements take a fifth of them.
        seqlen: tokens in a sample.
    """
    windows = real_windows(AutoTokenizer.from_pretrained(folder), samples, seqlen)
    prefixes = windows[:, :PREFIX].tolist()
    few = max(1, samples // 5)
    logger.info("generation")
    found = measure_generation(model, prefixes, seqlen, rounds=2)
    logger.info("vLLM")
    found += measure_vllm(folder, prefixes[:few], seqlen // 4, rounds=1)
    logger.info("scoring")
    found += measure_scoring(model, windows[:few], rounds=3)
    logger.info("reconstruction")
    found += measure_reconstruction(folder, windows[:few], rounds=2)
    logger.info("Wanda in bfloat16")
    found += measure_bfloat16(folder, windows[:few], rounds=2)
    return found


def main(
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = _MODEL,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
    llm_compressor: Annotated[
        Path | None,
        typer.Option(help="Python of llm-compressor's environment: compare with it too."),
    ] = None,
    makespan: Annotated[
        str | None, typer.Option(help="Store of a finished run on this machine: judge it too.")
    ] = None,
) -> None:
    """Print which targets are met. With the defaults it takes 8 minutes on two idle cores."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    if not (model / "config.json").is_file():
        remedy = "holds no checkpoint: run `python -m jobs prepare`, or name another folder"
        raise typer.BadParameter(f"--model: {str(model)!r} {remedy}")
    keep_freed_memory()  # as every stage does
    torch.set_num_threads(1)
    found = []
    if makespan is not None:
        try:
            found.append(measure_makespan(makespan))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    loaded = on_cpu(model)
    found += measure_model(model, loaded, _SAMPLES, _SEQLEN)
    if llm_compressor is not None:
        logger.info("llm-compressor")
        tokenizer = AutoTokenizer.from_pretrained(model)
        windows = real_windows(tokenizer, _WINDOWS, _SEQLEN)
        found += compare_cpu_seconds(llm_compressor, model, windows, rounds=2)
    measured = f"{model}: {DISCLOSURE}" if model == _MODEL else str(model)
    report = RealReport(machine(torch.device("cpu"), loaded.dtype), measured, found)
    console = Console(width=100)
    console.print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    console.print(report.model)
    console.print(targets_table(report.targets))
    write_json(output, report)


if __name__ == "__main__":
    typer.run(main)
