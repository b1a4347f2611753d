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


class InputSums:
    """Statistics of the inputs of some matrices, one for all that read the same tensor.

    It can be pickled for another process, on whose CPU it is then.

    Args:
        statistics: names from `pipeline.pruning.input_statistics.STATISTICS`.
        windows: of the whole calibration set, even if this sees only a part of it.
    """

    def __init__(self, statistics: Sequence[str], windows: int) -> None:
        self._statistics = statistics
        self._windows = windows
        self._tokens: Counter[str] = Counter()
        self._leaders: dict[str, str] = {}  # by matrix: the first one that read the same tensor
        self._sums: dict[str, dict[str, Statistic]] = {}  # by leader

    def add(self, name: str, inputs: Tensor, leader: str) -> None:
        """Add a product's input `[..., in_features]`.

        Args:
            leader: the first matrix that read it.
        """
        width = inputs.shape[-1]
        self._tokens[name] += inputs.numel() // width
        if self._leaders.setdefault(name, leader) == name:
            if name not in self._sums:
                self._sums[name] = self._new(width, inputs.device)
            exact = inputs.float()
            for statistic in self._sums[name].values():
                statistic.update(exact)

    def merge(self, other: "InputSums") -> None:
        """Add the tokens that another one has seen; it must not be used afterwards."""
        self._tokens += other._tokens
        for leader, sums in other._sums.items():
            own = self._sums.setdefault(leader, sums)
            if own is not sums:
                for name, statistic in own.items():
                    statistic.merge(sums[name])
        for name, leader in other._leaders.items():
            known = self._leaders.setdefault(name, leader)
            assert known == leader, f"{name} shares its input with {known} and with {leader}"

    def of(self, names: Sequence[str]) -> "InputSums":
        """Return the part for these matrices, with the tokens of all; it shares the statistics."""
        part = InputSums(self._statistics, self._windows)
        part._tokens = Counter(self._tokens)
        part._leaders = {name: self._leaders[name] for name in names if name in self._leaders}
        part._sums = {leader: self._sums[leader] for leader in part._leaders.values()}
        return part

    def hand_over(self, found: Sequence[Matrix]) -> None:
        """Give matrices their statistics.

        An expert that saw fewer than `pipeline.models.matrices.STARVED_TOKENS` tokens gets uniform
        ones instead, those of an input that has every feature once: every input counts the same.

        Raises:
            InputError: if a matrix, or a tensor of experts, is in none of the layer's products.
            NonFiniteError: if an input is NaN or infinite.
        """
        self._check_that_all_took_part(found)
        totals = {leader: _totals(sums) for leader, sums in self._sums.items()}
        uniform: dict[int, dict[str, Tensor]] = {}
        for matrix in found:
            name, device = matrix.name, matrix.weight.device
            matrix.tokens = self._tokens[name]
            matrix.statistics = _on(device, totals.get(self._leaders.get(name, name), {}))
            for statistic, total in matrix.statistics.items():
                if not is_finite(total):
                    raise NonFiniteError(f"{name}: its input has NaN or infinite {statistic}")
            if matrix.is_expert and matrix.tokens < STARVED_TOKENS:
                width = matrix.weight.shape[1]
                if width not in uniform:
                    uniform[width] = self._uniform(width, device)
                matrix.statistics = uniform[width]

    def _check_that_all_took_part(self, found: Sequence[Matrix]) -> None:
        forms = {_form(name) for name in self._tokens}
        for matrix in found:
            if matrix.is_expert and _form(matrix.name) not in forms:
                remedy = "the inputs of its experts cannot be observed; it cannot be pruned"
                raise InputError("model", matrix.name, remedy)
            if not matrix.is_expert and not self._tokens[matrix.name]:
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


def _on(device: torch.device, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: total.to(device) for name, total in totals.items()}


def _form(name: str) -> str:
    """Return a matrix's name without numbers, which all experts share."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


# -------------------------------------------------------------------------------------- products


class _LastProduct(Exception):
    """Ends a forward pass after the last product to observe."""


class InputObserver(TorchFunctionMode):
    """Sums the inputs of a decoder layer's matrices, batch by batch.

    It finds each product of activations with one of the matrices, however the model writes it:
    experts are multiplied slice by slice and have no module to put a hook on. From the second batch
    on, a layer without experts runs only until each matrix was multiplied as often as in the first
    batch: of the last product only the input is needed.

    Args:
        found: the layer's matrices.
        statistics: as of `InputSums`.
        windows: as there.
    """

    def __init__(self, found: Sequence[Matrix], statistics: Sequence[str], windows: int) -> None:
        super().__init__()
        self._found = found
        self._places = {_storage(matrix.weight): place for place, matrix in enumerate(found)}
        self._asked = statistics, windows
        self._sums = InputSums(*self._asked)
        self._leaders: dict[str, str] = {}
        self._inputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # by identity
        self._seen: Counter[int] = Counter()
        self._whole: Counter[int] | None = None  # products of one batch, known after the first

    def observe(self, run: Callable[[], object]) -> None:
        """Run the layer on a batch, and add the inputs of its products."""
        self._seen = Counter()
        with self, contextlib.suppress(_LastProduct):
            run()
        if self._whole is None and not any(matrix.is_expert for matrix in self._found):
            self._whole = self._seen

    def take(self) -> InputSums:
        """Return the sums over the batches since the last call."""
        taken, self._sums = self._sums, InputSums(*self._asked)
        return taken

    def _add(self, place: int, inputs: Tensor) -> None:
        name = self._found[place].name
        if name not in self._leaders:  # with its first product
            reference, leader = self._inputs.get(id(inputs), (None, name))
            if reference is None or reference() is not inputs:
                self._inputs[id(inputs)] = weakref.ref(inputs), name
                leader = name
            self._leaders[name] = leader
        self._sums.add(name, inputs, self._leaders[name])

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _FACTORS:
            for inputs, weight in _FACTORS[function](*args, **kwargs):
                place = self._places.get(_storage(weight))
                if place is not None:
                    if function in _PADDED and self._found[place].is_expert:
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
