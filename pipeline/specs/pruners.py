"""The options of each pruner."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.specs.base import Spec


class PrunerSpec(Spec):
    """The options of a pruner; its `name` selects the class."""

    version: ClassVar[int] = 1
    """Raised when it prunes otherwise with the same options. Only the keys of its own prunings
    change, and of the stages that follow them."""

    calibrated: ClassVar[bool] = True
    """Whether it takes data."""

    updates_weights: ClassVar[bool] = False
    """Whether it changes the weights that it keeps; if not, masks are all that is stored."""

    prunes: ClassVar[bool] = True
    """Whether it can set weights to zero; if not, the sparsity must be 0."""

    gradients: ClassVar[bool] = False
    """Whether it takes gradients of each layer's output; then one process prunes."""

    forward_passes: ClassVar[float] = 2.0
    """For estimates: its work in passes of the calibration set through the model. Statistics take
    one, and the outputs of pruned layers another."""

    column_passes: ClassVar[float] = 0.0
    """For estimates: its work that does not grow with the calibration set, such as an inverse, in
    passes of as many tokens as a matrix has inputs."""

    matrix_bytes: ClassVar[int] = 40
    """For estimates: bytes a weight, besides its copy in float32, while a matrix is pruned: scores,
    the copies in which they are ranked, and masks. Unless it is known, that of the largest."""

    column_matrices: ClassVar[int] = 0
    """For estimates: matrices `[in_features, in_features]` in float32 that it holds besides the
    Hessian."""

    def check_pattern(self, patterned: bool) -> None:
        """Check that the options mean something with an N:M pattern, or without one.

        Raises:
            ValueError: if they do not.
        """


class Magnitude(PrunerSpec):
    """Smallest |W| over the whole matrix; takes no data."""

    name: Literal["magnitude"] = "magnitude"
    calibrated: ClassVar[bool] = False
    forward_passes: ClassVar[float] = 0.0
    matrix_bytes: ClassVar[int] = 9


class Wanda(PrunerSpec):
    """Smallest |W| * ||X||_2 in each output row (arXiv 2306.11695)."""

    name: Literal["wanda"] = "wanda"
    matrix_bytes: ClassVar[int] = 13

    variant: bool = False
    """Remove the same share of score mass in each row instead of the same number of weights: rows
    differ, and the matrix's sparsity is met to about 0.001 only. Unstructured."""

    def check_pattern(self, patterned: bool) -> None:
        if self.variant and patterned:
            raise ValueError("wanda's variant has no N:M pattern: leave one of the two out")


class WandaPlusPlus(PrunerSpec):
    """Smallest (alpha G + ||X||_2) * |W| in each output row, G the gradient of the decoder layer's
    output norm (arXiv 2503.04992).

    The paper's regional optimisation is a reconstruction of each layer.
    """

    name: Literal["wandapp"] = "wandapp"
    gradients: ClassVar[bool] = True
    forward_passes: ClassVar[float] = 5.0
    matrix_bytes: ClassVar[int] = 17

    alpha: float = Field(default=100.0, ge=0.0)
    """Weight of the gradient."""


class SparseGPT(PrunerSpec):
    """Optimal brain surgeon by column blocks, with weight updates (arXiv 2301.00774)."""

    name: Literal["sparsegpt"] = "sparsegpt"
    version: ClassVar[int] = 2
    updates_weights: ClassVar[bool] = True
    forward_passes: ClassVar[float] = 2.7
    column_passes: ClassVar[float] = 4.0
    matrix_bytes: ClassVar[int] = 14
    column_matrices: ClassVar[int] = 4  # damped, its factor, a flipped copy and the inverse

    damping: float = Field(default=0.01, gt=0.0)
    """Added to the Hessian's diagonal, as a share of its mean."""

    block_size: int = Field(default=128, ge=1)
    """Columns of a block, in which masks are chosen together and updates of later columns wait."""


