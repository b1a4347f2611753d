"""What a model calls its decoder layers with, captured once and called again layer by layer."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.hidden import Kept, Shelf


@dataclass(frozen=True)
class _Call:
    """One call of a decoder layer by its model."""

    layer: int
    states: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """All but the hidden states: positional and by keyword."""


class CapturedBatch:
    """The hidden states of some windows on their way up, and what goes with them to each layer."""

    def __init__(self, states: Kept, arguments: list[Any]) -> None:
        self._states = states
        self._arguments = arguments

    def forward(self, number: int, layer: nn.Module) -> Tensor:
        """The output of the decoder layer with that number, on the hidden states below it."""
        positional, keywords = _read(self._arguments[number])
        output = layer(self._states.read(), *positional, **keywords)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def rise(self, number: int, layer: nn.Module) -> None:
        """Put the output of that layer in the place of its hidden states."""
        self._states.write(self.forward(number, layer))


def capture(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor], shelf: Shelf
) -> list[CapturedBatch]:
    """The hidden states that enter the first layer, and all else that the model passes to each
    layer, whatever its name. No layer is run for it.

    Masks and rotary tables are mostly those of the first batch, and held once, on the device. What
    differs between batches (embeddings of each layer) goes where the hidden states go. Objects of
    other kinds, through which layers hand each other tensors (shared keys and values), are passed
    on as they are, one to a batch.

    Args:
        batches: token ids `[windows, seqlen]` each, where the model's embeddings are.

    Raises:
        InputError: if the model does not hand the hidden states from one layer to the next, each
            called once, or passes to a layer what depends on the layers below.
    """
    output = _form_of_outputs(model, layers, batches[0][:1])
    captured: list[CapturedBatch] = []
    first: Any = None

    def place(tensor: Tensor, other: Any) -> Any:
        if first is None:
            return tensor.to(shelf.device)
        return other if _same(other, tensor) else shelf.keep(tensor)

    for batch in batches:
        calls = _calls(model, layers, batch, output)
        arguments = [call.arguments for call in calls]
        placed = _replaced_tensors(arguments, first, place, {})
        first = first or placed
        captured.append(CapturedBatch(shelf.keep(calls[0].states), placed))
    return captured


class _Stop(Exception):
    """The way out of a forward pass."""


def _calls(
    model: nn.Module, layers: nn.ModuleList, batch: Tensor, output: Callable[[Tensor], Any]
) -> list[_Call]:
    """The model's calls of its layers, if each returned `output` of its hidden states."""
    calls: list[_Call] = []

    def stand_in(number: int) -> Callable[..., Any]:
        def forward(*positional: Any, **keywords: Any) -> Any:
            if positional:
                states, positional = positional[0], positional[1:]
            else:
                states = keywords.pop("hidden_states")
            calls.append(_Call(number, states, (positional, keywords)))
            if number + 1 == len(layers):
                raise _Stop
            return output(states)

        return forward

    with _replaced(layers, stand_in), contextlib.suppress(_Stop):
        model(input_ids=batch, use_cache=False)
    if [call.layer for call in calls] != list(range(len(layers))):
        remedy = "does not call its decoder layers one after another, once each; cannot be walked"
        raise InputError("model", type(model).__name__, remedy)
    return calls


@contextlib.contextmanager
def _replaced(
    layers: nn.ModuleList, forward: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Other forward functions for the layers: these stay in place, since models look at them."""
    own = [vars(layer).get("forward") for layer in layers]
    for number, layer in enumerate(layers):
        vars(layer)["forward"] = forward(number)
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if before is not None:
                vars(layer)["forward"] = before


def _form_of_outputs(
    model: nn.Module, layers: nn.ModuleList, window: Tensor
) -> Callable[[Tensor], Any]:
    """The form in which the model takes a layer's hidden states, a tensor or a tuple: that which
    reaches the next layer unchanged."""
    forms: list[Callable[[Tensor], Any]] = [lambda states: states, lambda states: (states,)]
    for form in forms:
        calls = _calls(model, layers, window, form)
        if all(_same(call.states, calls[0].states) for call in calls):
            break
    else:
        remedy = "changes the hidden states between its decoder layers; cannot be walked"
        raise InputError("model", type(model).__name__, remedy)
    others = _calls(model, layers, window, lambda states: form(torch.zeros_like(states)))
    for one, other in zip(calls, others, strict=True):
        if not _same(one.arguments, other.arguments):
            remedy = f"passes to its decoder layer {one.layer} what depends on those below"
            raise InputError("model", type(model).__name__, f"{remedy}; cannot be walked")
    return form


# -------------------------------------------------------------------------- arguments and tensors


def _same(one: Any, other: Any) -> bool:
    """Whether all tensors are equal; what is neither a tensor nor a collection does not count."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and (one.shape, one.dtype) == (other.shape, other.dtype)
            and one.equal(other.to(one.device))
        )
    if type(one) is not type(other):
        return False
    left, right = _items(one), _items(other)
    return len(left) == len(right) and all(map(_same, left, right))


def _items(value: Any) -> list[Any]:
    kind = type(value)
    return list(value.values() if kind is dict else value) if kind in (dict, list, tuple) else []


def _with_items(value: Any, items: list[Any]) -> Any:
    """A collection with other items; itself if these are its own, since layers may write to it."""
    if all(one is other for one, other in zip(items, _items(value), strict=True)):
        return value
    if isinstance(value, dict):
        return dict(zip(value, items, strict=True))
    return tuple(items) if isinstance(value, tuple) else items


def _replaced_tensors(
    value: Any, first: Any, replace: Callable[[Tensor, Any], Any], done: dict[int, Any]
) -> Any:
    """A value with each of its tensors replaced.

    Args:
        first: what another batch has in the value's place; `replace` is given its tensors too.
        done: the replaced objects so far, by identity: most arguments go to all layers.
    """
    if id(value) not in done:
        if isinstance(value, Tensor):
            done[id(value)] = replace(value, first)
        else:
            items = _items(value)
            others = _items(first) if type(first) is type(value) else []
            pairs = itertools.zip_longest(items, others[: len(items)])
            done[id(value)] = _with_items(
                value, [_replaced_tensors(*pair, replace, done) for pair in pairs]
            )
    return done[id(value)]


def _read(value: Any) -> Any:
    if isinstance(value, Kept):
        return value.read()
    return _with_items(value, [_read(item) for item in _items(value)])
