"""Measure pruners on a geometry, the choice of N:M masks, and growth with the input."""

import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.agreement import Agreement, compare_masks
from benchmarks.baseline import METHODS
from benchmarks.baseline import masks as plain_masks
from benchmarks.baseline.walk import prune_plainly
from benchmarks.floor import floating_point_operations, layer_products, square_product
from benchmarks.geometry import Geometry
from benchmarks.timing import best_of
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.prune import prune_model
from pipeline.pruning.pruners.masks import smallest_in_groups
from pipeline.specs import Pruner

logger = logging.getLogger("benchmarks")

SPARSITY = 0.6
"""Of unstructured pruning."""

PATTERN = (2, 4)
"""Kept weights and group size of the masks that are timed."""

GROWTH = (1, 2, 4)
"""Multiples of the layers, and of the windows, over which growth is measured."""

PRUNER_NAMES = list(METHODS)
"""The pruners with a plain counterpart."""

PUBLISHED_OPTIONS: dict[str, dict[str, Any]] = {"dsnot": {"keep": "all", "variance": "pooled"}}
"""Options of published code that differ from calprune's defaults. DSnoT's code keeps every swap of
a row, and its variance ignores the distances between the windows' means."""


def pruner_spec(name: str) -> Pruner:
    """Return the pruner with the options of its published code."""
    options = {"name": name, **PUBLISHED_OPTIONS.get(name, {})}
    spec: Pruner = TypeAdapter(Pruner).validate_python(options)
    return spec


@dataclass(frozen=True)
class PrunerRow:
    """One pruner on one geometry."""

    geometry: str
    pruner: str
    seconds: float
    plain_seconds: float | None
    """Of the plain implementation; None if it was not run."""
    agreement: Agreement | None
    """With the plain implementation's masks; None if it was not run."""
    floating_point_operations: int
    """Those that the method cannot do without."""
    layer_rate: float
    """FLOP/s of a decoder layer's products."""
    square_rate: float
    """FLOP/s of a large square product."""
    peak_bytes: int | None
    """Peak memory of the model and its pruning on the device; None on a CPU."""

    @property
    def ratio(self) -> float | None:
        """How many times faster than the plain implementation."""
        return self.plain_seconds / self.seconds if self.plain_seconds is not None else None

    @property
    def floor_seconds(self) -> float:
        """Time that the products take at `layer_rate`."""
        return self.floating_point_operations / self.layer_rate

    @property
    def floor_share(self) -> float:
        """`floor_seconds` as a share of the time taken; 1 if all of it were products."""
        return self.floor_seconds / self.seconds


@dataclass(frozen=True)
class MaskRow:
    """The choice of an N:M mask for one matrix."""

    rows: int
    columns: int
    seconds: float
    plain_seconds: float
    """Of the loop over groups of columns."""
    differing: int
    """Weights that only one of the two zeroes: ties."""

    @property
    def ratio(self) -> float:
        """How many times faster than the loop."""
        return self.plain_seconds / self.seconds


@dataclass(frozen=True)
class GrowthRow:
    """Seconds of one pruner against the size of its input."""

    pruner: str
    axis: str
    """`layers` or `nsamples`."""
    sizes: list[int]
    seconds: list[float]

    @property
    def slope(self) -> float:
        """Seconds for one more, by least squares."""
        return statistics.linear_regression(self.sizes, self.seconds).slope

    @property
    def r_squared(self) -> float:
        """Share of the variance that a straight line explains."""
        return statistics.correlation(self.sizes, self.seconds) ** 2


def measure_pruner(
    geometry: Geometry,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    plainly: bool,
    square: int,
    budget_seconds: float,
) -> PrunerRow:
    """Time a pruner in turns with the machine's matrix products and, if asked, with its plain
    implementation. Compare the masks of the two.

    Args:
        plainly: whether to run the plain implementation.
        square: rows and columns of the large square product.
        budget_seconds: see `best_of`.
    """
    logger.info("%s: %s", geometry.name, name)
    windows = geometry.windows()
    pruned: dict[str, Any] = {}

    def ours() -> Callable[[], object]:
        pruned.clear()  # frees the last model before the next takes memory
        model = pruned["model"] = geometry.model(device, dtype)
        return _pruning(name, model, windows)

    def plain() -> Callable[[], object]:
        model = geometry.model(device, dtype)
        return lambda: prune_plainly(model, windows, METHODS[name], SPARSITY, None)

    layer_operations, multiply_layer = layer_products(geometry, device, dtype)
    square_operations, multiply_square = square_product(square, device, dtype)
    contenders: dict[str, Callable[[], Callable[[], object]]] = {
        "layer": lambda: multiply_layer,
        "square": lambda: multiply_square,
        "ours": ours,
    }
    if plainly:
        contenders["plain"] = plain
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = best_of(contenders, budget_seconds, device)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else None
    agreement = None
    if plainly:
        dense = geometry.model(device, dtype)
        agreement = compare_masks(name, dense, pruned["model"], windows, SPARSITY, None)
    return PrunerRow(
        geometry=geometry.name,
        pruner=name,
        seconds=seconds["ours"],
        plain_seconds=seconds.get("plain"),
        agreement=agreement,
        floating_point_operations=floating_point_operations(geometry, name),
        layer_rate=layer_operations / seconds["layer"],
        square_rate=square_operations / seconds["square"],
        peak_bytes=peak,
    )


def measure_masks(rows: int, columns: int, device: torch.device, budget_seconds: float) -> MaskRow:
    """Time the choice of a `PATTERN` mask by random scores `[rows, columns]`."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(rows, columns, generator=generator).to(device)
    ours = smallest_in_groups(scores, *PATTERN)
    plain = plain_masks.mask_in_groups(scores, *PATTERN)
    seconds = best_of(
        {
            "ours": lambda: lambda: smallest_in_groups(scores, *PATTERN),
            "plain": lambda: lambda: plain_masks.mask_in_groups(scores, *PATTERN),
        },
        budget_seconds,
        device,
    )
    return MaskRow(rows, columns, seconds["ours"], seconds["plain"], int((ours != plain).sum()))


def measure_growth(
    geometry: Geometry,
    name: str,
    axis: str,
    device: torch.device,
    dtype: torch.dtype,
    budget_seconds: float,
) -> GrowthRow:
    """Time a pruner on a geometry with `GROWTH` times its `layers` or `nsamples`."""
    logger.info("growth with %s: %s", axis, name)
    sizes = [factor * getattr(geometry, axis) for factor in GROWTH]

    def contender(size: int) -> Callable[[], Callable[[], object]]:
        changed: dict[str, Any] = {axis: size}
        grown = replace(geometry, **changed)
        return lambda: _pruning(name, grown.model(device, dtype), grown.windows())

    seconds = best_of({str(size): contender(size) for size in sizes}, budget_seconds, device)
    return GrowthRow(name, axis, sizes, [seconds[str(size)] for size in sizes])


def _pruning(name: str, model: Any, windows: Tensor) -> Callable[[], object]:
    pruner = pruner_spec(name)
    data = windows if pruner.calibrated else None
    return lambda: prune_model(model, data, pruner, ModelTarget(LayerTarget(SPARSITY)))
