"""The matrices of a decoder layer, found by the form of its parameters, not by class names."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import InputError

STARVED_TOKENS = 32
"""An expert that saw fewer tokens is pruned by its weights alone."""


@dataclass
class Matrix:
    """A weight that multiplies activations, and the statistics of its input."""

    name: str
    """In the model: its module's name or, in a tensor of experts, `<parameter>.<expert>`."""

    weight: Tensor
    """`[out_features, in_features]`, a view of the model's own parameter: writing to it changes the
    model. Do not keep it: the layer may move to another device."""

    is_expert: bool = False
    """Whether it belongs to one expert of a mixture, which sees only the tokens routed to it."""

    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """Statistics by their names in `pipeline.pruning.input_statistics.STATISTICS`."""

    tokens: int = 0
    """Tokens that the statistics were summed over."""

    elsewhere: Callable[[], Any] | None = None
    """Waits for another process, which has the statistics, and returns what it made of the matrix;
    None if the statistics are here."""

    @property
    def starved(self) -> bool:
        """Whether it is an expert's, with too few tokens for its statistics to be used."""
        return self.is_expert and bool(self.statistics) and self.tokens < STARVED_TOKENS


@dataclass(frozen=True)
class Dense:
    """A parameter that is never pruned."""

    name: str
    shape: tuple[int, ...]
    why: str
    """What it is, such as `norm`."""


KEPT = {
    ".A_log": "state of a recurrence",
    ".D": "state of a recurrence",
    ".dt_bias": "state of a recurrence",
    ".dt_proj_bias": "state of a recurrence",  # Zamba has one per head
    ".dt_proj_weight": "state of a recurrence",
    ".x_proj_weight": "state of a recurrence",
    ".recurrent_param": "state of a recurrence",  # RecurrentGemma has one per head
    ".recurrent_gate_weight": "state of a recurrence",
    ".recurrent_gate_bias": "state of a recurrence",
    ".input_gate_weight": "state of a recurrence",
    ".input_gate_bias": "state of a recurrence",
    ".time_decay": "state of a recurrence",  # RWKV
    ".time_first": "state of a recurrence",
    ".time_mix_key": "state of a recurrence",
    ".time_mix_value": "state of a recurrence",
    ".time_mix_receptance": "state of a recurrence",
    ".position_bias": "positions",  # DeepSeek-V4
    ".rel_logits_proj.proj": "positions",  # Inkling
    "_hc.fn": "mixing of residual streams",  # DeepSeek-V4's hyper-connections
    ".modality_router.weight": "mixing of residual streams",  # Gemma 3n's alternating updates
    ".correction_coefs.weight": "mixing of residual streams",
    ".prediction_coefs.weight": "mixing of residual streams",
    ".input_mix_weight_down.weight": "mixing of residual streams",  # Qwen4
    ".input_mix_weight_up.weight": "mixing of residual streams",
    ".block_inject_weight.weight": "mixing of residual streams",
}
"""Endings of names that stay dense, and why: tensors outside linear layers, and the few linear
layers that mix streams as routers mix experts."""


def is_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite: one pass, unless their sum is too large."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return a model's decoder layers and their name: the list of modules with the most weights.

    Raises:
        InputError: if there is no such list.
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
    """Return the matrices of a decoder layer that are pruned: the weights of all linear layers.

    These are the weights of `nn.Linear` and of transformers' `Conv1D`, which is stored transposed,
    and the experts of a mixture, as linear layers or stacked in one tensor. All else stays dense;
    see `kept_dense`.

    Raises:
        InputError: if there is none, or if the layer has weights that would be missed: quantized
            ones, experts of an unknown layout, tensors that no rule names.
    """
    found, _ = _classified(prefix, layer)
    if not found:
        raise InputError("model", prefix, "has no linear layer to prune")
    return found


