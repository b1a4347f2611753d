"""Measure generation, scoring, perplexity and bfloat16 on a real model, on one thread.

Each function returns targets that are ratios: both sides do the same work in one process, in turns,
and their seconds by `benchmarks.timing.clock` are compared.
"""

import copy
import math
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.baseline.sampling import generate_plainly
from benchmarks.measure import pruner_spec
from benchmarks.targets import Target
from benchmarks.timing import clock, median_seconds
from pipeline.evaluation.perplexity import ScoredWindow, batches, losses
from pipeline.generation.decoding_attention import grouped_queries
from pipeline.generation.sampling import Sampling
from pipeline.generation.transformers_engine import TransformersEngine
from pipeline.models.loading import load_model
from pipeline.models.output_layer import OutputLayer
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.prune import prune_model
from pipeline.pruning.reconstruction import Fit
from pipeline.scoring.score import score_samples
from pipeline.specs import FirstLayers, LocalModel, Magnitude, Reconstruction

PREFIX = 2
"""Tokens that generation starts from."""

COMPARED = 32
"""Tokens of each sample that both ways of choosing a token must agree on."""

HEAD_POSITIONS = 512
"""Positions that the plain forward pass gives the output layer at once. More were no faster, and
all logits of a batch take gigabytes."""

GENERATION = 1.7
"""Times the tokens per second of a choice over the whole vocabulary."""

CHOICE = 0.15
"""The largest share of a step for choosing a token."""

SCORING = 1.4
"""The longest time of scores, and of perplexities, in forward passes."""

RECONSTRUCTION = 1.5
"""The longest time of fitting weights, in its forward passes."""

FITTED_SHARE = 0.1
"""Share of the model's layers that are fitted to measure it."""

BFLOAT16 = 1.8
"""Times the speed of Wanda in float32, on a CPU with AMX."""


def on_cpu(folder: Path, dtype: str | None = None) -> Any:
    """Load a folder's model on the CPU, by default in the spec's default type."""
    options = {} if dtype is None else {"dtype": dtype}
    spec = LocalModel.model_validate({"path": str(folder), **options})
    return load_model(spec, {}, torch.device("cpu"))


def real_windows(tokenizer: Any, nsamples: int, seqlen: int) -> Tensor:
    """Return token ids `[nsamples, seqlen]` of the standard library: text that is always there."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        if len(ids) >= nsamples * seqlen:
            break
    return torch.tensor(ids[: nsamples * seqlen]).reshape(nsamples, seqlen)


def has_amx() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices by AMX, according to Linux."""
    information = Path("/proc/cpuinfo")
    return information.exists() and "amx_bf16" in information.read_text()


def measure_generation(
    model: Any, prefixes: list[list[int]], seqlen: int, rounds: int
) -> list[Target]:
    """Compare the transformers engine with transformers' attention and a choice of each token over
    the whole vocabulary."""
    sampling = Sampling()
    engine = TransformersEngine(model)
    known = range(model.config.vocab_size)
    written: dict[str, list[list[int]]] = {}

    def ours(seqlen: int) -> None:
        written["ours"] = engine.write(
            prefixes, range(len(prefixes)), [], known, sampling=sampling, seqlen=seqlen, seed=0
        )

    def plain(seqlen: int) -> None:
        written["plain"] = generate_plainly(
            model,
            prefixes,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seqlen=seqlen,
            seed=0,
        )

    ours(PREFIX + COMPARED)  # first calls allocate
    with grouped_queries(model):  # its last bits differ from transformers' attention
        plain(PREFIX + COMPARED)
    alike = np.mean([one == other for one, other in zip(*written.values(), strict=True)])
    shares = []

    def ours_with_share() -> None:
        start = clock(model.device)
        with forward_seconds(model) as seconds:
            ours(seqlen)
        shares.append(1 - sum(seconds) / (clock(model.device) - start))

    seconds = median_seconds(
        {"plain": lambda: lambda: plain(seqlen), "ours": lambda: ours_with_share},
        rounds,
        model.device,
    )
    tokens = len(prefixes) * (seqlen - len(prefixes[0]))
    return [
        Target("generation: tokens/s", None, tokens / seconds["ours"]),
        Target(
            "generation: times the whole vocabulary", GENERATION, seconds["plain"] / seconds["ours"]
        ),
        Target(
            "generation: share of choosing a token", CHOICE, float(np.median(shares)), at_most=True
        ),
        Target("generation: share of equal samples", 1.0, float(alike)),
    ]


