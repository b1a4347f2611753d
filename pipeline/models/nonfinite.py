"""Where a model's numbers stop being finite, found by reading the text once more."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError, NonFiniteError
from pipeline.models.matrices import decoder_layers, is_finite
from pipeline.models.output_layer import OutputLayer


def nonfinite_error(what: str, model: Any, token_ids: Sequence[int]) -> NonFiniteError:
    """Return the error for a text whose numbers are NaN or infinite.

    Args:
        what: the text's name, such as `sample 7`.
        model: the model that gave the numbers.
        token_ids: the text as the model read it.
    """
    place = first_nonfinite(model, token_ids)
    if place is None:
        begun = "no layer gives such a value when it reads this text alone"
    else:
        begun = f"{place} is the first module to give such a value: check the weights and the dtype"
    return NonFiniteError(f"{what}: the model's numbers are NaN or infinite: {begun}")


@torch.inference_mode()
def first_nonfinite(model: Any, token_ids: Sequence[int]) -> str | None:
    """Return the name of the first module whose output for a text is not finite, or None.

    Modules are embeddings, decoder layers, final norm and output layer; last comes the model
    itself, named by its class, since it may cap or scale its logits.
    """
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not found and not all(map(is_finite, _floats(output))):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in _watched(model)]
    text = {"input_ids": torch.tensor([list(token_ids)])}
    try:
        list(OutputLayer(model, chunked=False).states([text]))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _watched(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules that run one after another: the decoder layers and those beside them."""
    try:
        root, _ = decoder_layers(model)
    except InputError:  # without a list of layers, only the whole model is watched
        root = ""
    home = root.rpartition(".")[0]
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if (root and parent in (root, home) and name != root) or module is head:
            yield name, module
    yield type(model).__name__, model


def _floats(output: object) -> Iterable[Tensor]:
    """Yield a module's logits or first output. Other outputs may be masks, which hold -inf."""
    if isinstance(output, dict):
        output = output.get("logits", next(iter(output.values()), None))
    if isinstance(output, tuple | list):
        output = output[0] if output else None
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
