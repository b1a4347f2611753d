"""The walk through a decoder, layer by layer, each seeing the pruned layers below it.

Nothing here knows a model's class: the decoder layers are found by structure, and every argument
that the model passes to them is captured and passed again.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import InputError
from pipeline.statistics import STATISTICS, RunningSum

BATCH_TOKENS = 16_384
"""Tokens of a batch unless its size is given: fixed, since sums depend on how they are split."""


class NonFiniteError(ValueError):
    """A weight or an activation is NaN or infinite; the message names the matrix."""


@dataclass
class Matrix:
    """A linear layer inside a decoder layer, and the statistics of its input."""

    name: str
    """Its full name in the model."""
    linear: nn.Linear
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        """`[out_features, in_features]`, to be changed in place."""
        return self.linear.weight.data


Visit = Callable[[int, list[Matrix]], None]
"""Prunes the matrices of the decoder layer with that number, in place."""

Restore = Callable[[int, list[Matrix]], bool]
"""Makes of the matrices what an earlier walk left; False if that did not get so far."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's decoder layers: the list of modules with most weights.

    Raises:
        InputError: if there is none.
    """
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
    ]
    if not candidates:
        raise InputError("model", type(model).__name__, "has no list of decoder layers to prune")
    return max(candidates, key=lambda found: sum(each.numel() for each in found[1].parameters()))


def matrices(prefix: str, layer: nn.Module) -> list[Matrix]:
    """The linear layers inside a decoder layer.

    Raises:
        InputError: if there is none, or if the layer has weights of another form, which would be
            missed: convolutions, or a mixture's experts in one tensor.
    """
    for module_name, module in layer.named_modules(prefix=prefix):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2 or (isinstance(module, Conv1D) and name == "weight"):
                raise InputError(
                    "model",
                    f"{module_name}.{name}",
                    f"has shape {list(parameter.shape)} and is no nn.Linear's weight; convolutions "
                    "and experts in one tensor cannot be pruned",
                )
    found = [
        Matrix(name=name, linear=module)
        for name, module in layer.named_modules(prefix=prefix)
        if isinstance(module, nn.Linear)
    ]
    if not found:
        raise InputError("model", prefix, "has no linear layer to prune")
    return found


@torch.no_grad()
def walk(
    model: nn.Module,
    windows: Tensor | None,
    statistics: tuple[str, ...],
    visit: Visit,
    batch_size: int | None = None,
    restore: Restore = lambda number, found: False,
) -> None:
    """Visit every decoder layer in order, with statistics of its matrices' inputs.

    The statistics come from the layer with its own matrices still dense and all layers below
    pruned. Matrices that read the same tensor share them.

    Args:
        model: a causal language model, in evaluation mode.
        windows: token ids `[nsamples, seqlen]`; None visits without any forward pass.
        statistics: names from `pipeline.statistics.STATISTICS`; none visits without any forward
            pass too.
        batch_size: windows of a forward pass, by default as many as have `BATCH_TOKENS` tokens.
        restore: asked of every layer first; layers that it restores are passed through, but take
            no statistics and no visit.

    Raises:
        InputError: if the model does not call its decoder layers one after another, or leaves a
            matrix out.
        NonFiniteError: if an activation is NaN or infinite.
    """
    root, layers = decoder_layers(model)
    if windows is None or not statistics:
        for number, layer in enumerate(layers):
            found = matrices(f"{root}.{number}", layer)
            if not restore(number, found):
                visit(number, found)
        return
    device = next(model.parameters()).device
    size = batch_size or max(1, BATCH_TOKENS // windows.shape[1])
    batches = torch.split(windows.to(device), size)
    arguments = _arguments(model, layers, batches)
    hidden = [_first_hidden_states(model, layers[0], batch) for batch in batches]
    for number, layer in enumerate(layers):
        found = matrices(f"{root}.{number}", layer)
        if not restore(number, found):
            with _collected(found, statistics, device):
                for states, given in zip(hidden, arguments, strict=True):
                    _forward(layer, states, given[number])
            visit(number, found)
        if number + 1 < len(layers):
            for place, given in enumerate(arguments):  # what the pruned layer passes on
                hidden[place] = _forward(layer, hidden[place], given[number])


# ------------------------------------------------------------------------------- what layers get


@dataclass(frozen=True)
class _Arguments:
    """All that a decoder layer is called with besides hidden states."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]


class _Stop(Exception):
    """The way out of a forward pass."""


