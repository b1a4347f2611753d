"""Scores of samples: how likely a model finds the generated tokens, and how much they repeat."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.errors import NonFiniteError
from pipeline.generation.shards import join_shards, shard_samples
from pipeline.models.batching import length_batches
from pipeline.models.loading import check_shared_vocabulary, opened
from pipeline.models.memory import ModelMemory
from pipeline.models.nonfinite import nonfinite_error
from pipeline.models.output_layer import MOST_NATS, OutputLayer, check_causal, joined
from pipeline.models.streaming import is_streamed
from pipeline.models.weight_files import unexpected_tensors
from pipeline.progress import report
from pipeline.scoring.mean_states import mean_states
from pipeline.specs import MIN_K_FRACTION, SCORE_BATCH_TOKENS, ScoreSpec
from pipeline.stage import Artifacts, Latest

LEAST_DEVIATION = 1e-4
"""Floor of sigma; below it log-probabilities differ only by their float32 rounding."""

LEAST_LOGIT = -80.0
"""Floor of logits minus their maximum, in mu and sigma. exp(-80) is nothing beside the maximum's 1,
but -inf times its probability of 0 would be NaN, and numbers below 1e-38 are slow."""

QUARTERS = 4
"""Parts of a sample with a mean loss each."""

_chunked: Latest[bool] = Latest()


class Score(NamedTuple):
    """The scores of a sample; None where it has too few scored tokens."""

    tokens: int
    """Number of scored tokens."""

    perplexity: float | None = None
    """exp(-mean log p)."""

    min_k: float | None = None
    """Min-K%: mean of the lowest floor(k * n) log p, at least one (arXiv 2310.16789)."""

    min_k_plus_plus: float | None = None
    """The same of z = (log p - mu) / sigma (arXiv 2404.02936). Higher values of both mean that the
    text is likelier to have been in the training data."""

    loss_1: float | None = None
    """Mean of -log p in the first quarter; quarter i ends before token floor(n / 4 * i)."""

    loss_2: float | None = None
    loss_3: float | None = None
    loss_4: float | None = None

    distinct_1: float | None = None
    """Different tokens as a share of all (arXiv 1510.03055); 1 minus it is repetition."""

    distinct_2: float | None = None
    """The same of runs of two tokens."""

    distinct_3: float | None = None


SCORES_SCHEMA = pa.schema(
    {
        "sample_id": pa.int64(),
        **{name: pa.int64() if name == "tokens" else pa.float64() for name in Score._fields},
    }
)

STATES = pa.field("hidden_states", pa.list_(pa.float32()))
"""The column of mean hidden states, if they are asked for."""


class TokenScores(NamedTuple):
    """log p and z = (log p - mu) / sigma of each scored token, both [tokens] float32."""

    log_probability: torch.Tensor
    normalised: torch.Tensor


def run_shard(
    spec: ScoreSpec, index: int, artifacts: Artifacts, output: Path, **memory: Any
) -> dict[str, Any]:
    """Score one shard of samples and write `scores.parquet`.

    Args:
        memory: fields of `pipeline.models.memory.ModelMemory`.

    Raises:
        InputError: if the scorer reads the ids as other tokens than the samples' model, or is not
            causal.
        NonFiniteError: if a score is NaN or infinite.
    """
    model = opened(spec.model, artifacts, ModelMemory(**memory))
    chunked = _chunked.get(spec.key, lambda: _check_scorer(spec, model, artifacts))
    numbers = shard_samples(spec.samples, index)
    samples = pq.read_table(
        artifacts[spec.samples_of(index).key] / "samples.parquet",
        columns=["sample_id", "prefix_tokens", "token_ids"],
        filters=[("sample_id", ">=", numbers.start), ("sample_id", "<", numbers.stop)],
    ).sort_by("sample_id")
    texts = samples["token_ids"].to_pylist(), samples["prefix_tokens"].to_pylist()
    options: dict[str, Any] = {
        "include_prefix": spec.include_prefix,
        "chunked": chunked,
        "name": lambda place: f"sample {samples['sample_id'][place]}",
    }
    columns, schema = {"sample_id": samples["sample_id"]}, SCORES_SCHEMA
    if spec.hidden_states:
        scores, columns[STATES.name] = score_with_states(model, *texts, **options)
        schema = schema.append(STATES)
    else:
        scores = score_samples(model, *texts, **options)
    table = pa.table(
        {**columns, **score_columns(scores)},
        schema=schema.with_metadata({"logits": "chunked" if chunked else "full"}),
    )
    pq.write_table(table, output / "scores.parquet")
    streamed = {"streamed": True} if is_streamed(model) else {}
    return {**_report(table), **unexpected_tensors(model), **streamed}


def _check_scorer(spec: ScoreSpec, model: Any, artifacts: Artifacts) -> bool:
    """Check that the scorer may score these samples; return whether its logits can be chunked."""
    check_shared_vocabulary("scorer", spec.model, spec.model, spec.samples.model, artifacts)
    check_causal(model)
    return OutputLayer(model).chunked


def run(spec: ScoreSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Join the shards into one `scores.parquet`, sorted by sample_id."""
    return _report(join_shards(spec.shards(), artifacts, output, "scores.parquet"))


