"""Outlier ratios of decoder layers, by which OWL spreads a model's sparsity (arXiv 2310.05175)."""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from pipeline.data.windows import read_windows
from pipeline.environment import scratch_folder
from pipeline.errors import InputError, NonFiniteError
from pipeline.models.loading import stream_model
from pipeline.models.matrices import Matrix
from pipeline.pruning.crew import Crew
from pipeline.pruning.groups import Share
from pipeline.pruning.helper import Helper
from pipeline.pruning.shared_model import shared_model
from pipeline.pruning.walk import walk
from pipeline.pruning.window_groups import DEFAULT_MEMORY, Memory
from pipeline.specs import OutliersSpec
from pipeline.stage import NO_HELPERS, Artifacts, Helpers

_STATISTICS = ("squared_norms",)


@dataclass(frozen=True)
class LayerOutliers:
    """How many of a decoder layer's weights are outliers."""

    outliers: int
    weights: int

    @property
    def ratio(self) -> float:
        """The share of outliers."""
        return self.outliers / self.weights


def count_outliers(
    model: nn.Module, windows: Tensor, threshold: float, memory: Memory = DEFAULT_MEMORY
) -> list[LayerOutliers]:
    """Count the outliers in each decoder layer of a model, which stays as it is.

    A weight's score is Wanda's, |W_ij| * ||X_j||_2. An outlier scores more than `threshold` times
    the mean over all matrices of its layer together. Only one matrix's scores are held at a time,
    so they are computed twice, for the mean and for the count.

    Args:
        model: a causal language model, in evaluation mode.
        windows: the calibration set, token ids `[nsamples, seqlen]`.

    Raises:
        InputError: if the threshold is not above 0, the windows do not suit the model, or the model
            has a form that cannot be pruned.
        NonFiniteError: if a weight or an activation is NaN or infinite.
    """
    if not 0 < threshold < math.inf:
        raise InputError("threshold", threshold, "must be a finite number above 0")
    layers: list[LayerOutliers] = []

    def visit(number: int, found: list[Matrix]) -> None:
        weights = sum(matrix.weight.numel() for matrix in found)
        mean = math.fsum(_total(matrix) for matrix in found) / weights
        outliers = sum(int((_scores(matrix) > threshold * mean).sum()) for matrix in found)
        layers.append(LayerOutliers(outliers, weights))

    walk(model, windows, _STATISTICS, visit, memory)
    return layers


def _scores(matrix: Matrix) -> Tensor:
    """Return Wanda's scores `[out_features, in_features]` in float32."""
    return matrix.weight.float().abs() * matrix.statistics["squared_norms"].sqrt()


def _total(matrix: Matrix) -> float:
    total = float(_scores(matrix).sum(dtype=torch.float64))
    if not math.isfinite(total):
        raise NonFiniteError(f"{matrix.name}: the weight has NaN or infinite values")
    return total


def read_outlier_ratios(artifact: Path) -> list[float]:
    """Read the outlier ratio of each decoder layer, from the first."""
    ratios: list[float] = pq.read_table(artifact / "outliers.parquet")["outlier_ratio"].to_pylist()
    return ratios


def run(
    spec: OutliersSpec, artifacts: Artifacts, output: Path, helpers: Helpers = NO_HELPERS
) -> dict[str, Any]:
    """Count, and write `outliers.parquet`.

    Args:
        helpers: processes that share the work; each has called `helper`.
    """
    crew = Crew(spec.window_groups, helpers)
    windows = read_windows(artifacts[spec.calibration.key])
    with tempfile.TemporaryDirectory(prefix="calprune-layers-", dir=scratch_folder()) as scratch:
        model = stream_model(spec.model, artifacts, Path(scratch))
        layers = count_outliers(model, windows, spec.threshold, Memory(crew=crew))
    columns: Mapping[str, list[Any]] = {
        "layer": list(range(len(layers))),
        "outlier_ratio": [layer.ratio for layer in layers],
        "weights": [layer.weights for layer in layers],
    }
    pq.write_table(pa.table(columns), output / "outliers.parquet")
    weights = sum(layer.weights for layer in layers)
    return {"outlier_ratio": sum(layer.outliers for layer in layers) / weights}


def helper(spec: OutliersSpec, artifacts: Artifacts, member: int, members: int) -> Helper:
    """Return a helper's part in counting outliers: it only observes inputs.

    Args:
        member: its number among all processes, from 1: the first one leads.
        members: how many there are.
    """
    windows = read_windows(artifacts[spec.calibration.key])
    share = Share(spec.window_groups, member, members)
    return Helper(shared_model(spec.model, artifacts), windows, _STATISTICS, share)
