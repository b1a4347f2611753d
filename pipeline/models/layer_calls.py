"""The arguments of a model's decoder layers, captured once, to call the layers one by one."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.models.hidden_states import StoredTensor, TensorStore


@dataclass(frozen=True)
class _Call:
    """One call of a decoder layer by its model."""

    layer: int
    states: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """All but the hidden states: positional and by keyword."""


@dataclass(frozen=True)
class _PassedOn:
    """Stands for what a layer returns besides its hidden states, in the arguments of the next."""

    layer: int
    place: int
    """Its index in the layer's output."""


OutputForm = Callable[[int, Tensor], Any]
"""Wraps hidden states, given a layer's number, as that layer's output."""


def states_of(output: Any) -> Tensor:
    """Return the hidden states of what a module returns: a tensor, or the first of several."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


class CapturedBatch:
    """The hidden states of some texts on their way up, and each layer's other arguments."""

    def __init__(
        self, states: StoredTensor, arguments: list[Any], form: OutputForm, store: TensorStore
    ) -> None:
        self._states = states
        self._arguments = arguments
        self._form = form
        self._store = store
        self._passed: dict[int, Any] = {}  # by index in the output of the layer below

    def forward(self, number: int, layer: Callable[..., Any]) -> Any:
        """Return the output of the decoder layer with that number on the hidden states below it."""
        positional, keywords = _read(self._arguments[number], self._passed)
        return layer(self._states.read(), *positional, **keywords)

    def advance(self, number: int, layer: nn.Module) -> None:
        """Replace the hidden states by that layer's output, and store what else it passes on to the
        next layer."""
        output = self.forward(number, layer)
        self._states = self._store.store(states_of(output), self._states)
        for each in _passed_on(self._arguments[number + 1 : number + 2]):
            before = self._passed.get(each.place)
            self._passed[each.place] = self._stored(before, output[each.place])

    @contextlib.contextmanager
    def passed_layers(self, layers: nn.ModuleList) -> Iterator[None]:
        """Let the layers return the hidden states, so that a forward pass of the model computes
        only what comes after the layers."""
        states = self._states.read()

        def forward(number: int, given: Any, *arguments: Any) -> Any:
            return self._form(number, states if number + 1 == len(layers) else given)

        with _replaced(layers, forward):
            yield

    def _stored(self, before: Any, value: Any) -> Any:
        """Store a tensor in the place of one of the same shape, if there is one."""
        if not isinstance(value, Tensor):
            return value
        return self._store.store(value, before if isinstance(before, StoredTensor) else None)


def capture_batches(
    model: nn.Module,
    layers: nn.ModuleList,
    batches: Sequence[Mapping[str, Tensor]],
    store: TensorStore,
) -> list[CapturedBatch]:
    """Capture the hidden states that enter the first layer, and all other arguments of each layer.
    No layer is run for it.

    Masks and rotary tables are mostly those of the first batch, and held once, on the device.
    Arguments that differ between batches (embeddings of each layer) go where the hidden states go,
    and so does what a layer passes to the next one besides them (a router's states, chosen keys).
    Objects of other kinds, through which layers share tensors (keys and values), are passed on as
    they are, one to a batch.

    Args:
        batches: the model's inputs, where its embeddings are: token ids `[texts, tokens]` as
            `input_ids`, and an attention mask of the same shape if the model is to have one.

    Raises:
        InputError: if the model does not hand the hidden states from one layer to the next and
            call each once, or if a layer's other arguments depend on the layers below, unless they
            are outputs of the one right below.
    """
    form = _output_form(model, layers, {name: each[:1] for name, each in batches[0].items()})
    captured: list[CapturedBatch] = []
    first: Any = None

    def place(tensor: Tensor, other: Any) -> Any:
        if first is None:
            return tensor.to(store.device)
        return other if _equal(other, tensor) else store.store(tensor)

    for batch in batches:
        calls = _calls(model, layers, batch, form, then_stop=True)
        arguments = [call.arguments for call in calls]
        placed = _replaced_tensors(arguments, first, place, {})
        first = first or placed
        captured.append(CapturedBatch(store.store(calls[0].states), placed, form, store))
    return captured