@contextmanager
def forward_seconds(model: Any) -> Iterator[list[float]]:
    """Collect the seconds of each forward pass."""
    seconds: list[float] = []
    before = model.register_forward_pre_hook(lambda *_: seconds.append(-clock(model.device)))

    def after(*_: object) -> None:
        seconds[-1] += clock(model.device)

    handles = (before, model.register_forward_hook(after))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def measure_scoring(model: Any, windows: Tensor, rounds: int) -> list[Target]:
    """Compare scores and losses of windows `[nsamples, seqlen]` with the plain forward pass."""
    layer = OutputLayer(model)
    texts = windows.tolist()
    whole = [ScoredWindow(np.array(ids), 1, 0, 0) for ids in texts]
    tokens = windows.numel()

    def score() -> None:
        ones = [1] * len(texts)
        score_samples(model, texts, ones, chunked=layer.chunked)

    def perplexity() -> None:
        batched = batches(whole, tokens, model.config.vocab_size)
        list(losses(layer, [[whole[place] for place in places] for places in batched]))

    contenders = {
        "forward": lambda: forward_pass(model, windows),
        "scores": lambda: score,
        "losses": lambda: perplexity,
    }
    seconds = median_seconds(contenders, rounds, model.device)
    return [
        Target("scoring: tokens/s", None, tokens / seconds["scores"]),
        Target(
            "scoring: times body and output layer",
            SCORING,
            seconds["scores"] / seconds["forward"],
            at_most=True,
        ),
        Target(
            "perplexity: times body and output layer",
            SCORING,
            seconds["losses"] / seconds["forward"],
            at_most=True,
        ),
    ]


def forward_pass(model: Any, windows: Tensor) -> Callable[[], None]:
    """Return a run of body and output layer over all positions in one batch, without any use of
    the logits."""

    @torch.inference_mode()
    def run() -> None:
        ids = windows.to(model.device)
        mask = torch.ones_like(ids)
        hidden = model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        for part in hidden.flatten(0, 1).split(HEAD_POSITIONS):
            head(part)

    return run


def measure_reconstruction(folder: Path, windows: Tensor, rounds: int) -> list[Target]:
    """Compare reconstruction in float32 with its forward passes: two, and three for each epoch,
    since the gradients of a pass take twice its products.

    The first layers alone are fitted; what their masks take is taken off.
    """
    model = on_cpu(folder, "float32")
    options = Reconstruction()
    target = ModelTarget(LayerTarget(0.5), FirstLayers(share=FITTED_SHARE))
    layers = model.model.layers
    below = copy.deepcopy(model).model
    below.layers = below.layers[: math.ceil(FITTED_SHARE * len(layers))]

    def pruning(reconstruction: Reconstruction | None) -> Callable[[], object]:
        copied = copy.deepcopy(model)
        return lambda: prune_model(
            copied,
            None,
            Magnitude(),
            target,
            fit=None if reconstruction is None else Fit(reconstruction, windows),
        )

    @torch.no_grad()
    def forward() -> None:
        for batch in torch.split(windows, options.batch_size):
            below(batch, use_cache=False)

    forward()
    contenders = {
        "masks": lambda: pruning(None),
        "fitted": lambda: pruning(options),
        "forward": lambda: forward,
    }
    seconds = median_seconds(contenders, rounds, model.device)
    floor = (2 + 3 * options.epochs) * seconds["forward"]
    ratio = (seconds["fitted"] - seconds["masks"]) / floor
    return [Target("reconstruction, in its forward passes", RECONSTRUCTION, ratio, at_most=True)]


def measure_bfloat16(folder: Path, windows: Tensor, rounds: int) -> list[Target]:
    """Compare Wanda in bfloat16 with Wanda in float32."""
    models = {dtype: on_cpu(folder, dtype) for dtype in ("float32", "bfloat16")}

    def pruning(dtype: str) -> Callable[[], object]:
        model = copy.deepcopy(models[dtype])
        return lambda: prune_model(
            model, windows, pruner_spec("wanda"), ModelTarget(LayerTarget(0.5))
        )

    contenders = {dtype: lambda dtype=dtype: pruning(dtype) for dtype in models}
    seconds = median_seconds(contenders, rounds, torch.device("cpu"))
    ratio = seconds["float32"] / seconds["bfloat16"]
    wanted = BFLOAT16 if has_amx() else None
    return [
        Target("Wanda, float32: tokens/s", None, windows.numel() / seconds["float32"]),
        Target("Wanda: bfloat16 times float32", wanted, ratio),
    ]
