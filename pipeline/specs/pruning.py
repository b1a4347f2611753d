"""The stages of pruning, and the allocations of sparsity to layers."""

import math
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from pipeline.specs.base import Fraction, Spec, StageSpec, nearest_stages
from pipeline.specs.calibration import WindowsSpec
from pipeline.specs.pruners import Pruner, Quantizer
from pipeline.specs.sources import Model


class Uniform(Spec):
    """The same sparsity in every decoder layer."""

    name: Literal["uniform"] = "uniform"
    calibrated: ClassVar[bool] = False


class OWL(Spec):
    """Layers with more outliers among their Wanda scores are kept denser (arXiv 2310.05175).

    The defaults are those of its authors for unstructured sparsity.
    """

    name: Literal["owl"] = "owl"
    calibrated: ClassVar[bool] = True

    threshold: float = Field(default=5.0, gt=0.0)
    """M: a score above this many times its layer's mean is an outlier."""

    spread: float = Field(default=0.08, gt=0.0, le=0.5)
    """lambda: the sparsest and the densest layer are 2 * lambda apart. With a pattern N:M it has
    little effect unless 2 * lambda is more than 1/M."""


class ArithmeticProgression(Spec):
    """Every layer is sparser than the one below by the same amount (arXiv 2502.14770)."""

    name: Literal["arithmetic-progression"] = "arithmetic-progression"
    calibrated: ClassVar[bool] = False

    difference: float = Field(gt=0.0, lt=1.0)
    """beta: from one layer to the next. The authors try multiples of 0.002; with L layers of one
    size it can be at most min(2 S, 2 (1 - S)) / (L - 1)."""


class ByHand(Spec):
    """A sparsity written down for each decoder layer."""

    name: Literal["by-hand"] = "by-hand"
    calibrated: ClassVar[bool] = False

    sparsities: tuple[Fraction, ...] = Field(min_length=1)
    """From the first layer to the last. Their mean, weighted by the layers' sizes, must be the
    model's sparsity within 1e-6."""


class FirstLayers(Spec):
    """The first decoder layers alone are pruned, each to the sparsity that is asked for.

    The others stay dense and cost no forward pass, so a pilot takes a share of the time. The whole
    model has fewer zeros than it would otherwise.
    """

    name: Literal["first-layers"] = "first-layers"
    calibrated: ClassVar[bool] = False

    share: float = Field(gt=0.0, le=1.0)
    """Share of the decoder layers, rounded up."""


Allocation = Annotated[
    Uniform | OWL | ArithmeticProgression | ByHand | FirstLayers, Field(discriminator="name")
]


class OutliersSpec(StageSpec):
    """Count the outliers in every decoder layer of a model that is not pruned yet.

    Leaves `outliers.parquet`: layer, outlier_ratio, weights (how many the layer's matrices have).
    """

    version: ClassVar[int] = 2
    kind: Literal["outliers"] = "outliers"

    model: Model
    """The model before pruning."""

    calibration: WindowsSpec
    """The calibration set."""

    threshold: float = Field(gt=0.0)
    """A score above this many times its layer's mean is an outlier."""

    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"window_groups"})

    window_groups: int = Field(default=1, ge=1)
    """As of a pruning."""


class ReconstructionOptions(Spec):
    """Fit the kept weights of each pruned layer to what the dense layer makes of the same inputs,
    attention and MLP apart, by Adam (arXiv 2510.14444)."""

    epochs: int = Field(default=5, ge=1)
    """Passes of its calibration set, for each decoder layer."""

    learning_rate: float = Field(default=3e-4, gt=0.0)
    """The largest one: it rises for a tenth of the steps and then falls to zero."""

    batch_size: int = Field(default=2, ge=1)
    """Windows of a step."""


class Reconstruction(ReconstructionOptions):
    """The same, with its data."""

    calibration: WindowsSpec | None = None
    """Another set to fit to than the one that chose the mask; None is that one."""


