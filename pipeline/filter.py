"""Drop the samples of highest perplexity, exactly as many as were asked for."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.models import Artifacts
from pipeline.score import Score
from pipeline.specs import FilterSpec


def run(spec: FilterSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Write the samples that are kept to `samples.parquet` and the others to `rejected.parquet`,
    both with their scores.

    Raises:
        InputError: if none is left.
    """
    samples = _read(artifacts[spec.scores.samples.key] / "samples.parquet")
    scores = _read(artifacts[spec.scores.key] / "scores.parquet")
    perplexities = scores["perplexity"].to_numpy()
    invalid = ~np.isfinite(perplexities)
    twice = duplicates(samples["token_ids"].to_pylist()) & ~invalid & spec.drop_duplicates
    once = np.where(twice, np.nan, perplexities)
    kept = keep(once, scores["sample_id"].to_numpy(), spec.drop_fraction)
    for column in Score._fields:
        samples = samples.append_column(column, scores[column])
    pq.write_table(samples.filter(pa.array(kept)), output / "samples.parquet")
    reasons = np.select([invalid, twice], ["invalid", "duplicate"], "perplexity")
    rejected = samples.append_column("reason", pa.array(reasons)).filter(pa.array(~kept))
    pq.write_table(rejected, output / "rejected.parquet")
    return {
        "kept": int(kept.sum()),
        "dropped": int((~kept & ~invalid & ~twice).sum()),
        "invalid": int(invalid.sum()),
        "duplicates": int(twice.sum()),
    }


def duplicates(token_ids: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
    """Which samples have the ids of an earlier one, [samples]."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for ids in map(tuple, token_ids):
        found.append(ids in seen)
        seen.add(ids)
    return np.array(found, dtype=np.bool_)


def _read(path: Path) -> pa.Table:
    return pq.read_table(path).sort_by("sample_id")


def keep(
    perplexities: npt.NDArray[np.float64],
    sample_ids: npt.NDArray[np.int64],
    drop_fraction: float,
) -> npt.NDArray[np.bool_]:
    """Which samples stay, [samples].

    NaN and infinite perplexities go in any case. Of the n finite ones exactly
    floor(drop_fraction * n + 0.5) go, the highest first and of equal ones the higher id. (The
    reference code keeps what lies strictly below a percentile, so ties move its count.)

    Raises:
        InputError: if none stays.
    """
    kept = np.isfinite(perplexities)
    finite = np.flatnonzero(kept)
    worst_first = finite[np.lexsort((-sample_ids[finite], -perplexities[finite]))]
    kept[worst_first[: math.floor(drop_fraction * len(finite) + 0.5)]] = False
    if not kept.any():
        remedy = (
            f"nothing is left: of {len(kept)} samples {len(finite)} have a finite perplexity; "
            "lower drop_fraction or look at the model's scores"
        )
        raise InputError("drop_fraction", drop_fraction, remedy)
    return kept
