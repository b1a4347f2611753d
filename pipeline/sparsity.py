"""Counting zeros in a pruned model, and refusing a wrong count."""

from dataclasses import dataclass

from torch import Tensor

from pipeline.pruners.masks import zeros_in


class SparsityError(RuntimeError):
    """A matrix is not as sparse as it was asked to be."""


@dataclass(frozen=True)
class MatrixSparsity:
    """Zeros of one matrix."""

    matrix: str
    rows: int
    columns: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / (self.rows * self.columns)


def measure(name: str, weight: Tensor) -> MatrixSparsity:
    """Count the zeros of a weight `[out_features, in_features]`."""
    rows, columns = weight.shape
    return MatrixSparsity(name, rows, columns, int((weight == 0).sum()))


def check(
    measured: MatrixSparsity,
    weight: Tensor,
    zeros_before: int,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> None:
    """See that a pruned weight has the zeros that were asked for.

    Rows or blocks may round down each on its own, so a row's worth may be missing; more zeros are
    right only as far as the dense weight had them.

    Raises:
        SparsityError: naming the matrix, what was asked and what is there.
    """
    name, rows, columns = measured.matrix, measured.rows, measured.columns
    if pattern is not None:
        kept, group = pattern
        nonzero = (weight != 0).view(rows, columns // group, group).sum(dim=2)
        if int(nonzero.max()) > kept:
            raise SparsityError(
                f"{name}: a group of {group} keeps {int(nonzero.max())} weights, not {kept}"
            )
        return
    least = rows * zeros_in(sparsity, columns)
    most = zeros_in(sparsity, rows * columns) + zeros_before
    if not least <= measured.zeros <= most:
        raise SparsityError(
            f"{name}: {measured.zeros} of {rows * columns} weights are zero; "
            f"a sparsity of {sparsity:g} asks for {least} to {most}"
        )
