"""Drop invalid, banned and repeated samples, then a share of the rest by a rule."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError, NonFiniteError
from pipeline.scoring.banned_words import contains_word, read_words
from pipeline.scoring.duplicates import duplicates, near_duplicates
from pipeline.scoring.score import Score, first_scored
from pipeline.scoring.selectors import Candidates, places_to_drop
from pipeline.specs import FilterOptions, FilterSpec
from pipeline.stage import Artifacts

Flags = npt.NDArray[np.bool_]
"""One flag a sample, [samples]."""


def run(spec: FilterSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Write the kept samples to `samples.parquet` and the others to `rejected.parquet`.

    Both files have the scores, if the rule reads any.

    Raises:
        InputError: if no sample is left, if the samples differ too little for the rule, or if the
            list of banned words cannot be read.
        NonFiniteError: if a perplexity is NaN or infinite.
    """
    samples = _read(artifacts[spec.scores.samples.key] / "samples.parquet")
    scores = (
        _read(artifacts[spec.scores.key] / "scores.parquet")
        if spec.reads_scores
        else _without_scores(samples, spec.scores.include_prefix)
    )
    words = [] if spec.banned_words is None else read_words(spec.banned_words.path)
    reasons = reasons_to_drop(samples, scores, spec, words, spec.seed)
    kept = reasons == ""
    for column in Score._fields:
        if column in scores.column_names:
            samples = samples.append_column(column, scores[column])
    pq.write_table(samples.filter(pa.array(kept)), output / "samples.parquet")
    rejected = samples.append_column("reason", pa.array(reasons, pa.string()))
    pq.write_table(rejected.filter(pa.array(~kept)), output / "rejected.parquet")

    def count(reason: str) -> int:
        return int((reasons == reason).sum())

    return {
        "kept": int(kept.sum()),
        "dropped": count(spec.drop_by),
        "invalid": count("invalid"),
        "banned": count("banned word"),
        "duplicates": count("duplicate"),
        "near_duplicates": count("near duplicate"),
    }


def reasons_to_drop(
    samples: pa.Table,
    scores: pa.Table,
    options: FilterOptions,
    banned_words: Sequence[str] = (),
    seed: int = 0,
) -> npt.NDArray[np.object_]:
    """Return why each sample is dropped, [samples]; "" for a kept one.

    The reasons are looked for in this order, each among the samples left: `invalid` (no token to
    score), `banned word`, `duplicate`, `near duplicate`, the name of the rule that drops a share.

    Args:
        samples: columns text, token_ids and, for `within: source`, source.
        scores: columns sample_id, perplexity and what else the rule reads of min_k_plus_plus and
            hidden_states, of the same samples in the same order; tokens will do in the place of
            perplexity where the rule reads no score.
        banned_words: words and phrases that a kept sample must not contain.
        seed: for rules that draw at random.

    Raises:
        InputError: if no sample is left, or the samples lack what the rule reads or differ too
            little for it.
        NonFiniteError: if a perplexity is NaN or infinite.
    """
    reasons = np.where(_invalid(scores), "invalid", "").astype(object)
    rules: list[tuple[str, Callable[[pa.Table], Flags]]] = []
    if banned_words:
        rules.append(
            ("banned word", lambda rows: contains_word(rows["text"].to_pylist(), banned_words))
        )
    if options.drop_duplicates:
        rules.append(("duplicate", lambda rows: duplicates(rows["token_ids"].to_pylist())))
    if (similarity := options.near_duplicate_similarity) is not None:
        rules.append(
            (
                "near duplicate",
                lambda rows: near_duplicates(rows["token_ids"].to_pylist(), similarity),
            )
        )
    for reason, rejected in rules:
        left = np.flatnonzero(reasons == "")
        reasons[left[rejected(samples.take(left))]] = reason
    left = np.flatnonzero(reasons == "")
    left = left[np.argsort(scores["sample_id"].to_numpy()[left], kind="stable")]
    candidates = Candidates.of(samples.take(left), scores.take(left))
    reasons[left[places_to_drop(candidates, options, seed)]] = options.drop_by
    if not (reasons == "").any():
        remedy = (
            f"nothing is left: of {len(reasons)} samples {len(left)} have a token to score and no "
            "other reason to go; lower drop_fraction or look at the samples"
        )
        raise InputError("drop_fraction", options.drop_fraction, remedy)
    return reasons


def _invalid(scores: pa.Table) -> Flags:
    """Return which samples have no token to score."""
    if "perplexity" not in scores.column_names:
        unscored: Flags = scores["tokens"].to_numpy() == 0
        return unscored
    perplexities = scores["perplexity"].to_numpy()
    unknown: Flags = scores["perplexity"].is_null().to_numpy()
    bad = np.flatnonzero(~np.isfinite(perplexities) & ~unknown)
    if len(bad):
        number = scores["sample_id"][int(bad[0])]
        raise NonFiniteError(f"sample {number}: its perplexity is {perplexities[bad[0]]:g}")
    return unknown


def _without_scores(samples: pa.Table, include_prefix: bool) -> pa.Table:
    """Count the tokens that a scorer would score, without scoring any."""
    firsts = [first_scored(each, include_prefix) for each in samples["prefix_tokens"].to_pylist()]
    lengths = pc.list_value_length(samples["token_ids"]).to_numpy()
    tokens = np.maximum(lengths - firsts, 0)
    return pa.table({"sample_id": samples["sample_id"], "tokens": tokens})


def _read(path: Path) -> pa.Table:
    return pq.read_table(path).sort_by("sample_id")
