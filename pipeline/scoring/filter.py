"""Drop samples that are of no use, then those of highest perplexity, as many as were asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, NonFiniteError
from pipeline.scoring.banned_words import holding, read_words
from pipeline.scoring.duplicates import duplicates, near_duplicates
from pipeline.scoring.score import Score
from pipeline.specs import FilterSpec, dropped
from pipeline.stage import Artifacts

Flags = npt.NDArray[np.bool_]
"""One a sample."""


def run(spec: FilterSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Write the samples that are kept to `samples.parquet` and the others to `rejected.parquet`,
    both with their scores.

    Raises:
        InputError: if none is left, or if the list of banned words cannot be read.
        NonFiniteError: if a perplexity is NaN or infinite.
    """
    samples = _read(artifacts[spec.scores.samples.key] / "samples.parquet")
    scores = _read(artifacts[spec.scores.key] / "scores.parquet")
    perplexities = scores["perplexity"].to_numpy()
    unknown = scores["perplexity"].is_null().to_numpy()  # no token to score
    spoilt = np.flatnonzero(~np.isfinite(perplexities) & ~unknown)
    if len(spoilt):
        number = scores["sample_id"][int(spoilt[0])]
        raise NonFiniteError(f"sample {number}: its perplexity is {perplexities[spoilt[0]]:g}")
    reasons = np.where(unknown, "invalid", "").astype(object)
    for reason, rejected in _rules(spec):
        left = np.flatnonzero(reasons == "")
        reasons[left[rejected(samples.take(left))]] = reason
    left = reasons == ""
    kept = keep(
        np.where(left, perplexities, np.nan), scores["sample_id"].to_numpy(), spec.drop_fraction
    )
    reasons[left & ~kept] = "perplexity"
    for column in Score._fields:
        samples = samples.append_column(column, scores[column])
    pq.write_table(samples.filter(pa.array(kept)), output / "samples.parquet")
    told = samples.append_column("reason", pa.array(reasons, pa.string()))
    pq.write_table(told.filter(pa.array(~kept)), output / "rejected.parquet")

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


def _rules(spec: FilterSpec) -> list[tuple[str, Callable[[pa.Table], Flags]]]:
    """Reasons to reject a sample whatever its perplexity, each tried on what those before left."""
    rules: list[tuple[str, Callable[[pa.Table], Flags]]] = []
    if spec.banned_words is not None:
        words = read_words(spec.banned_words.path)
        rules.append(("banned word", lambda rows: holding(rows["text"].to_pylist(), words)))
    if spec.drop_duplicates:
        rules.append(("duplicate", lambda rows: duplicates(rows["token_ids"].to_pylist())))
    similarity = spec.near_duplicate_similarity
    if similarity is not None:
        rules.append(
            (
                "near duplicate",
                lambda rows: near_duplicates(rows["token_ids"].to_pylist(), similarity),
            )
        )
    return rules


def _read(path: Path) -> pa.Table:
    return pq.read_table(path).sort_by("sample_id")


def keep(
    perplexities: npt.NDArray[np.float64],
    sample_ids: npt.NDArray[np.int64],
    drop_fraction: float,
) -> Flags:
    """Which samples stay, [samples].

    Those whose perplexity is NaN, not to be kept or not known, go in any case. Of the n others
    exactly floor(drop_fraction * n + 0.5) go, the highest first and of equal ones the higher id.
    (The reference code keeps what lies strictly below a percentile, so ties move its count.)

    Raises:
        InputError: if none stays.
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
