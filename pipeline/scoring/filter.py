"""Drop invalid, banned and repeated samples, then a share of those with the highest perplexity."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, NonFiniteError
from pipeline.scoring.banned_words import contains_word, read_words
from pipeline.scoring.duplicates import duplicates, near_duplicates
from pipeline.scoring.score import Score
from pipeline.specs import FilterSpec, dropped
from pipeline.stage import Artifacts

Flags = npt.NDArray[np.bool_]
"""One flag a sample, [samples]."""


def run(spec: FilterSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Write the kept samples to `samples.parquet` and the others to `rejected.parquet`.

    Both files have the scores.

    Raises:
        InputError: if no sample is left, or if the list of banned words cannot be read.
        NonFiniteError: if a perplexity is NaN or infinite.
    """
    samples = _read(artifacts[spec.scores.samples.key] / "samples.parquet")
    scores = _read(artifacts[spec.scores.key] / "scores.parquet")
    words = [] if spec.banned_words is None else read_words(spec.banned_words.path)
    reasons = reasons_to_drop(
        samples,
        scores,
        spec.drop_fraction,
        words,
        spec.drop_duplicates,
        spec.near_duplicate_similarity,
    )
    kept = reasons == ""
    for column in Score._fields:
        samples = samples.append_column(column, scores[column])
    pq.write_table(samples.filter(pa.array(kept)), output / "samples.parquet")
    rejected = samples.append_column("reason", pa.array(reasons, pa.string()))
    pq.write_table(rejected.filter(pa.array(~kept)), output / "rejected.parquet")

    def count(reason: str) -> int:
        return int((reasons == reason).sum())

    return {
        "kept": int(kept.sum()),
        "dropped": count("perplexity"),
        "invalid": count("invalid"),
        "banned": count("banned word"),
        "duplicates": count("duplicate"),
        "near_duplicates": count("near duplicate"),
    }


def reasons_to_drop(
    samples: pa.Table,
    scores: pa.Table,
    drop_fraction: float,
    banned_words: Sequence[str],
    drop_duplicates: bool,
    near_duplicate_similarity: float | None,
) -> npt.NDArray[np.object_]:
    """Return why each sample is dropped, [samples]; "" for a kept one.

    The rules apply in this order, each to the samples left: `invalid` (no perplexity),
    `banned word`, `duplicate`, `near duplicate`, `perplexity`.

    Args:
        samples: columns text and token_ids.
        scores: columns sample_id and perplexity, of the same samples in the same order.
        drop_fraction: share to drop for its perplexity.
        banned_words: words and phrases that a kept sample must not contain.
        drop_duplicates: of samples with the same token ids keep only the first.
        near_duplicate_similarity: drop a sample with at least this Jaccard similarity to an
            earlier one.

    Raises:
        InputError: if no sample is left.
        NonFiniteError: if a perplexity is NaN or infinite.
    """
    perplexities = scores["perplexity"].to_numpy()
    unknown = scores["perplexity"].is_null().to_numpy()  # no token to score
    bad = np.flatnonzero(~np.isfinite(perplexities) & ~unknown)
    if len(bad):
        number = scores["sample_id"][int(bad[0])]
        raise NonFiniteError(f"sample {number}: its perplexity is {perplexities[bad[0]]:g}")
    reasons = np.where(unknown, "invalid", "").astype(object)
    rules: list[tuple[str, Callable[[pa.Table], Flags]]] = []
    if banned_words:
        rules.append(
            ("banned word", lambda rows: contains_word(rows["text"].to_pylist(), banned_words))
        )
    if drop_duplicates:
        rules.append(("duplicate", lambda rows: duplicates(rows["token_ids"].to_pylist())))
    if (similarity := near_duplicate_similarity) is not None:
        rules.append(
            (
                "near duplicate",
                lambda rows: near_duplicates(rows["token_ids"].to_pylist(), similarity),
            )
        )
    for reason, rejected in rules:
        left = np.flatnonzero(reasons == "")
        reasons[left[rejected(samples.take(left))]] = reason
    left = reasons == ""
    kept = keep_lowest(
        np.where(left, perplexities, np.nan), scores["sample_id"].to_numpy(), drop_fraction
    )
    reasons[left & ~kept] = "perplexity"
    return reasons


def _read(path: Path) -> pa.Table:
    return pq.read_table(path).sort_by("sample_id")


def keep_lowest(
    perplexities: npt.NDArray[np.float64],
    sample_ids: npt.NDArray[np.int64],
    drop_fraction: float,
) -> Flags:
    """Return which samples are kept for their perplexity, [samples].

    Samples without a finite perplexity are always dropped. Of the n others exactly
    floor(drop_fraction * n + 0.5) are dropped, the highest first and of equal ones the higher id.
    (The reference code keeps what lies strictly below a percentile, so ties change its count.)

    Raises:
        InputError: if no sample is kept.
    """
    kept = np.isfinite(perplexities)
    finite = np.flatnonzero(kept)
    worst_first = finite[np.lexsort((-sample_ids[finite], -perplexities[finite]))]
    kept[worst_first[: dropped(len(finite), drop_fraction)]] = False
    if not kept.any():
        remedy = (
            f"nothing is left: of {len(kept)} samples {len(finite)} have a finite perplexity; "
            "lower drop_fraction or look at the model's scores"
        )
        raise InputError("drop_fraction", drop_fraction, remedy)
    return kept
