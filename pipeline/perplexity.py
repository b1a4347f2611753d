"""Perplexity on a corpus: exp of the mean loss over non-overlapping windows of its joined text."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.windows import Tokens, at_most

LOGITS = 2**28
"""Logits of one forward pass at the most (half a GiB in bfloat16), unless one window has more."""

POSITIONS = 1024
"""Positions whose log-probabilities are held in float32 at once."""


class Perplexity(NamedTuple):
    """A perplexity, its standard error over windows, and how many there were."""

    value: float
    stderr: float | None
    windows: int


def perplexity(model: Any, token_ids: torch.Tensor, batch_size: int) -> Perplexity:
    """exp of the mean over windows of the mean loss of the `seqlen - 1` predictions.

    `token_ids` is [windows, seqlen]. Losses are taken in float32 and summed in float64. The
    standard error is that of the mean loss times the perplexity (delta method), None of one window.
    """
    losses = window_losses(model, token_ids, batch_size)
    value = float(losses.mean().exp())
    if len(losses) == 1:
        return Perplexity(value, None, 1)
    stderr = value * float(losses.std()) / math.sqrt(len(losses))
    return Perplexity(value, stderr, len(losses))


@torch.inference_mode()
def window_losses(model: Any, token_ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The mean loss of each window, [windows] float64, for `token_ids` [windows, seqlen].

    A forward pass takes fewer windows than `batch_size` where their logits would not fit.
    """
    logits_per_window = token_ids.shape[1] * model.config.get_text_config().vocab_size
    rows = max(1, min(batch_size, LOGITS // logits_per_window))
    return torch.cat([_mean_losses(model, batch) for batch in torch.split(token_ids, rows)])


def _mean_losses(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    token_ids = token_ids.to(model.device)
    logits = model(token_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = token_ids[:, 1:].flatten()
    losses = [
        torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
        for part, target in zip(
            torch.split(logits, POSITIONS), torch.split(targets, POSITIONS), strict=True
        )
    ]
    return torch.cat(losses).cpu().double().view(len(token_ids), -1).mean(dim=1)


def joined_windows(texts: Iterable[Tokens], seqlen: int, max_windows: int) -> torch.Tensor:
    """The texts' ids one after the other in windows without a gap, [windows, seqlen] int64.

    Reads no more texts than `max_windows` need; a rest shorter than a window is dropped.

    Raises:
        InputError: if there is not one whole window.
    """
    taken = [text.ids for text in at_most(texts, max_windows * seqlen)]
    ids = np.concatenate(taken).astype(np.int64) if taken else np.empty(0, dtype=np.int64)
    windows = min(max_windows, len(ids) // seqlen)
    if windows == 0:
        remedy = f"the corpus has {len(ids)} tokens, less than one window: lower seqlen"
        raise InputError("seqlen", seqlen, remedy)
    return torch.from_numpy(ids[: windows * seqlen]).view(windows, seqlen)
