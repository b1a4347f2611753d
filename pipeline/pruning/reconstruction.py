"""Reconstruction: the kept weights of a pruned layer, refined by gradients (arXiv 2510.14444)."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from pipeline.errors import InputError, NonFiniteError
from pipeline.models.hidden_states import StoredTensor, TensorStore
from pipeline.models.layer_calls import capture_batches, states_of
from pipeline.models.matrices import Matrix, decoder_layers, holders, is_finite
from pipeline.pruning.gradients import trainable, with_weights
from pipeline.pruning.walk import check_windows
from pipeline.pruning.window_groups import Memory, eager_experts
from pipeline.specs import ReconstructionOptions

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises to its full value; afterwards it falls to
zero. Both are linear, as in the authors' code."""


@dataclass(frozen=True)
class Part:
    """A part of a decoder layer whose output is matched."""

    name: str
    """Its path in the layer; empty for the layer itself."""

    module: nn.Module

    parameters: Mapping[str, nn.Parameter]
    """By path in the part, those that hold matrices."""

    matrices: Sequence[str]
    """Names of the matrices."""


class Fit(NamedTuple):
    """What kept weights are fitted to, and how."""

    options: ReconstructionOptions

    windows: Tensor
    """Token ids `[nsamples, seqlen]`."""


_Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Arguments of a part's call, hidden states in a store."""