def _arguments(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor]
) -> list[list[_Arguments]]:
    """For each batch, what each layer is called with.

    Masks and rotary tables are the same for all batches of a size and captured once. In models that
    pass on what depends on the tokens (embeddings of each layer, shared keys and values) they are
    captured batch by batch; the first and the last full batch tell.
    """
    full = [batch for batch in batches if len(batch) == len(batches[0])]
    first = _layer_arguments(model, layers, full[0])
    rest = [_layer_arguments(model, layers, batch) for batch in batches[len(full) :]]
    if len(full) == 1:
        return [first, *rest]
    last = _layer_arguments(model, layers, full[-1])
    if _same_tensors(first, last):
        return [first] * len(full) + rest
    middle = [_layer_arguments(model, layers, batch) for batch in full[1:-1]]
    return [first, *middle, last, *rest]


def _layer_arguments(model: nn.Module, layers: nn.ModuleList, batch: Tensor) -> list[_Arguments]:
    """What each layer is called with; masks and rotary tables may differ from layer to layer."""
    captured: list[_Arguments] = []
    called: list[nn.Module] = []

    def capture(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        captured.append(_split(positional, keywords)[1])
        called.append(module)
        if module is layers[-1]:
            raise _Stop

    _run_hooked(model, list(layers), capture, batch)
    if called != list(layers):
        remedy = "does not call its decoder layers one after another, once each; cannot be walked"
        raise InputError("model", type(model).__name__, remedy)
    return captured


def _first_hidden_states(model: nn.Module, layer: nn.Module, batch: Tensor) -> Tensor:
    found: list[Tensor] = []

    def capture(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(_split(positional, keywords)[0])
        raise _Stop

    _run_hooked(model, [layer], capture, batch)
    return found[0]


def _run_hooked(
    model: nn.Module,
    layers: list[nn.Module],
    capture: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    batch: Tensor,
) -> None:
    handles = [layer.register_forward_pre_hook(capture, with_kwargs=True) for layer in layers]
    try:
        with contextlib.suppress(_Stop):
            model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _split(positional: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, _Arguments]:
    if positional:
        return positional[0], _Arguments(positional[1:], keywords)
    rest = {name: value for name, value in keywords.items() if name != "hidden_states"}
    return keywords["hidden_states"], _Arguments((), rest)


def _same_tensors(one: object, two: object) -> bool:
    pairs = itertools.zip_longest(_tensors(one), _tensors(two))
    return all(
        left is not None and right is not None and left.equal(right) for left, right in pairs
    )


def _tensors(value: object) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case _Arguments():
            yield from _tensors((value.positional, value.keywords))
        case Mapping():
            yield from _tensors(tuple(value.values()))
        case list() | tuple():
            for item in value:
                yield from _tensors(item)


def _forward(layer: nn.Module, states: Tensor, given: _Arguments) -> Tensor:
    output = layer(states, *given.positional, **given.keywords)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


# ------------------------------------------------------------------------------------ statistics


@contextlib.contextmanager
def _collected(
    found: list[Matrix], statistics: tuple[str, ...], device: torch.device
) -> Iterator[None]:
    """Sum statistics of all inputs while it is entered; the matrices have them afterwards."""
    sums: dict[int, dict[str, RunningSum]] = {}
    leader_of: dict[int, int] = {}
    first_inputs: dict[int, Tensor] = {}

    def capture(place: int, inputs: Tensor) -> None:
        if place in leader_of:
            first_inputs.clear()  # a later batch: who shares with whom is known
        else:
            leader_of[place] = next(
                (other for other, seen in first_inputs.items() if seen is inputs), place
            )
            first_inputs[place] = inputs
            if leader_of[place] == place:
                width = inputs.shape[-1]
                sums[place] = {name: STATISTICS[name](width, device) for name in statistics}
        if leader_of[place] == place:
            tokens = inputs.reshape(-1, inputs.shape[-1]).float()  # [tokens, in_features]
            for statistic in sums[place].values():
                statistic.update(tokens)

    def hook(place: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: capture(place, inputs[0])

    handles = [
        matrix.linear.register_forward_pre_hook(hook(place)) for place, matrix in enumerate(found)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for place, matrix in enumerate(found):
        if place not in leader_of:
            raise InputError("model", matrix.name, "takes no part in the forward pass")
        shared = sums[leader_of[place]]
        matrix.statistics = {name: statistic.total for name, statistic in shared.items()}
        for name, total in matrix.statistics.items():
            if not bool(total.isfinite().all()):
                raise NonFiniteError(f"{matrix.name}: its input has NaN or infinite {name}")
