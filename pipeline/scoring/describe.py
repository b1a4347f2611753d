"""Description of a calibration set: scores, what it covers, and its distance from a reference."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.data.windows import read_windows
from pipeline.models.loading import opened
from pipeline.models.memory import ModelMemory
from pipeline.models.output_layer import check_causal
from pipeline.models.streaming import is_streamed
from pipeline.scoring.coverage import (
    effective_directions,
    entropy,
    missing_mass,
    nearest_distance,
)
from pipeline.scoring.mean_states import MeanStates
from pipeline.scoring.ngrams import distinct_share
from pipeline.scoring.score import STATES, score_columns, score_with_states
from pipeline.specs import DescribeSpec
from pipeline.stage import Artifacts

MEANS = ("loss", "min_k", "min_k_plus_plus", "distinct_1", "distinct_2", "distinct_3")
"""Scores whose mean over windows is reported; `loss` is the logarithm of the perplexity."""


def run(spec: DescribeSpec, artifacts: Artifacts, output: Path, **memory: Any) -> dict[str, Any]:
    """Score every window and write `scores.parquet`.

    Args:
        memory: fields of `pipeline.models.memory.ModelMemory`.

    Returns:
        `windows`; the mean of each of `MEANS` and its standard error as `<name>_error`, None with
        one window. Of the set as a whole: `set_distinct_1` to `set_distinct_3`, the different
        n-grams as a share of all; `token_entropy`, in bits; `effective_directions` of its hidden
        states. With a reference also `divergence`, in bits, `missing_mass`, the share of the
        reference's tokens that the set never has, and `reference_distance` of hidden states
        (see `pipeline.scoring.coverage`).

    Raises:
        InputError: if the model is not causal.
        NonFiniteError: if a score is NaN or infinite.
    """
    windows = read_windows(artifacts[spec.calibration.key])
    model = opened(spec.model, artifacts, ModelMemory(**memory))
    check_causal(model)
    rows = windows.tolist()
    scores, states = score_with_states(model, rows, [1] * len(rows), name="window {}".format)
    columns = score_columns(scores)
    table = pa.table({"window": range(len(scores)), **columns})
    table = table.append_column(STATES, pa.array(states, STATES.type))
    pq.write_table(table, output / "scores.parquet")
    report: dict[str, Any] = {"windows": len(scores)}
    if is_streamed(model):
        report["streamed"] = True
    values = {**columns, "loss": np.log(columns["perplexity"])}
    for name in MEANS:
        column = np.asarray(values[name], dtype=np.float64)
        report[name] = float(column.mean())
        several = len(column) > 1
        report[f"{name}_error"] = (
            float(column.std(ddof=1) / np.sqrt(len(column))) if several else None
        )
    shares, held = frequencies(windows), np.array(states, dtype=np.float64)
    report |= {f"set_distinct_{length}": distinct_share(rows, length) for length in (1, 2, 3)}
    report["token_entropy"] = entropy(shares)
    report["effective_directions"] = effective_directions(held)
    if spec.reference is not None:
        theirs = frequencies(read_windows(artifacts[spec.reference.key]))
        report["divergence"] = divergence(shares, theirs)
        report["missing_mass"] = missing_mass(shares, theirs)
        report["reference_distance"] = nearest_distance(held, _reference_states(spec, artifacts))
    return report


def _reference_states(spec: DescribeSpec, artifacts: Artifacts) -> MeanStates:
    described = spec.described_reference
    assert described is not None
    column = pq.read_table(artifacts[described.key] / "scores.parquet", columns=[STATES.name])
    return np.array(column[STATES.name].to_pylist(), dtype=np.float64)


def frequencies(windows: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return the share of each token id in windows [windows, seqlen], by id."""
    counts = torch.bincount(windows.flatten()).numpy().astype(np.float64)
    shares: npt.NDArray[np.float64] = counts / counts.sum()
    return shares


def divergence(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Return the Jensen-Shannon divergence of two distributions over token ids, 0 to 1 bit.

    Few tokens raise it, so only compare sets of one size (Lin 1991, IEEE Transactions on
    Information Theory 37:145-151).
    """
    size = max(len(first), len(second))
    both = np.stack([np.pad(each, (0, size - len(each))) for each in (first, second)])
    middle = both.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(both > 0, both * np.log2(both / middle), 0.0)
    return float(terms.sum(axis=1).mean())
