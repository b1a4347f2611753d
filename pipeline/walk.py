"""The walk through a decoder, layer by layer, each seeing the pruned layers below it.

Nothing here knows a model's class: the decoder layers are found by structure, and every argument
that the model passes to them is captured and passed again.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.statistics import STATISTICS, Statistic

BATCH_TOKENS = 16_384
"""Tokens of a batch. Fixed, since sums depend on how they are split."""


class NonFiniteError(ValueError):
    """A weight or an activation is NaN or infinite; the message names the matrix."""


@dataclass
class Matrix:
    """A linear layer inside a decoder layer, and the statistics of its input."""

    name: str
    """Its full name in the model."""
    linear: nn.Linear
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


Visit = Callable[[int, list[Matrix]], None]
"""Prunes the matrices of the decoder layer with that number, in place."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's decoder layers: the largest list of like modules with
    linear layers in them.

    Raises:
        InputError: if there is none.
    """
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(layer) for layer in module}) == 1
        and any(isinstance(part, nn.Linear) for part in module.modules())
    ]
    if not candidates:
        raise InputError("model", type(model).__name__, "has no list of decoder layers to prune")
    return max(candidates, key=lambda found: sum(each.numel() for each in found[1].parameters()))


def matrices(prefix: str, layer: nn.Module) -> list[Matrix]:
    """The linear layers inside a decoder layer.

    Raises:
        InputError: if the layer holds weights of experts in one tensor, which would be missed.
    """
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 2:
            raise InputError(
                "model",
                f"{prefix}.{name}",
                f"has shape {list(parameter.shape)}; experts in one tensor cannot be pruned",
            )
    return [
        Matrix(name=f"{prefix}.{name}", linear=module)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]


@torch.no_grad()
def walk(
    model: nn.Module, windows: Tensor | None, statistics: tuple[str, ...], visit: Visit
) -> None:
    """Visit every decoder layer in order, with statistics of its matrices' inputs.

    The statistics come from the layer with its own matrices still dense and all layers below
    pruned. Matrices that read the same tensor share them.

    Args:
        model: a causal language model, in evaluation mode.
        windows: token ids `[nsamples, seqlen]`; None visits without any forward pass.
        statistics: names from `pipeline.statistics.STATISTICS`.

    Raises:
        NonFiniteError: if an activation is NaN or infinite.
    """
    root, layers = decoder_layers(model)
    if windows is None:
        for number, layer in enumerate(layers):
            visit(number, matrices(f"{root}.{number}", layer))
        return
    device = next(model.parameters()).device
    size = max(1, BATCH_TOKENS // windows.shape[1])
    batches = list(torch.split(windows.to(device), size))
    arguments = {len(batch): _layer_arguments(model, layers, batch) for batch in batches[::-1]}
    hidden = [_first_hidden_states(model, layers[0], batch) for batch in batches]
    for number, layer in enumerate(layers):
        calls = [(states, arguments[len(states)][number]) for states in hidden]
        found = matrices(f"{root}.{number}", layer)
        with _collected(found, statistics, device):
            for states, given in calls:
                _forward(layer, states, given)
        visit(number, found)
        for place, (states, given) in enumerate(calls):
            hidden[place] = _forward(layer, states, given)  # what the pruned layer passes on


# ------------------------------------------------------------------------------- what layers get


@dataclass(frozen=True)
class _Arguments:
    """All that a decoder layer is called with besides hidden states."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]


class _Stop(Exception):
    """The way out of a forward pass."""


def _layer_arguments(model: nn.Module, layers: nn.ModuleList, batch: Tensor) -> list[_Arguments]:
    """What each layer is called with; masks and rotary tables may differ from layer to layer, but
    not between batches of full windows of one size."""
    captured: list[_Arguments] = []

    def capture(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        _, arguments = _split(positional, keywords)
        captured.append(arguments)

    handles = [layer.register_forward_pre_hook(capture, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return captured


def _first_hidden_states(model: nn.Module, layer: nn.Module, batch: Tensor) -> Tensor:
    found: list[Tensor] = []

    def capture(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(_split(positional, keywords)[0])
        raise _Stop

    handle = layer.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        model(input_ids=batch, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0]


def _split(positional: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, _Arguments]:
    if positional:
        return positional[0], _Arguments(positional[1:], keywords)
    rest = {name: value for name, value in keywords.items() if name != "hidden_states"}
    return keywords["hidden_states"], _Arguments((), rest)


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
    sums: dict[int, dict[str, Statistic]] = {}
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
        shared = sums[leader_of[place]]
        matrix.statistics = {name: statistic.result() for name, statistic in shared.items()}
        for name, statistic in matrix.statistics.items():
            if not bool(statistic.isfinite().all()):
                raise NonFiniteError(f"{matrix.name}: its input has NaN or infinite {name}")