class DSnoT(PrunerSpec):
    """An initial mask, then swaps of pruned and kept weights that bring the expected error of each
    output to zero (arXiv 2310.08915)."""

    name: Literal["dsnot"] = "dsnot"
    version: ClassVar[int] = 2
    forward_passes: ClassVar[float] = 2.5

    initial: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    """The score that chooses the initial mask, in each row or group; SparseGPT's without its
    updates."""

    scope: Literal["attention", "all"] = "attention"
    """Where weights are swapped; the other matrices keep the initial mask."""

    max_cycles: int = Field(default=50, ge=0)
    """Largest number of swaps of a row."""

    update_threshold: float = Field(default=0.1, ge=0.0)
    """A row ends once its error, summed over a window's tokens, is no larger than this."""

    variance_power: float = Field(default=1.0, ge=0.0)
    """Power of the input's variance that divides a pruned weight's claim to come back; 0 leaves
    variances out."""

    variance: Literal["total", "pooled"] = "total"
    """Over all tokens, or within windows only, as in DSnoT's code."""

    same_sign: bool = False
    """End a row before a swap that changes its error's sign; with a pattern this is always done."""

    keep: Literal["best", "all"] = "best"
    """Keep a row's swaps up to its smallest error, or all, as in DSnoT's code."""


class RIA(PrunerSpec):
    """Smallest relative importance and activation over the whole matrix (Zhang et al., ICLR
    2024)."""

    name: Literal["ria"] = "ria"
    version: ClassVar[int] = 2
    matrix_bytes: ClassVar[int] = 17

    activation_power: float = Field(default=0.5, ge=0.0)
    """Power of ||X||_2."""

    permutation: bool = False
    """Let the N:M pattern hold in another order of the columns, in which more score is kept."""

    def check_pattern(self, patterned: bool) -> None:
        if self.permutation and not patterned:
            raise ValueError(
                "ria's permutation serves N:M patterns: set one, or permutation: false"
            )


class ALPS(PrunerSpec):
    """Best mask and weights for the layer's output by ADMM, then conjugate gradients on the mask
    (arXiv 2406.07831)."""

    name: Literal["alps"] = "alps"
    version: ClassVar[int] = 2
    updates_weights: ClassVar[bool] = True
    forward_passes: ClassVar[float] = 8.0
    column_passes: ClassVar[float] = 130.0
    matrix_bytes: ClassVar[int] = 36
    column_matrices: ClassVar[int] = 14  # scaled, and eigenvectors with workspace in float64

    damping: float = Field(default=0.01, gt=0.0)
    """Added to the Hessian's diagonal, as a share of its mean."""


class SparseSwaps(PrunerSpec):
    """A mask by the scores of another pruner, then swaps of a kept and a pruned weight that lower
    the error of a row's output most (arXiv 2512.10922)."""

    name: Literal["sparseswaps"] = "sparseswaps"
    forward_passes: ClassVar[float] = 2.7
    column_passes: ClassVar[float] = 60.0
    matrix_bytes: ClassVar[int] = 36

    initial: Literal["magnitude", "wanda"] = "wanda"
    """The score that chooses the first mask, in each row or group."""

    max_swaps: int = Field(default=100, ge=0)
    """Largest number of swaps of a row; the authors take 1 to 100."""

    candidates: int = Field(default=8, ge=1)
    """Weights of a row that may leave, and as many that may return, among which a swap is the best;
    the authors try all. A pattern's groups are searched whole."""


