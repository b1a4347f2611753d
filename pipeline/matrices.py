"""Finding what is pruned in a decoder layer: by the form of its parameters, not by class names."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import InputError

STARVED_TOKENS = 32
"""An expert that saw fewer tokens than this is pruned by its weights alone."""


@dataclass
class Matrix:
    """A weight that multiplies activations, and the statistics of its input."""

    name: str
    """In the model: its module's name or, in a tensor of experts, `<parameter>.<expert>`."""

    weight: Tensor
    """`[out_features, in_features]`, a view of the model's own parameter: writing to it in place
    changes the model. It must not be kept: the layer may move to another device."""

    is_expert: bool = False
    """It is one expert's of a mixture, and sees only the tokens that are routed there."""

    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """By their names in `pipeline.statistics.STATISTICS`, if any were asked for."""

    tokens: int = 0
    """How many tokens the statistics were summed over."""

    @property
    def starved(self) -> bool:
        """An expert with statistics of fewer than `STARVED_TOKENS` tokens, which are set aside
        for uniform ones."""
        return self.is_expert and bool(self.statistics) and self.tokens < STARVED_TOKENS


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. Their sum tells, which is one pass, unless it is too
    large itself."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


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
    """The matrices of a decoder layer that are pruned: every weight of its attention and MLP.

    These are the weights of `nn.Linear` and of transformers' `Conv1D`, which is stored transposed,
    and the experts of a mixture: linear layers each, or stacked in one tensor. Left alone are

    - embeddings, norms and biases, those of several heads or experts too: tensors with no more
      values than the layer's widest matrix has rows or columns, or `[experts, out_features]`;
    - routers and gates of a mixture: in a module that holds experts next to other weights, a weight
      that stands by itself (directly in that module, or the only one of its own) and has as many
      outputs as there are experts, or outputs that no weight nearby could read, like the one
      output of a shared expert's gate.

    Raises:
        InputError: if there is none, or if the layer has weights of another form, which would be
            missed: convolutions, quantized weights, experts that do not tell their layout.
    """
    routers, experts = _mixtures(layer)
    widest = max((max(each.shape) for each in layer.parameters() if each.dim() == 2), default=0)
    found: list[Matrix] = []
    seen = set(routers)
    for module_name, module in layer.named_modules(prefix=prefix):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or parameter.dim() < 2 or isinstance(module, nn.Embedding):
                continue
            seen.add(parameter)  # some are shared
            full_name = f"{module_name}.{name}"
            views = _views(module, parameter)
            if parameter.dim() == 3:
                names = [f"{full_name}.{number}" for number in range(len(views))]
            else:
                names = [module_name]
            if not views and not _is_vector(module, parameter, widest):
                remedy = (
                    f"has shape {list(parameter.shape)} and belongs to no linear layer and to no "
                    "experts that tell their layout; it cannot be pruned"
                )
                raise InputError("model", full_name, remedy)
            if parameter.dtype.itemsize < 2 or not parameter.is_floating_point():
                remedy = f"is held as {parameter.dtype}; load the model unquantized"
                raise InputError("model", full_name, remedy)
            found += [
                Matrix(each, view, parameter in experts)
                for each, view in zip(names, views, strict=False)
            ]
    if not found:
        raise InputError("model", prefix, "has no linear layer to prune")
    return found


def _views(module: nn.Module, parameter: nn.Parameter) -> list[Tensor]:
    """The matrices `[out_features, in_features]` that are held in a parameter."""
    weight = parameter.detach()
    if isinstance(module, nn.Linear):
        return [weight]
    if isinstance(module, Conv1D):
        return [weight.T]
    if any(parameter is each for each in _stacked_experts(module)):
        return list(weight.mT if module.is_transposed else weight)
    return []


def _is_vector(module: nn.Module, parameter: nn.Parameter, widest: int) -> bool:
    """Whether it is a norm's weight or a bias, if of several heads or experts."""
    if parameter.dim() > 2:
        return False
    stacked = _stacked_experts(module)
    return parameter.numel() <= widest or (bool(stacked) and len(parameter) == len(stacked[0]))


# -------------------------------------------------------------------------------------- mixtures


def _mixtures(layer: nn.Module) -> tuple[set[Tensor], set[Tensor]]:
    """The weights of all routers and gates in a layer, and the parameters of all experts."""
    routers: set[Tensor] = set()
    experts: set[Tensor] = set()
    for name, module in layer.named_modules():
        stacked = _stacked_experts(module)
        count = len(stacked[0]) if stacked else _modules_of_one_form(module)
        if not name or not count:
            continue
        inside = set(module.parameters())
        found, outputs = _routers(layer.get_submodule(name.rpartition(".")[0]), inside, count)
        if stacked or count in outputs:  # a list is one of experts if something chooses from it
            routers |= found
            experts |= inside
    return routers, experts


def _stacked_experts(module: nn.Module) -> list[Tensor]:
    """The tensors `[experts, ..., ...]` of a module that tells, as those of transformers do, which
    way round they are."""
    if not isinstance(getattr(module, "is_transposed", None), bool):
        return []
    return [each for each in module.parameters(recurse=False) if each.dim() == 3]


def _modules_of_one_form(module: nn.Module) -> int:
    """How many modules a list holds that all have parameters of the same shapes; else 0."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return 0
    forms = [
        [(name, each.shape) for name, each in child.named_parameters()]
        for child in module.children()
    ]
    return len(forms) if forms and forms[0] and forms.count(forms[0]) == len(forms) else 0


def _routers(block: nn.Module, experts: set[Tensor], count: int) -> tuple[set[Tensor], set[int]]:
    """Routers and gates next to experts, and the numbers of their outputs; see `matrices`."""
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
    return set(found), set(found.values())