def score_columns(scores: Sequence[Score]) -> dict[str, list[Any]]:
    """Return the scores as columns."""
    return {name: [getattr(score, name) for score in scores] for name in Score._fields}


def _report(table: pa.Table) -> dict[str, Any]:
    known = table["perplexity"].drop_null().to_numpy()
    return {
        "samples": len(table),
        "tokens": int(table["tokens"].to_numpy().sum()),
        "invalid": len(table) - len(known),
        "median_perplexity": float(np.median(known)) if len(known) else None,
        "logits": table.schema.metadata[b"logits"].decode(),
    }


@torch.inference_mode()
def score_samples(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    prefix_lengths: Sequence[int],
    *,
    include_prefix: bool = False,
    min_k_fraction: float = MIN_K_FRACTION,
    batch_tokens: int = SCORE_BATCH_TOKENS,
    chunked: bool | None = None,
    name: Callable[[int], str] = "sample {}".format,
) -> list[Score]:
    """Score each sample over the tokens after its prefix.

    The first token of a sample is never scored, since nothing precedes it.

    Args:
        token_ids: the ids of each sample, prefix first.
        prefix_lengths: the number of given ids of each sample.
        include_prefix: score the given ids too.
        min_k_fraction: share of the least likely tokens that Min-K% and Min-K%++ average over.
        batch_tokens: most tokens of a forward pass, padding included; one sample may have more.
        chunked: take logits a few positions at a time from hidden states; None checks whether the
            model allows it.
        name: returns what errors call the sample at a place.

    Raises:
        NonFiniteError: if a score is NaN or infinite.
    """
    firsts = [first_scored(prefix, include_prefix) for prefix in prefix_lengths]
    layer = OutputLayer(model, chunked)
    return _score(model, layer, token_ids, firsts, min_k_fraction, batch_tokens, name)


@torch.inference_mode()
def score_with_states(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    prefix_lengths: Sequence[int],
    *,
    include_prefix: bool = False,
    batch_tokens: int = SCORE_BATCH_TOKENS,
    chunked: bool | None = None,
    name: Callable[[int], str] = "sample {}".format,
) -> tuple[list[Score], list[list[float] | None]]:
    """Score each sample as `score_samples` does, and take its mean hidden states meanwhile.

    Returns:
        The scores, and the means over the scored tokens, [layers * WIDTH] each in float32; None for
        a sample without such a token.

    Raises:
        InputError: if the model has no list of decoder layers.
        NonFiniteError: if a score or a mean is NaN or infinite.
    """
    firsts = [first_scored(prefix, include_prefix) for prefix in prefix_lengths]
    layer = OutputLayer(model, chunked)
    states: list[list[float] | None] = [None] * len(token_ids)
    scores = _score(model, layer, token_ids, firsts, MIN_K_FRACTION, batch_tokens, name, states)
    return scores, states


def first_scored(prefix_tokens: int, include_prefix: bool) -> int:
    """Return the first token that is scored of a sample with so many given ids."""
    return 1 if include_prefix else max(1, prefix_tokens)


def _score(
    model: Any,
    layer: OutputLayer,
    token_ids: Sequence[Sequence[int]],
    firsts: Sequence[int],
    min_k_fraction: float,
    batch_tokens: int,
    name: Callable[[int], str],
    states: list[list[float] | None] | None = None,
) -> list[Score]:
    """Score each sample from the token in `firsts` on; fill in `states` if they are given."""
    lengths = [len(ids) for ids in token_ids]
    scored = [place for place, first in enumerate(firsts) if lengths[place] > first]
    scored.sort(key=lengths.__getitem__)
    scores = [Score(0)] * len(token_ids)
    done, total = 0, sum(lengths[place] for place in scored)
    tokens_at_once = layer.batch_tokens(batch_tokens)
    batches = list(length_batches(scored, lengths, tokens_at_once, layer.lengths))
    texts = [[(token_ids[place], firsts[place]) for place in batch] for batch in batches]
    watch: contextlib.AbstractContextManager[list[list[torch.Tensor]]] = contextlib.nullcontext([])
    if states is not None:
        spans = [[(first, len(ids)) for ids, first in batch] for batch in texts]
        watch = mean_states(model, spans)
    with contextlib.ExitStack() as watching:
        means = watching.enter_context(watch)

        def broken(place: int) -> NonFiniteError:
            watching.close()  # the text is read once more
            return nonfinite_error(name(place), model, token_ids[place])

        for number, tokens in enumerate(token_scores(layer, texts)):
            batch = batches[number]
            for place, own in zip(batch, tokens, strict=True):
                if not all(values.sum().isfinite() for values in own):
                    raise broken(place)
                loss = -float(own.log_probability.double().mean())
                if loss > MOST_NATS:
                    remedy = f"a loss of {loss:g} has no finite perplexity"
                    raise NonFiniteError(f"{name(place)}: {remedy}")
                scores[place] = summary(own, token_ids[place][firsts[place] :], min_k_fraction)
            if states is not None:
                for place, own_states in zip(batch, torch.cat(means[number], dim=1), strict=True):
                    if not own_states.isfinite().all():
                        raise broken(place)
                    states[place] = own_states.tolist()
            done += sum(lengths[place] for place in batch)
            report(done, total, "tokens")
    return scores


