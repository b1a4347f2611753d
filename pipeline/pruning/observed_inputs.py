"""Statistics of what every matrix is given in a forward pass, seen in the products themselves."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipeline.errors import InputError, NonFiniteError
from pipeline.models.matrices import STARVED_TOKENS, Matrix, is_finite
from pipeline.pruning.input_statistics import STATISTICS, Statistic

Observe = Callable[[Callable[[], object]], None]
"""Runs the layer on one batch, and adds its inputs to the statistics."""


@contextlib.contextmanager
def observed(found: Sequence[Matrix], statistics: Sequence[str], windows: int) -> Iterator[Observe]:
    """Gather statistics of all inputs, those of so many windows, of each batch that is observed
    while it is entered; the matrices have them afterwards.

    From the second batch on, a layer without experts is run only until each matrix was multiplied
    as often as in the first batch: of the last product no more than the input is needed.

    Matrices that read the same tensor share them. An expert to which fewer than
    `pipeline.models.matrices.STARVED_TOKENS` tokens were routed gets uniform ones instead: those of
    an input that has every feature once, so that every input counts the same.

    Raises:
        InputError: if a matrix is in none of the layer's products, or a tensor of experts in none.
        NonFiniteError: if an input is NaN or infinite.
    """
    sums = _Sums(found, statistics, windows)
    yield _Products(found, sums.add).observe
    sums.hand_over()


class _Sums:
    """The statistics of each matrix's input, one for all that read the same tensor."""

    def __init__(self, found: Sequence[Matrix], statistics: Sequence[str], windows: int) -> None:
        self._found = found
        self._statistics = statistics
        self._windows = windows
        self._sums: list[dict[str, Statistic] | None] = [None] * len(found)
        self._followers: set[int] = set()
        self._inputs: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def add(self, place: int, inputs: Tensor) -> None:
        """Add a product's input `[..., in_features]` to the sums of the matrix in that place."""
        width = inputs.shape[-1]
        self._found[place].tokens += inputs.numel() // width
        if self._sums[place] is None:  # the first batch tells who shares with whom
            reference, leader = self._inputs.get(id(inputs), (None, place))
            if reference is not None and reference() is inputs:
                self._sums[place] = self._sums[leader]
                self._followers.add(place)
            else:
                self._sums[place] = self._new(width, inputs.device)
                self._inputs[id(inputs)] = weakref.ref(inputs), place
        if place not in self._followers:
            exact = inputs.float()
            for statistic in (self._sums[place] or {}).values():
                statistic.update(exact)

    def hand_over(self) -> None:
        """Give the matrices their statistics; raises what `observed` does."""
        self._see_that_all_took_part()
        uniform: dict[int, dict[str, Tensor]] = {}
        for matrix, sums in zip(self._found, self._sums, strict=True):
            matrix.statistics = _totals(sums or {})
            for name, total in matrix.statistics.items():
                if not is_finite(total):
                    raise NonFiniteError(f"{matrix.name}: its input has NaN or infinite {name}")
            if matrix.is_expert and matrix.tokens < STARVED_TOKENS:
                width = matrix.weight.shape[1]
                if width not in uniform:
                    uniform[width] = self._uniform(width, matrix.weight.device)
                matrix.statistics = uniform[width]

    def _see_that_all_took_part(self) -> None:
        forms = {_form(each.name) for each in self._found if each.is_expert and each.tokens}
        for matrix in self._found:
            if matrix.is_expert and _form(matrix.name) not in forms:
                remedy = "what its experts are given cannot be observed; it cannot be pruned"
                raise InputError("model", matrix.name, remedy)
            if not matrix.is_expert and not matrix.tokens:
                remedy = "takes no part in the forward pass; it cannot be pruned"
                raise InputError("model", matrix.name, remedy)

    def _new(self, width: int, device: torch.device) -> dict[str, Statistic]:
        return {name: STATISTICS[name](width, self._windows, device) for name in self._statistics}

    def _uniform(self, width: int, device: torch.device) -> dict[str, Tensor]:
        sums = self._new(width, device)
        for statistic in sums.values():
            statistic.update(torch.eye(width, device=device))
        return _totals(sums)


def _totals(sums: Mapping[str, Statistic]) -> dict[str, Tensor]:
    return {name: statistic.value for name, statistic in sums.items()}


def _form(name: str) -> str:
    """A matrix's name without numbers: the same for all experts."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


# -------------------------------------------------------------------------------------- products


class _LastProduct(Exception):
    """Ends a forward pass of which nothing more is to be seen."""


class _Products(TorchFunctionMode):
    """Tells of each product of activations with one of the matrices, however the model writes it:
    experts are multiplied slice by slice and have no module to put a hook on."""

    def __init__(self, found: Sequence[Matrix], tell: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self._places = {_identity(matrix.weight): place for place, matrix in enumerate(found)}
        self._tell = tell
        self._experts = [matrix.is_expert for matrix in found]
        self._seen: Counter[int] = Counter()
        self._whole: Counter[int] | None = None  # what is seen in a batch, once it is known

    def observe(self, run: Callable[[], object]) -> None:
        """Tell of the products in a run of the layer on a batch."""
        self._seen = Counter()
        with self, contextlib.suppress(_LastProduct):
            run()
        if self._whole is None and not any(self._experts):
            self._whole = self._seen

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _FACTORS:
            for inputs, weight in _FACTORS[function](*args, **kwargs):
                place = self._places.get(_identity(weight))
                if place is not None:
                    if function in _PADDED and self._experts[place]:
                        inputs = inputs[inputs.any(dim=1)]
                    self._tell(place, inputs)
                    self._seen[place] += 1
            if self._seen == self._whole:
                raise _LastProduct
        return function(*args, **kwargs)


def _identity(view: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return view.data_ptr(), view.shape, view.stride()


Factors = Iterator[tuple[Tensor, Tensor]]
"""Pairs that are multiplied: an input `[..., in_features]` and what may be a weight
`[out_features, in_features]`."""


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Factors:
    yield input, weight


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Factors:
    if other.dim() > 1:
        yield input, other.mT
    if input.dim() == 2 and other.dim() > 1:  # Mamba has its weight on the left
        yield other.mT, input


def _addmm(_: Tensor, mat1: Tensor, mat2: Tensor, **__: Any) -> Factors:
    yield mat1, mat2.mT


def _bmm(input: Tensor, mat2: Tensor, **_: Any) -> Factors:
    yield from zip(input, mat2.mT, strict=True)


_FACTORS: dict[Any, Callable[..., Factors]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
}

_PADDED = {torch.bmm, Tensor.bmm}
"""Here all experts are given as many rows (Llama 4): those of zeros stand for the tokens that are
not routed there."""
