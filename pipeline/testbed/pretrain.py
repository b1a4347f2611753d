"""Train the testbed's small Llama from scratch on a known mixture."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pipeline.progress import counted, phase
from pipeline.specs import PretrainSpec
from pipeline.stage import Artifacts
from pipeline.testbed.tokenizer import train_tokenizer
from pipeline.testbed.world import world_documents

TOKENIZER_DOCUMENTS = 1000
"""Documents of the training text that the tokenizer is trained on."""

ENCODING_BATCH = 500
"""Documents encoded at a time."""

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; then it falls linearly to zero."""

WEIGHT_DECAY = 0.1
"""AdamW's weight decay of the matrices."""


def run(spec: PretrainSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Train a model; write `model/` and `training.parquet`.

    Returns:
        The report: parameters, training tokens, and the mean loss of the last tenth of the steps.

    Raises:
        InputError: if the mixture names an unknown domain.
    """
    tokenizer = make_tokenizer(spec)
    model = initial_model(spec, tokenizer)
    windows = training_windows(spec, tokenizer)
    history = train(model, windows, spec.batch_size, spec.learning_rate)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    pq.write_table(history, output / "training.parquet")
    last = history["loss"].to_numpy()[-max(1, spec.steps // 10) :]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": windows.numel(),
        "final_loss": float(last.mean()),
    }


@phase("training the tokenizer")
def make_tokenizer(spec: PretrainSpec) -> Any:
    """Train a tokenizer on the beginning of the spec's text."""
    texts = itertools.islice(_texts(spec), TOKENIZER_DOCUMENTS)
    return train_tokenizer(texts, spec.vocab_size)


def initial_model(spec: PretrainSpec, tokenizer: Any) -> LlamaForCausalLM:
    """Return the model before training, with weights drawn by the spec's seed."""
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.hidden_size // spec.head_dim,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.seqlen,
        rms_norm_eps=1e-5,
        initializer_range=spec.hidden_size**-0.5,  # the usual 0.02 suits widths in the thousands
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


@phase("reading the text")
def training_windows(spec: PretrainSpec, tokenizer: Any) -> torch.Tensor:
    """Return the training text in shuffled windows: int64 `[steps * batch, seqlen]`.

    Documents `<s> ... </s>` are joined and cut at the ends of windows; no text is seen twice.
    """
    count = spec.steps * spec.batch_size
    texts = _texts(spec)
    pieces: list[np.ndarray] = []
    missing = count * spec.seqlen
    while missing > 0:
        batch = list(itertools.islice(texts, ENCODING_BATCH))
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(batch)
        for encoding in encodings:
            pieces.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.int64))
            missing -= len(pieces[-1])
    stream = torch.from_numpy(np.concatenate(pieces))[: count * spec.seqlen]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(spec.seed))
    return stream.view(count, spec.seqlen)[order]


def train(
    model: LlamaForCausalLM, windows: torch.Tensor, batch_size: int, learning_rate: float
) -> pa.Table:
    """Train a model in place with AdamW, in one pass over the windows `[windows, seqlen]`.

    Returns:
        A table with `step`, `loss` and `learning_rate` of each step.
    """
    steps = len(windows) // batch_size
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=learning_rate,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _slope(step, steps))
    rows = []
    model.train()
    for step, batch in enumerate(counted(torch.split(windows, batch_size), steps, "steps")):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rows.append({"step": step, "loss": loss.item(), "learning_rate": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return pa.Table.from_pylist(rows)


def _slope(step: int, steps: int) -> float:
    return min((step + 1) / (WARM_UP * steps + 1), (steps - step) / (steps * (1 - WARM_UP)))


def _texts(spec: PretrainSpec) -> Iterator[str]:
    return (text for _, text in world_documents(spec.world, spec.mixture, "train", spec.seed))