def holders(layer: nn.Module, found: Sequence[Matrix]) -> dict[str, nn.Parameter]:
    """Return the parameters of a decoder layer that hold its matrices, by their paths in it."""
    places = [matrix.weight.data_ptr() for matrix in found]
    return {
        name: parameter
        for name, parameter in layer.named_parameters()
        if any(0 <= place - parameter.data_ptr() < parameter.nbytes for place in places)
    }


def kept_dense(prefix: str, layer: nn.Module) -> list[Dense]:
    """Return the parameters of a decoder layer that are never pruned:

    - embeddings, convolutions, norms with all inside them (A.X's have small linear layers), and
      vectors of any kind, such as biases;
    - routers and gates of a mixture: in a module that holds experts and other weights, a weight
      that stands alone (directly in that module, or the only one in its own) with one output per
      expert, or with outputs that no weight nearby can read, like the one output of a shared
      expert's gate; and all inside a module whose class is called a router;
    - biases of several experts, `[experts, out_features]`;
    - what `KEPT` lists by name.

    Raises:
        InputError: if the layer has weights that `matrices` would miss.
    """
    return _classified(prefix, layer)[1]


def _classified(prefix: str, layer: nn.Module) -> tuple[list[Matrix], list[Dense]]:
    routers, experts = _mixtures(layer)
    norms = {
        parameter
        for module in layer.modules()
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
        for parameter in module.parameters()
    }
    found: list[Matrix] = []
    dense: list[Dense] = []
    seen: set[Tensor] = set()
    for module_name, module in layer.named_modules(prefix=prefix):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:  # some are shared
                continue
            seen.add(parameter)
            full_name = f"{module_name}.{name}"
            if parameter in routers:
                why: str | None = "router"
            elif parameter in norms:
                why = "norm"
            else:
                why = _why_dense(module, full_name, parameter)
            if why is not None:
                dense.append(Dense(full_name, tuple(parameter.shape), why))
                continue
            stacked = (_stacked_experts(module) or _stacked_groups(module)).get(name)
            if stacked is not None:
                views = {f"{full_name}.{number}": view for number, view in enumerate(stacked)}
            elif isinstance(module, nn.Linear | Conv1D):
                views = {module_name: _linear(module)}
            else:
                remedy = (
                    f"has shape {list(parameter.shape)} and belongs to no linear layer and to no "
                    "experts whose layout is known; it cannot be pruned"
                )
                raise InputError("model", full_name, remedy)
            if parameter.dtype.itemsize < 2 or not parameter.is_floating_point():
                remedy = f"is held as {parameter.dtype}; load the model unquantized"
                raise InputError("model", full_name, remedy)
            found += [Matrix(each, view, parameter in experts) for each, view in views.items()]
    return found, dense


def _linear(module: nn.Linear | Conv1D) -> Tensor:
    """Return the weight `[out_features, in_features]`."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _why_dense(module: nn.Module, full_name: str, parameter: Tensor) -> str | None:
    """Return why a parameter outside routers and norms stays dense; None for a matrix."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    for ending, why in KEPT.items():
        if full_name.endswith(ending):
            return why
    if parameter.dim() < 2:
        return "vector"
    stacked = _stacked_experts(module)
    count = len(next(iter(stacked.values()))) if stacked else None
    return "vectors of experts" if parameter.dim() == 2 and len(parameter) == count else None


# -------------------------------------------------------------------------------------- mixtures


def _mixtures(layer: nn.Module) -> tuple[set[Tensor], set[Tensor]]:
    """Return the weights of a layer's routers and gates, and its experts' parameters."""
    routers: set[Tensor] = set()
    experts: set[Tensor] = set()
    for name, module in layer.named_modules():
        stacked = _stacked_experts(module)
        count = len(next(iter(stacked.values()))) if stacked else _modules_of_one_form(module)
        if not name or not count:
            continue
        inside = set(module.parameters())
        found, outputs = _routers(_block(layer, name), inside, count)
        if stacked or count in outputs:  # in a list, if a router chooses
            routers |= found
            experts |= inside
    return routers, experts


