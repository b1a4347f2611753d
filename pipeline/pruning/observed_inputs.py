"""Statistics of every matrix's input, observed in the products of a forward pass."""

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
def observe_inputs(
    found: Sequence[Matrix], statistics: Sequence[str], windows: int
) -> Iterator[Observe]:
    """Gather statistics of the matrices' inputs over the batches that are observed in the context;
    on leaving it the matrices have them.

    From the second batch on, a layer without experts runs only until each matrix was multiplied as
    often as in the first batch: of the last product only the input is needed.

    Matrices that read the same tensor share its statistics. An expert that saw fewer than
    `pipeline.models.matrices.STARVED_TOKENS` tokens gets uniform ones instead, those of an input
    that has every feature once: every input counts the same.

    Args:
        windows: of the whole calibration set.

    Raises:
        InputError: if a matrix, or a tensor of experts, is in none of the layer's products.
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
        if self._sums[place] is None:  # in the first batch: which matrices share an input
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
        """Give the matrices their statistics; raises what `observe_inputs` does."""
        self._check_that_all_took_part()
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

    def _check_that_all_took_part(self) -> None:
        forms = {_form(each.name) for each in self._found if each.is_expert and each.tokens}
        for matrix in self._found:
            if matrix.is_expert and _form(matrix.name) not in forms:
                remedy = "the inputs of its experts cannot be observed; it cannot be pruned"
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
    """Return a matrix's name without numbers, which all experts share."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


# -------------------------------------------------------------------------------------- products


class _LastProduct(Exception):
    """Ends a forward pass after the last product to observe."""


class _Products(TorchFunctionMode):
    """Finds each product of activations with one of the matrices, however the model writes it:
    experts are multiplied slice by slice and have no module to put a hook on.

    Args:
        add: is called with the matrix's index and its input.
    """

    def __init__(self, found: Sequence[Matrix], add: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self._places = {_storage(matrix.weight): place for place, matrix in enumerate(found)}
        self._add = add
        self._experts = [matrix.is_expert for matrix in found]
        self._seen: Counter[int] = Counter()
        self._whole: Counter[int] | None = None  # products of one batch, known after the first

    def observe(self, run: Callable[[], object]) -> None:
        """Run the layer on a batch, and add the inputs of its products."""
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
                place = self._places.get(_storage(weight))
                if place is not None:
                    if function in _PADDED and self._experts[place]:
                        inputs = inputs[inputs.any(dim=1)]
                    self._add(place, inputs)
                    self._seen[place] += 1
            if self._seen == self._whole:
                raise _LastProduct
        return function(*args, **kwargs)


def _storage(view: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return view.data_ptr(), view.shape, view.stride()


Factors = Iterator[tuple[Tensor, Tensor]]
"""Pairs that are multiplied: an input `[..., in_features]` and a tensor that may be a weight
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
"""Products in which all experts take the same number of rows (Llama 4): rows of zeros stand for the
tokens that are not routed to an expert."""
