"""A pruned model beside its dense one: how far its predictions are from the dense model's.

Both say more than accuracy, which hides answers that change both ways (arXiv 2407.09141).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from pipeline.evaluation.perplexity import ScoredWindow, scored_logits, summed_by_window
from pipeline.models.output_layer import OutputLayer, joined


class Compared(NamedTuple):
    """Sums over a window's scored tokens."""

    loss: float
    """The pruned model's loss, in nats."""
    kl: float
    """KL divergence of the pruned model's predictions from the dense model's, in nats."""
    top_token_changes: float
    """Tokens for which the two models have another most likely token."""


@torch.inference_mode()
def compare_with_dense(
    pruned: OutputLayer, dense: OutputLayer, batched: Sequence[list[ScoredWindow]]
) -> Iterator[list[Compared]]:
    """Compare the predictions of two models for each scored token; yield for each batch the sums of
    each window.

    The divergence is the sum over the vocabulary of p (log p - log q), where p is the dense
    model's probability and q the pruned one's: in float32 for each token, to about 1e-6 nats, and
    summed in float64.
    Logits are taken in parts, `[part, vocabulary]`, of both models at a time. If decoder layers are
    in files, the pruned model's states of all batches wait until the dense model has its own.
    """
    both = zip(scored_logits(pruned, batched), scored_logits(dense, batched), strict=True)
    for batch, (own, theirs) in zip(batched, both, strict=True):
        by_token = joined(map(_compared, own, theirs), sum(window.scored for window in batch))
        sums = (summed_by_window(each, batch) for each in by_token)
        yield [Compared(*each) for each in zip(*sums, strict=True)]


_Part = tuple[torch.Tensor, torch.Tensor]
"""Logits `[part, vocabulary]`, and the token ids `[part]` that they predict."""


def _compared(own: _Part, theirs: _Part) -> tuple[torch.Tensor, ...]:
    """Return the fields of `Compared` of each token, `[part]`."""
    (logits, targets), (dense_logits, _) = own, theirs
    changes = logits.argmax(dim=-1) != dense_logits.argmax(dim=-1)
    log_q = torch.log_softmax(logits, dim=-1)
    log_p = torch.log_softmax(dense_logits, dim=-1)
    losses = -log_q.gather(1, targets[:, None])[:, 0]
    return losses, (log_p - log_q).mul_(log_p.exp()).sum(dim=-1), changes