def summary(tokens: TokenScores, token_ids: Sequence[int], min_k_fraction: float) -> Score:
    """Return the score of a sample from the scores and ids of its tokens, at least one."""
    log_probability = tokens.log_probability.double()
    count = len(log_probability)
    lowest = max(1, math.floor(min_k_fraction * count))
    edges = [part * count // QUARTERS for part in range(QUARTERS + 1)]
    quarters = [log_probability[start:end] for start, end in itertools.pairwise(edges)]
    return Score(
        count,
        float((-log_probability.mean()).exp()),
        float(log_probability.sort().values[:lowest].mean()),
        float(tokens.normalised.double().sort().values[:lowest].mean()),
        *(-float(part.mean()) if len(part) else None for part in quarters),
        *(distinct(token_ids, length) for length in (1, 2, 3)),
    )


def distinct(token_ids: Sequence[int], length: int) -> float | None:
    """Return the different runs of `length` tokens as a share of all; None without a run."""
    runs = [tuple(token_ids[at : at + length]) for at in range(len(token_ids) - length + 1)]
    return len(set(runs)) / len(runs) if runs else None


_Texts = Sequence[tuple[Sequence[int], int]]
"""The token ids of each sample of a batch, and its first token that is scored, at least 1."""


def token_scores(layer: OutputLayer, batches: Sequence[_Texts]) -> Iterator[list[TokenScores]]:
    """Yield for each batch the scores of each sample's tokens."""
    states = layer.states(map(_inputs, batches))
    for texts, own in zip(batches, states, strict=True):
        yield _token_scores(layer, texts, own)


def _inputs(texts: _Texts) -> dict[str, torch.Tensor]:
    """Return samples padded on the right, where causal attention does not look, and their mask."""
    longest = max(len(ids) for ids, _ in texts)
    lengths = torch.tensor([len(ids) for ids, _ in texts])
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in texts])
    mask = torch.arange(longest) < lengths[:, None]
    return {"input_ids": padded, "attention_mask": mask.long()}


def _token_scores(layer: OutputLayer, texts: _Texts, states: torch.Tensor) -> list[TokenScores]:
    inputs = _inputs(texts)
    padded, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    firsts = torch.tensor([first for _, first in texts])
    wanted = mask & (torch.arange(padded.shape[1]) >= firsts[:, None])
    rows, columns = wanted.nonzero(as_tuple=True)
    targets = padded[rows, columns].to(states.device)

    def scored(part: slice, logits: torch.Tensor) -> TokenScores:
        return position_scores(logits, targets[part])

    parts = itertools.starmap(scored, layer.logits(states, rows, columns - 1))
    by_token = joined(parts, len(rows))
    counts = wanted.sum(dim=1).tolist()
    by_text = (torch.split(each.cpu(), counts) for each in by_token)
    return [TokenScores(*each) for each in zip(*by_text, strict=True)]


def position_scores(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Score `targets` [positions] under `logits` [positions, vocabulary] in float32.

    Overwrites the logits. The variance is taken around the mean: the mean of squares minus the
    square of the mean would lose its digits where one token is likely and all others are equal.
    """
    logits -= logits.amax(dim=-1, keepdim=True)
    own = logits.gather(1, targets[:, None])
    logits.clamp_(min=LEAST_LOGIT)
    weights = logits.exp()  # probabilities times their sum
    total = weights.sum(dim=-1, keepdim=True)
    mean = (weights * logits).sum(dim=-1, keepdim=True) / total
    logits -= mean
    variance = weights.mul_(logits).mul_(logits).sum(dim=-1, keepdim=True) / total
    normalised = (own - mean) / variance.sqrt().clamp(min=LEAST_DEVIATION)
    return TokenScores((own - total.log()).squeeze(1), normalised.squeeze(1))