class Refit(PrunerSpec):
    """A mask by the scores of another pruner, then the kept weights that change the matrix's output
    least (the problem of arXiv 2401.02938, by conjugate gradients)."""

    name: Literal["refit"] = "refit"
    updates_weights: ClassVar[bool] = True
    forward_passes: ClassVar[float] = 2.7
    column_passes: ClassVar[float] = 20.0
    matrix_bytes: ClassVar[int] = 30
    column_matrices: ClassVar[int] = 1

    initial: Literal["magnitude", "wanda"] = "wanda"
    """The score that chooses the mask, in each row or group."""

    steps: int = Field(default=20, ge=0)
    """Of conjugate gradients; 0 leaves the weights as they are."""

    damping: float = Field(default=0.01, gt=0.0)
    """Added to the Hessian's diagonal, as a share of its mean."""


class Quantizer(PrunerSpec):
    """Rounds every weight to one of 2^bits numbers on a line; each group of a row has a line of its
    own.

    What is stored are those numbers, in the model's type. At a sparsity of 0 nothing is pruned.
    """

    updates_weights: ClassVar[bool] = True

    few_values: ClassVar[bool] = True
    """Whether a group of the stored weights has at most 2^bits values."""

    bits: int = Field(default=4, ge=2, le=8)
    """Of a weight."""

    group_size: int = Field(default=128, ge=1)
    """Adjacent inputs of a row that share a scale; the last group of a row may be smaller."""

    symmetric: bool = True
    """Lay the line symmetrically around zero, as most kernels for 4 bits need; if not, from the
    smallest to the largest weight of the group."""


class RTN(Quantizer):
    """Round to nearest; takes no data."""

    name: Literal["rtn"] = "rtn"
    calibrated: ClassVar[bool] = False
    prunes: ClassVar[bool] = False
    forward_passes: ClassVar[float] = 0.0
    matrix_bytes: ClassVar[int] = 13

    def check_pattern(self, patterned: bool) -> None:
        if patterned:
            raise ValueError("rtn prunes nothing: leave the pattern out, or take gptq")


class AWQ(Quantizer):
    """Round to nearest after scaling each input by a power of its size, the power that harms a
    matrix's output least (arXiv 2306.00978).

    The stored weights are scaled back, so the layers before them stay as they are.
    """

    name: Literal["awq"] = "awq"
    prunes: ClassVar[bool] = False
    few_values: ClassVar[bool] = False
    forward_passes: ClassVar[float] = 2.2
    column_passes: ClassVar[float] = 20.0
    matrix_bytes: ClassVar[int] = 25

    steps: int = Field(default=20, ge=1)
    """Powers that are tried: 0, 1 / steps, 2 / steps, ... below 1."""

    def check_pattern(self, patterned: bool) -> None:
        if patterned:
            raise ValueError("awq prunes nothing: leave the pattern out, or take gptq")


class GPTQ(Quantizer):
    """Round columns one after another, and let the later ones make up for it (arXiv 2210.17323).

    Above a sparsity of 0 it prunes and rounds at once, as SparseGPT's joint form does (arXiv
    2301.00774, section 3.5).
    """

    name: Literal["gptq"] = "gptq"
    forward_passes: ClassVar[float] = 2.7
    column_passes: ClassVar[float] = 4.0
    matrix_bytes: ClassVar[int] = 18
    column_matrices: ClassVar[int] = 5  # SparseGPT's, and the Hessian in another order

    act_order: bool = True
    """Take the columns with the largest inputs first. Groups stay those of adjacent inputs."""

    damping: float = Field(default=0.01, gt=0.0)
    """Added to the Hessian's diagonal, as a share of its mean."""

    block_size: int = Field(default=128, ge=1)
    """Columns of a block, after which updates of later columns are made together."""

    def check_pattern(self, patterned: bool) -> None:
        if patterned and self.act_order:
            raise ValueError("gptq takes a pattern's columns in their own order: act_order: false")


Pruner = Annotated[
    Magnitude  # one a line, so that two branches can each add one
    | Wanda
    | WandaPlusPlus
    | SparseGPT
    | DSnoT
    | RIA
    | ALPS
    | SparseSwaps
    | Refit
    | RTN
    | AWQ
    | GPTQ,
    Field(discriminator="name"),
]
