"""Description of a calibration set: scores under the model, and distance from a reference."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.data.windows import read_windows
from pipeline.models.loading import loaded
from pipeline.models.output_layer import check_causal
from pipeline.scoring.score import score_columns, score_samples
from pipeline.specs import DescribeSpec
from pipeline.stage import Artifacts

MEANS = ("loss", "min_k", "min_k_plus_plus", "distinct_1", "distinct_2", "distinct_3")
"""Scores whose mean over windows is reported; `loss` is the logarithm of the perplexity."""


def run(spec: DescribeSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Score every window and write `scores.parquet`.

    Returns:
        `windows`; the mean of each of `MEANS` and its standard error as `<name>_error`, None with
        one window; with a reference also `divergence`, in bits.

    Raises:
        InputError: if the model is not causal.
        NonFiniteError: if a score is NaN or infinite.
    """
    windows = read_windows(artifacts[spec.calibration.key])
    model, _ = loaded(spec.model, artifacts)
    check_causal(model)
    scores = score_samples(
        model,
        windows.tolist(),
        [1] * len(windows),
        name="window {}".format,
    )
    columns = score_columns(scores)
    pq.write_table(pa.table({"window": range(len(scores)), **columns}), output / "scores.parquet")
    report: dict[str, Any] = {"windows": len(scores)}
    values = {**columns, "loss": np.log(columns["perplexity"])}
    for name in MEANS:
        column = np.asarray(values[name], dtype=np.float64)
        report[name] = float(column.mean())
        several = len(column) > 1
        report[f"{name}_error"] = (
            float(column.std(ddof=1) / np.sqrt(len(column))) if several else None
        )
    if spec.reference is not None:
        reference = read_windows(artifacts[spec.reference.key])
        report["divergence"] = divergence(frequencies(windows), frequencies(reference))
    return report


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
