"""The walk that published codebases share, for a Llama: one window at a time.

The windows pass a decoder layer, and hooks gather statistics for each `nn.Linear` on its own. Its
weights are pruned. The windows pass again, and the outputs are the next layer's inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baseline.choice import PlainChoice


@dataclass(frozen=True)
class Method:
    """What the walk calls of a pruning method."""

    statistics: Callable[[int, torch.device], Any] | None
    """Makes the statistics of a linear layer's input, which `update` fills; None takes no data."""

    choose: Callable[[str, Tensor, Any, float, tuple[int, int] | None], PlainChoice]
    """Takes the linear layer's name in its decoder layer, its weight, its statistics, the sparsity
    and the pattern (kept, group)."""


@torch.no_grad()
def prune_plainly(
    model: nn.Module,
    windows: Tensor,
    method: Method,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> None:
    """Prune a Llama in place with windows `[nsamples, seqlen]`."""
    layers: Any = model.model.layers  # type: ignore[union-attr]
    if method.statistics is None:
        for layer in layers:
            prune_layer(layer, dict.fromkeys(linears(layer)), method, sparsity, pattern)
        return
    states, keywords = first_states(model, windows)
    for layer in layers:
        statistics = gather_statistics(layer, states, keywords, method)
        prune_layer(layer, statistics, method, sparsity, pattern)
        states = forward(layer, states, keywords)


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return a decoder layer's linear layers by name."""
    return {name: part for name, part in layer.named_modules() if type(part) is nn.Linear}


def first_states(model: Any, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return the first decoder layer's inputs: hidden states `[nsamples, seqlen, hidden]`, and the
    keyword arguments of the last window, which are the same for all."""
    layers = model.model.layers
    states = torch.zeros(*windows.shape, model.config.hidden_size)
    states = states.to(model.device, model.dtype)
    catcher = _Catcher()
    first, layers[0] = layers[0], catcher
    for number, window in enumerate(windows):
        try:
            model(window[None].to(model.device), use_cache=False)
        except _Caught:
            states[number] = catcher.states
    layers[0] = first
    return states, catcher.keywords


class _Caught(Exception):
    """Ends a forward pass."""


class _Catcher(nn.Module):
    """Takes the place of the first decoder layer and keeps its inputs."""

    def forward(self, states: Tensor, **keywords: Any) -> Tensor:
        self.states, self.keywords = states, keywords
        raise _Caught


def gather_statistics(
    layer: nn.Module, states: Tensor, keywords: dict[str, Any], method: Method
) -> dict[str, Any]:
    """Return the statistics of each linear layer's input."""
    assert method.statistics is not None
    statistics = {
        name: method.statistics(linear.in_features, states.device)
        for name, linear in linears(layer).items()
    }

    def add(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        statistics[name].update(inputs[0].reshape(-1, inputs[0].shape[-1]))

    handles = [
        linear.register_forward_hook(partial(add, name)) for name, linear in linears(layer).items()
    ]
    forward(layer, states, keywords)
    for handle in handles:
        handle.remove()
    return statistics


def prune_layer(
    layer: nn.Module,
    statistics: dict[str, Any],
    method: Method,
    sparsity: float,
    pattern: tuple[int, int] | None,
) -> dict[str, PlainChoice]:
    """Prune a decoder layer's linear layers in place."""
    choices: dict[str, PlainChoice] = {}
    for name, linear in linears(layer).items():
        weight = linear.weight.data
        choice = method.choose(name, weight, statistics[name], sparsity, pattern)
        if choice.weight is not None:
            weight.copy_(choice.weight)
        weight[choice.mask] = 0
        choices[name] = choice
    return choices


def forward(layer: nn.Module, states: Tensor, keywords: dict[str, Any]) -> Tensor:
    """Return a decoder layer's outputs for all windows, `[nsamples, seqlen, hidden]`."""
    outputs = torch.zeros_like(states)
    for number in range(len(states)):
        outputs[number] = layer(states[number][None], **keywords)[0]
    return outputs