@contextlib.contextmanager
def skipped_layers(
    model: nn.Module, layers: nn.ModuleList, batch: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let the layers return the hidden states that they are given, without being run.

    Args:
        batch: inputs of the model, with which the form of the layers' output is found.

    Raises:
        InputError: if the model changes the hidden states between its layers.
    """
    form, _ = _accepted_form(model, layers, batch)
    with _replaced(layers, lambda number, states, *arguments: form(number, states)):
        yield


class _Stop(Exception):
    """Ends a forward pass."""


class _WrongFormError(Exception):
    """The model fails on a stand-in for a layer's output."""


def _calls(
    model: nn.Module,
    layers: nn.ModuleList,
    batch: Mapping[str, Tensor],
    output: OutputForm,
    then_stop: bool = False,
) -> list[_Call]:
    """Record the model's calls of its layers, with each returning `output` of its hidden states.

    Args:
        then_stop: stop at the last layer; else run on, to see whether a layer is called again.

    Raises:
        _WrongFormError: if the model fails on the output, with any error.
    """
    calls: list[_Call] = []

    def record(number: int, states: Any, *arguments: Any) -> Any:
        calls.append(_Call(number, states, arguments))
        if then_stop and number + 1 == len(layers):
            raise _Stop
        return output(number, states)

    with _replaced(layers, record), contextlib.suppress(_Stop):
        try:
            model(**batch, use_cache=False)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as e:
            if calls:
                raise _WrongFormError from e
            raise
    if [call.layer for call in calls] != list(range(len(layers))):
        remedy = "does not call its decoder layers one after another, once each; cannot be walked"
        raise InputError("model", type(model).__name__, remedy)
    return calls


@contextlib.contextmanager
def _replaced(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the layers' forward functions. The layers stay: models read their attributes.

    Args:
        forward: takes a layer's number, hidden states, and the other arguments: positional ones
            and those by keyword.
    """

    def stand_in(number: int, *positional: Any, **keywords: Any) -> Any:
        if positional:
            return forward(number, positional[0], positional[1:], keywords)
        return forward(number, keywords.pop("hidden_states"), positional, keywords)

    own = [vars(layer).get("forward") for layer in layers]
    for number, layer in enumerate(layers):
        vars(layer)["forward"] = functools.partial(stand_in, number)
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if before is not None:
                vars(layer)["forward"] = before


def _output_form(model: nn.Module, layers: nn.ModuleList, text: Mapping[str, Tensor]) -> OutputForm:
    """Find the form in which the model takes a layer's hidden states: a tensor, or the first of a
    tuple or a list. In the right one they reach the next layer unchanged."""
    form, calls = _accepted_form(model, layers, text)
    for call in calls:
        if any(each.layer + 1 != call.layer for each in _passed_on(call.arguments)):
            remedy = f"passes to its decoder layer {call.layer} an output of one further below"
            raise InputError("model", type(model).__name__, f"{remedy}; cannot be walked")
    others = _calls(
        model, layers, text, lambda number, states: form(number, torch.zeros_like(states))
    )
    for one, other in zip(calls, others, strict=True):
        if not _equal(one.arguments, other.arguments):
            remedy = f"passes to its decoder layer {one.layer} what depends on those below"
            raise InputError("model", type(model).__name__, f"{remedy}; cannot be walked")
    return form


def _accepted_form(
    model: nn.Module, layers: nn.ModuleList, text: Mapping[str, Tensor]
) -> tuple[OutputForm, list[_Call]]:
    forms: list[OutputForm] = [lambda number, states: states]
    for kind, outputs in itertools.product((tuple, list), (1, 2, 3)):
        forms.append(functools.partial(_output, kind, outputs))
    for form in forms:
        with contextlib.suppress(_WrongFormError):
            calls = _calls(model, layers, text, form)
            if all(_equal(call.states, calls[0].states) for call in calls):
                return form, calls
    remedy = "changes the hidden states between its decoder layers; cannot be walked"
    raise InputError("model", type(model).__name__, remedy)


def _output(kind: type, outputs: int, number: int, states: Tensor) -> Any:
    return kind([states, *(_PassedOn(number, place) for place in range(1, outputs))])


# -------------------------------------------------------------------------- arguments and tensors


def _equal(one: Any, other: Any) -> bool:
    """Return whether all tensors are equal, NaN to NaN; objects that are neither tensors nor
    collections do not count."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and (one.shape, one.dtype) == (other.shape, other.dtype)
            and _equal_tensors(one, other.to(one.device))
        )
    if type(one) is not type(other):
        return False
    left, right = _items(one), _items(other)
    return len(left) == len(right) and all(map(_equal, left, right))


def _equal_tensors(one: Tensor, other: Tensor) -> bool:
    if one.equal(other):
        return True
    return one.is_floating_point() and one.allclose(other, rtol=0, atol=0, equal_nan=True)


def _passed_on(value: Any) -> list[_PassedOn]:
    if isinstance(value, _PassedOn):
        return [value]
    return [found for item in _items(value) for found in _passed_on(item)]


def _items(value: Any) -> list[Any]:
    kind = type(value)
    return list(value.values() if kind is dict else value) if kind in (dict, list, tuple) else []


def _with_items(value: Any, items: list[Any]) -> Any:
    """Return a collection with other items; itself if these are its own, since layers may write to
    it."""
    if all(one is other for one, other in zip(items, _items(value), strict=True)):
        return value
    if isinstance(value, dict):
        return dict(zip(value, items, strict=True))
    return tuple(items) if isinstance(value, tuple) else items


def _replaced_tensors(
    value: Any, first: Any, replace: Callable[[Tensor, Any], Any], done: dict[int, Any]
) -> Any:
    """Replace each tensor in a value.

    Args:
        first: the first batch's value in the same place; `replace` takes its tensors too.
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


def _read(value: Any, passed: dict[int, Any]) -> Any:
    if isinstance(value, _PassedOn):
        value = passed[value.place]
    if isinstance(value, StoredTensor):
        return value.read()
    return _with_items(value, [_read(item, passed) for item in _items(value)])