class Pattern(NamedTuple):
    """N:M: of every M adjacent inputs of a row, N are kept."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read `"2:4"`.

        Raises:
            ValueError: if the text has another form, or keeps more weights than a group has.
        """
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
        if found is None:
            raise ValueError(f"pattern {text!r} is not of the form N:M, like 2:4")
        kept, group = int(found[1]), int(found[2])
        if kept > group:
            raise ValueError(f"pattern {text} keeps {kept} of {group}: N must not exceed M")
        return cls(kept, group)

    @property
    def sparsity(self) -> float:
        """Share of zeros, 1 - N/M."""
        return 1 - self.kept / self.group

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


class PruneSpec(StageSpec):
    """Prune every linear layer in a model's decoder layers, experts too.

    Leaves `sparsity.parquet` (matrix, rows, columns, zeros, sparsity, layer, layer_sparsity and
    layer_pattern, those that the allocation gives its decoder layer), `dense.parquet` (parameter,
    shape, why: all that is not pruned), and the pruned model: if its pruner only chooses what to
    zero, `masks/` for the model that it was made from (`pipeline/models/layer_files.py`); else
    `model/`, a dense checkpoint with zeros, and the tokenizer.
    """

    version: ClassVar[int] = 3
    lineage_constants: ClassVar[Mapping[str, Any]] = {
        "device_hidden_bytes": 4 * 2**30,
        "host_hidden_bytes": 16 * 2**30,
    }
    kind: Literal["prune"] = "prune"

    model: Model
    """The model to prune."""

    pruner: Pruner
    """How weights are chosen and, for some, updated."""

    sparsity: Fraction
    """Share of zeros over all matrices, with the allocation `first-layers` over those of the first
    layers; with a pattern N:M it must be 1 - N/M."""

    pattern: str | None = None
    """`N:M`: N kept of every M adjacent inputs of a row, the hardware's convention; on average, if
    the allocation is not uniform. None is unstructured."""

    allocation: Allocation = Uniform()
    """How the sparsity is spread over decoder layers."""

    calibration: WindowsSpec | None = None
    """The calibration set; None exactly where neither pruner nor allocation takes data."""

    checkpoint: bool = False
    """Store an ordinary checkpoint where masks would do."""

    reconstruction: Reconstruction | None = None
    """How the kept weights are fitted afterwards; None leaves them to the pruner."""

    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"window_groups", "reconstruction"})

    window_groups: int = Field(default=1, ge=1)
    """Groups of windows whose statistics are summed apart and then added: as many processes can
    share the pruning. It can move last bits of the statistics; the number of processes cannot."""

    @property
    def stores_masks(self) -> bool:
        """Whether the artifact holds masks, and needs the model that they are for."""
        return not (self.updates_weights or self.checkpoint)

    @property
    def updates_weights(self) -> bool:
        """Whether the weights that are kept change."""
        return self.pruner.updates_weights or self.reconstruction is not None

    def rests_on(self) -> tuple[StageSpec, ...]:
        """The model that masks are for; nothing, of a checkpoint."""
        return tuple(nearest_stages((self.model,))) if self.stores_masks else ()

    @field_validator("pattern")
    @classmethod
    def _pattern_is_n_of_m(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            Pattern.parse(pattern)
        return pattern

    @model_validator(mode="after")
    def _fields_agree(self) -> "PruneSpec":
        if self.pattern is not None:
            sparsity = Pattern.parse(self.pattern).sparsity
            if not math.isclose(self.sparsity, sparsity):
                raise ValueError(
                    f"sparsity {self.sparsity} contradicts pattern {self.pattern}: "
                    f"set it to {sparsity:g}"
                )
        self.pruner.check_pattern(self.pattern is not None)
        if self.sparsity and not self.pruner.prunes:
            raise ValueError(
                f"sparsity {self.sparsity:g}: {self.pruner.name} prunes nothing: set it to 0"
            )
        needs_data = data_taker(self.pruner, self.allocation, self.reconstruction)
        if needs_data is not None and self.calibration is None:
            raise ValueError(f"{needs_data} needs a calibration set")
        if needs_data is None and self.calibration is not None:
            raise ValueError(f"pruner {self.pruner.name} takes no data: leave calibration out")
        self._check_reconstruction()
        if self.window_groups > 1 and (self.reconstruction or self.pruner.gradients):
            what = "reconstruction" if self.reconstruction else f"pruner {self.pruner.name}"
            raise ValueError(
                f"window_groups {self.window_groups}: {what} runs in one process: set it to 1"
            )
        windows = 1 if self.calibration is None else self.calibration.nsamples
        if self.window_groups > max(1, windows):
            raise ValueError(
                f"window_groups {self.window_groups} is more than the windows, {windows}: lower it"
            )
        if self.updates_weights and self.checkpoint:
            why = "reconstruction" if self.reconstruction else f"pruner {self.pruner.name}"
            raise ValueError(f"{why} leaves a checkpoint anyway: leave checkpoint out")
        return self

    def _check_reconstruction(self) -> None:
        if self.reconstruction is None:
            return
        if isinstance(self.pruner, Quantizer):
            raise ValueError(
                f"reconstruction would move what {self.pruner.name} rounded: leave one out"
            )
        masked_without = data_taker(self.pruner, self.allocation) is None
        if masked_without and self.reconstruction.calibration is not None:
            raise ValueError(
                f"pruner {self.pruner.name} takes no data: give the set that weights are fitted to "
                "as the calibration set itself"
            )

    @property
    def target_name(self) -> str:
        """What each matrix becomes, in words."""
        return target_name(self.sparsity, self.pattern, bits_of(self.pruner))

    @property
    def dtype(self) -> str:
        """Type of the weights: that of the dense model."""
        return self.model.dtype

    @property
    def outliers(self) -> OutliersSpec | None:
        """The stage whose outlier ratios the allocation needs; all prunings of a model that have
        calibration set and threshold in common share it."""
        if not isinstance(self.allocation, OWL) or self.calibration is None:
            return None
        return OutliersSpec(
            model=self.model,
            calibration=self.calibration,
            threshold=self.allocation.threshold,
            window_groups=self.window_groups,
        )

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """As of any stage, with the version of the pruner above the first, and that of the
        outliers, whose spec these fields give."""
        lineage = super().lineage
        if self.pruner.version > 1:
            lineage["pruner"] = {**lineage["pruner"], "version": self.pruner.version}
        if self.outliers is not None:
            lineage["outliers"] = {"version": self.outliers.version}
        return lineage

    def inputs(self) -> tuple[StageSpec, ...]:
        """The model, the calibration sets that pruner and reconstruction take, and the outliers."""
        read = [stage for stage in super().inputs() if stage is not self.calibration]
        fitted_to_it = self.reconstruction is not None and self.reconstruction.calibration is None
        if self.calibration is not None and (self.pruner.calibrated or fitted_to_it):
            read.append(self.calibration)
        if self.outliers is not None:
            read.append(self.outliers)
        return tuple(read)


def bits_of(pruner: Pruner | None) -> int | None:
    """Return the bits that a pruner rounds weights to; None if it does not."""
    return pruner.bits if isinstance(pruner, Quantizer) else None


def target_name(sparsity: float, pattern: str | None, bits: int | None = None) -> str:
    """Return what matrices become, in words: `2:4`, `60%`, `4 bit`, `4 bit 50%`."""
    zeros = pattern or f"{100 * sparsity:.6g}%"
    if bits is None:
        return zeros
    return f"{bits} bit {zeros}" if sparsity else f"{bits} bit"


def data_taker(
    pruner: Pruner, allocation: Allocation, reconstruction: ReconstructionOptions | None = None
) -> str | None:
    """Which of them needs the calibration set, in words; None if none does."""
    if pruner.calibrated:
        return f"pruner {pruner.name}"
    if allocation.calibrated:
        return f"allocation {allocation.name}"
    return None if reconstruction is None else "reconstruction"