class Reconstructor:
    """Takes calibration windows up through the pruned layers, and fits the kept weights of each to
    what the dense layer makes of the same hidden states.

    Use it as a context: hidden states are stored for as long. For each decoder layer in turn call
    `remember` with the dense layer, `refine` if it was pruned just now, and `advance`.

    Args:
        model: a causal language model, in evaluation mode.
        memory: where hidden states are held; a batch has the windows of a step.

    Raises:
        InputError: as `pipeline.models.layer_calls.capture_batches` and
            `pipeline.pruning.walk.check_windows` do.
    """

    def __init__(self, model: nn.Module, fit: Fit, memory: Memory) -> None:
        check_windows(model, fit.windows)
        self._root, self._layers = decoder_layers(model)
        self._options = fit.options
        home = next(each.device for each in model.parameters() if not each.is_meta)
        device = memory.device or home
        parts = torch.split(fit.windows.to(home), fit.options.batch_size)
        inputs = [{"input_ids": part} for part in parts]
        with ExitStack() as entered, torch.no_grad():
            budgets = (memory.device_hidden_bytes, memory.host_hidden_bytes)
            self._store = entered.enter_context(TensorStore(device, *budgets))
            entered.enter_context(eager_experts(model))
            self._batches = capture_batches(model, self._layers, inputs, self._store)
            self._targets: list[dict[str, StoredTensor]] = [{} for _ in inputs]
            self._inputs: list[list[StoredTensor]] = [[] for _ in inputs]
            self._parts: list[Part] = []
            self._exit = entered.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    @torch.no_grad()
    def remember(self, number: int, found: Sequence[Matrix]) -> None:
        """Run a decoder layer that is still dense, and store the outputs of its parts.

        Raises:
            InputError: if the layer does not call each part once.
        """
        layer = self._layers[number]
        parts = parts_of(f"{self._root}.{number}", layer, found)
        for batch, targets in zip(self._batches, self._targets, strict=True):
            with _outputs_of(parts) as outputs:
                batch.forward(number, layer)
            order = [part.name for part, _ in outputs]
            for part in parts:
                if order.count(part.name) != 1:
                    times = f"is called {order.count(part.name)} times by its decoder layer"
                    where = f"{self._root}.{number}.{part.name}"
                    raise InputError("model", where, f"{times}; leave reconstruction out")
            for part, output in outputs:
                targets[part.name] = self._store.store(output, targets.get(part.name))
        self._parts = sorted(parts, key=lambda part: order.index(part.name))

    def refine(self, number: int) -> dict[str, dict[str, float]]:
        """Fit the weights of a pruned layer that are not zero, one part after another.

        A part takes what the pruned parts before it give, and is fitted to its outputs in the dense
        layer by Adam, on the sum of squares. The layer's other weights stay. A part whose error
        does not fall keeps its weights.

        Returns:
            By name of the matrix, facts about its part: `error_before` and `error_after`, the
            squared error of its output over the squares of the dense one, over all windows.

        Raises:
            NonFiniteError: if a weight becomes NaN or infinite.
        """
        facts = {}
        for part in self._parts:
            errors = self._fit(number, part)
            facts.update(dict.fromkeys(part.matrices, errors))
        return facts

    @torch.no_grad()
    def advance(self, number: int) -> None:
        """Replace the hidden states by the output of the decoder layer, now pruned."""
        for batch in self._batches:
            batch.advance(number, self._layers[number])

    def _fit(self, number: int, part: Part) -> dict[str, float]:
        calls = [self._call(number, part, place) for place in range(len(self._batches))]
        weights = trainable(part.parameters)
        kept = {name: weight != 0 for name, weight in weights.items()}
        before = self._error(part, calls, weights)
        optimizer = torch.optim.Adam(weights.values(), lr=self._options.learning_rate, fused=True)
        rate = functools.partial(_rate, self._options.epochs * len(calls))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        for _ in range(self._options.epochs):
            for place, call in enumerate(calls):
                with torch.enable_grad():
                    error, _ = self._squares(part, place, call, weights)
                torch.autograd.backward(error)
                for name, weight in weights.items():
                    if weight.grad is not None:
                        weight.grad.mul_(kept[name])
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        after = self._error(part, calls, weights)
        for name, weight in weights.items():
            if not is_finite(weight.detach()):
                where = ".".join(filter(None, [self._root, str(number), part.name, name]))
                raise NonFiniteError(f"{where}: reconstruction diverged; lower its learning_rate")
        if after >= before:
            return {"error_before": before, "error_after": before}
        with torch.no_grad():
            for name, parameter in part.parameters.items():
                parameter.copy_(weights[name])
        return {"error_before": before, "error_after": after}

    @torch.no_grad()
    def _call(self, number: int, part: Part, place: int) -> _Call:
        """Run a layer until it calls a part, and return the arguments. Hidden states among them are
        stored; masks and rotary tables, which batches share, stay where they are."""
        states = self._targets[place][part.name]
        stored = iter(self._inputs[place])
        kept: list[StoredTensor] = []

        def keep(value: Any) -> Any:
            if not isinstance(value, Tensor) or not states.follows(value):
                return value
            kept.append(self._store.store(value, next(stored, None)))
            return kept[-1]

        with _arguments_of(part) as found, suppress(_ReachedError):
            self._batches[place].forward(number, self._layers[number])
        positional, keywords = found
        call = (
            [keep(each) for each in positional],
            {name: keep(keywords[name]) for name in keywords},
        )
        self._inputs[place] = kept + list(stored)
        return call

    @torch.no_grad()
    def _error(self, part: Part, calls: Sequence[_Call], weights: Mapping[str, Tensor]) -> float:
        sums = [
            torch.stack(self._squares(part, place, call, weights)).double()
            for place, call in enumerate(calls)
        ]
        error, size = torch.stack(sums).sum(dim=0).tolist()
        return float(error / size) if size else 0.0

    def _squares(
        self, part: Part, place: int, call: _Call, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the squared error of a part's output for one batch, and the target's squares."""
        positional = [_read(each) for each in call[0]]
        keywords = {name: _read(each) for name, each in call[1].items()}
        with with_weights(part.module, weights) as run:
            output = states_of(run(*positional, **keywords)).float()
        wanted = self._targets[place][part.name].read().float()
        return (output - wanted).square().sum(), wanted.square().sum()


def parts_of(prefix: str, layer: nn.Module, found: Sequence[Matrix]) -> list[Part]:
    """Return the parts of a decoder layer that are fitted: its direct children with matrices, such
    as attention and MLP.

    Where such a child is a matrix itself, as the MLP's two are in an OPT, the layer is one part: a
    matrix alone has no nonlinearity between it and what it could make up for.
    """
    inside = holders(layer, found)
    children = {name.partition(".")[0] for name in inside}
    modules = {name: layer.get_submodule(name) for name in children}
    if any(f"{name}.weight" in inside for name in children):
        modules = {"": layer}
    parts = []
    for name, module in modules.items():
        start = f"{prefix}.{name}." if name else f"{prefix}."
        own = [matrix for matrix in found if matrix.name.startswith(start)]
        parts.append(Part(name, module, holders(module, own), [each.name for each in own]))
    return parts


class _ReachedError(Exception):
    """Ends a forward pass before a part."""


@contextmanager
def _outputs_of(parts: Sequence[Part]) -> Iterator[list[tuple[Part, Tensor]]]:
    """Collect the hidden states that parts return, in the order of their calls."""
    outputs: list[tuple[Part, Tensor]] = []

    def take(part: Part, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append((part, states_of(output)))

    with ExitStack() as hooks:
        for part in parts:
            handle = part.module.register_forward_hook(functools.partial(take, part))
            hooks.callback(handle.remove)
        yield outputs


@contextmanager
def _arguments_of(part: Part) -> Iterator[list[Any]]:
    """Collect the positional arguments of a part's call, and those by keyword; end the pass."""
    found: list[Any] = []

    def take(module: nn.Module, positional: Any, keywords: Any) -> None:
        found.extend((positional, keywords))
        raise _ReachedError

    handle = part.module.register_forward_pre_hook(take, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, StoredTensor) else value


def _rate(steps: int, step: int) -> float:
    """Return the share of the learning rate at a step, from 0."""
    rising = max(1, int(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)