def _stacked_experts(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's stacked experts `[experts, out_features, in_features]` by parameter name.

    Most classes say whether they are transposed; `LAYOUTS` lists the others.
    """
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return _transposed(module) if transposed else _as_they_are(module)
    layout = LAYOUTS.get(type(module).__name__)
    return {} if layout is None else layout(module)


def _stacked_groups(module: Any) -> dict[str, Tensor]:
    """Return the groups of a linear layer in which each has its own inputs (DeepSeek-V4)."""
    if type(module).__name__ != "DeepseekV4GroupedLinear":
        return {}
    weight = module.weight.detach()
    return {"weight": weight.view(module.n_groups, -1, weight.shape[1])}


def _as_they_are(module: nn.Module) -> dict[str, Tensor]:
    own = module.named_parameters(recurse=False)
    return {name: each.detach() for name, each in own if each.dim() == 3}


def _transposed(module: nn.Module) -> dict[str, Tensor]:
    return {name: each.mT for name, each in _as_they_are(module).items()}


def _dbrx(module: Any) -> dict[str, Tensor]:
    """Split tensors of all experts, `[experts * ffn_hidden_size, hidden_size]`."""
    shape = (-1, module.ffn_hidden_size, module.hidden_size)
    w1, v1, w2 = (each.detach().view(shape) for each in (module.w1, module.v1, module.w2))
    return {"w1": w1, "v1": v1, "w2": w2.mT}


LAYOUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "Llama4TextExperts": _transposed,
    "JetMoeParallelExperts": _as_they_are,
    "LongcatFlashExperts": _as_they_are,
    "InklingSharedExperts": _as_they_are,
    "DbrxExpertGLU": _dbrx,
}
"""By class name, how transformers' classes without `is_transposed` hold their experts."""


def _modules_of_one_form(module: nn.Module) -> int:
    """Return the number of modules in a list if all have parameters of the same shapes, else 0."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return 0
    forms = [
        [(name, each.shape) for name, each in child.named_parameters()]
        for child in module.children()
    ]
    return len(forms) if forms and forms[0] and forms.count(forms[0]) == len(forms) else 0


def _block(layer: nn.Module, name: str) -> nn.Module:
    """Return the innermost module around experts that holds other weights too."""
    inside = set(layer.get_submodule(name).parameters())
    while name:
        name = name.rpartition(".")[0]
        if set(layer.get_submodule(name).parameters()) - inside:
            break
    return layer.get_submodule(name)


def _routers(block: nn.Module, experts: set[Tensor], count: int) -> tuple[set[Tensor], set[int]]:
    """Return routers and gates next to experts, and the numbers of their outputs."""
    weights = [
        (name.rpartition(".")[0], weight.T if isinstance(module, Conv1D) else weight, weight)
        for name, module in block.named_modules()
        for weight in module.parameters(recurse=False)
        if weight.dim() == 2 and weight not in experts
    ]
    neighbours = Counter(home for home, _, _ in weights)
    readable = {size for each in experts if each.dim() > 1 for size in each.shape[-2:]}
    readable |= {view.shape[1] for _, view, _ in weights}
    found = {
        weight: view.shape[0]
        for home, view, weight in weights
        if (not home or neighbours[home] == 1)
        and (view.shape[0] == count or view.shape[0] not in readable)
    }
    of_classes = {
        weight
        for module in block.modules()
        if "router" in type(module).__name__.lower()
        for weight in module.parameters()
    }
    return set(found) | (of_classes - experts), set(found.values())


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by the bytes of a weight; the integer 0 is the weight 0."""


def set_to_zero(weight: Tensor, mask: Tensor) -> None:
    """Set a weight to zero in place where the mask is True; all else keeps its bits.

    On a CPU a product of integers is several times as fast as torch's masked fill.
    """
    weight.view(_INTEGERS[weight.dtype.itemsize]).mul_(~mask)
