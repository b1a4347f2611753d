"""The walk through a decoder, layer by layer, each seeing the pruned layers below it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import InputError
from pipeline.models.heap import return_freed_memory
from pipeline.models.matrices import Matrix, decoder_layers, matrices
from pipeline.models.streaming import read_ahead, resident
from pipeline.progress import report
from pipeline.pruning.crew import Crew
from pipeline.pruning.window_groups import DEFAULT_MEMORY, Memory, WindowGroups

Visit = Callable[[int, list[Matrix]], None]
"""Prunes the matrices of the decoder layer with that number, in place."""

Restore = Callable[[int, list[Matrix]], bool]
"""Brings the matrices to what an earlier walk left; False if that did not get so far."""


def layer_sizes(model: nn.Module) -> list[int]:
    """Return how many weights the matrices of each decoder layer have.

    Raises:
        InputError: if the model has a form that cannot be pruned.
    """
    root, layers = decoder_layers(model)
    _refuse_shared(root, layers)
    return [
        sum(matrix.weight.numel() for matrix in matrices(f"{root}.{number}", layer))
        for number, layer in enumerate(layers)
    ]


def _refuse_shared(root: str, layers: nn.ModuleList) -> None:
    """Refuse parameters of several layers: they have several inputs, and the upper ones depend on
    the mask."""
    owners: dict[Tensor, int] = {}
    for number, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            owner = owners.setdefault(parameter, number)
            if owner != number:
                remedy = (
                    f"belongs to decoder layers {owner} and {number}; it cannot be pruned in one"
                )
                raise InputError("model", f"{root}.{number}.{name}", remedy)


def check_windows(model: nn.Module, windows: Tensor) -> None:
    """Check that a model can be walked with these windows.

    Args:
        windows: token ids `[nsamples, seqlen]`.

    Raises:
        InputError: if the model is in training mode, whose dropout would make the statistics of
            every walk differ; or if the windows have another shape or type, are empty or longer
            than the model's longest input, or have ids without an embedding in the model.
    """
    if any(module.training for module in model.modules()):
        name = type(model).__name__
        raise InputError("model", name, "is in training mode, with dropout; call model.eval()")
    shape = list(windows.shape)
    if windows.dim() != 2 or not windows.numel():
        raise InputError("windows", shape, "must be token ids [nsamples, seqlen], at least one")
    if windows.dtype not in (torch.int64, torch.int32):
        raise InputError("windows", str(windows.dtype), "must be token ids, in int64 or int32")
    if not isinstance(model, PreTrainedModel):
        return
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < windows.shape[1]:
        remedy = f"the model takes at most {longest} tokens; lower it"
        raise InputError("seqlen", windows.shape[1], remedy)
    embeddings: Any = model.get_input_embeddings()
    known = len(embeddings.weight)
    for token in (int(windows.min()), int(windows.max())):
        if not 0 <= token < known:
            remedy = f"has no embedding: the model has {known}; use windows of its own tokenizer"
            raise InputError("token id", token, remedy)


@torch.no_grad()
def walk(
    model: nn.Module,
    windows: Tensor | None,
    statistics: tuple[str, ...],
    visit: Visit,
    memory: Memory = DEFAULT_MEMORY,
    restore: Restore = lambda number, found: False,
    observed_layers: int | None = None,
) -> None:
    """Visit every decoder layer in order, with statistics of its matrices' inputs.

    The statistics come from the layer with its own matrices still dense and all layers below
    pruned. The layer and its statistics are on the device while it is visited, with one batch of
    windows; the other layers stay where they were, and so do the embeddings, which run there.
    The experts of a mixture are run one by one, by transformers' own eager implementation.

    Args:
        model: a causal language model, in evaluation mode.
        windows: token ids `[nsamples, seqlen]`; None visits without any forward pass.
        statistics: names from `pipeline.pruning.input_statistics.STATISTICS`, or
            `pipeline.pruning.gradients.GRADIENT_SQUARES`; if empty, there is no forward pass.
        restore: called for every layer first; a layer that it restores is passed through, without
            statistics or visit.
        observed_layers: how many layers, from the first on, are run for statistics; the others are
            visited without. None observes all.

    Raises:
        InputError: if the model does not call its decoder layers one after another, leaves a
            matrix out, shares one between layers, or has experts whose inputs cannot be observed;
            and as `check_windows` does.
        NonFiniteError: if an activation is NaN or infinite.
    """
    root, layers = decoder_layers(model)
    _refuse_shared(root, layers)
    if windows is not None:
        check_windows(model, windows)
    if memory.batch_size is not None and memory.batch_size < 1:
        raise InputError("batch_size", memory.batch_size, "take at least one window")
    home = next(each.device for each in model.parameters() if not each.is_meta)
    device = memory.device or home
    observed = len(layers) if observed_layers is None else observed_layers

    def visit_unobserved(first: int) -> None:
        for number in range(first, len(layers)):
            report(number, len(layers), "layers")
            with resident(layers[number], device):
                read_ahead(layers, number + 1)
                found = matrices(f"{root}.{number}", layers[number])
                if not restore(number, found):
                    visit(number, found)

    if windows is None or not statistics or not observed:
        visit_unobserved(0)
        return
    crew = memory.crew or Crew()
    asked = (windows, statistics, memory, crew.share)
    with WindowGroups(model, layers, *asked) as groups:
        for number, layer in enumerate(layers[:observed]):
            report(number, len(layers), "layers")
            with resident(layer, device):
                read_ahead(layers, number + 1)
                found = matrices(f"{root}.{number}", layer)
                if not restore(number, found):
                    crew.observe(number, found)
                    own = groups.observe(number, layer, found, _third(number, len(layers), 0))
                    crew.hand_over(number, found, own)
                    del own
                    groups.add_gradients(number, layer, found)
                    return_freed_memory()  # passes and matrices have blocks of other sizes
                    visit(number, found)
                    return_freed_memory()
                if number + 1 < observed:  # with the layer pruned
                    crew.advance(number, found)
                    groups.advance(number, layer, _third(number, len(layers), 2))
                del found  # with it the layer, now that the next one is in memory
    visit_unobserved(observed)


def _third(number: int, layers: int, before: int) -> Callable[[float], None]:
    """Return what reports a share of a layer's statistics or outputs: with the visit between them
    they are a third of its work each."""
    return lambda share: report(number + (before + share) / 3, layers, "layers")
