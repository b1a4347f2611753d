"""Decoder layers that stay in their checkpoint's files until they are needed."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models.heap import return_freed_memory
from pipeline.models.matrices import decoder_layers
from pipeline.models.memory import DEFAULT_MODEL_MEMORY, ModelMemory
from pipeline.models.weight_files import whole_model

_STORED = "stored_layer"
"""The attribute of a decoder layer that holds its `StoredLayer`."""

_MEMORY = "model_memory"
"""The attribute of a model with layers in files that holds its `ModelMemory`."""


@dataclass
class StoredLayer:
    """A decoder layer's parameters in files, and the changes made whenever they are read."""

    parameters: dict[str, tuple[Mapping[str, Tensor], str]]
    """By name in the layer: the files, and the name in them."""

    device: torch.device
    """The device of the rest of the model."""

    changes: list[Callable[[], None]] = field(default_factory=list)
    """Functions that change the layer, called in order when it has been read."""

    ahead: Future[dict[str, Tensor]] | None = None
    """The parameters' values, if a thread reads them already."""


def load_streamed(
    location: str, dtype: torch.dtype, device: torch.device, scratch: Path, **options: Any
) -> Any:
    """Load a causal language model, but leave its decoder layers in the checkpoint's files.

    Their parameters have shapes; they have values only within `resident`. A model whose layers
    share parameters is loaded whole.

    Args:
        location: a folder, or a name on the hub.
        device: for all but the decoder layers.
        scratch: a folder for layers that transformers and the checkpoint hold in different forms,
            such as the experts of most mixtures; for as long as the model is used.
        options: options of `from_pretrained`.

    Raises:
        InputError: if the checkpoint lacks weights.
    """
    reported = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    weights_only = {"use_safetensors"}
    of_config = {name: value for name, value in options.items() if name not in weights_only}
    config = AutoConfig.from_pretrained(location, **of_config)
    trusted = options.get("trust_remote_code", False)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    root, layers = decoder_layers(skeleton)
    if _share_parameters(layers):
        loaded = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, **reported)
        return whole_model(location, loaded).to(device)
    device = torch.empty(0, device=device).device  # with its index
    places = {name: str(device) for name in _outside(skeleton, root)}
    places |= {f"{root}.{number}": "disk" for number in range(len(layers))}
    loaded = AutoModelForCausalLM.from_pretrained(
        location, dtype=dtype, device_map=places, offload_folder=scratch, **reported
    )
    model = whole_model(location, loaded)
    for layer in decoder_layers(model)[1]:
        vars(layer)[_STORED] = StoredLayer(_stored_parameters(layer), device)
    remove_hook_from_submodules(model)
    del model.hf_device_map  # so that `save_pretrained` takes the values that it is given
    return model


@contextlib.contextmanager
def resident(layer: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Hold a decoder layer on a device, by default that of the rest of its model.

    A layer in files is read, and dropped afterwards with all changes to it. Any other layer is
    moved, and moved back.
    """
    stored: StoredLayer | None = vars(layer).get(_STORED)
    if stored is not None:
        on = device or stored.device
        ahead, stored.ahead = stored.ahead, None
        values = _read(stored) if ahead is None else ahead.result()
        with _filled(layer, stored, values, on):
            yield
        if on.type == "cpu":
            return_freed_memory()
        return
    home = next(layer.parameters()).device
    if device is not None and device != home:
        layer.to(device)
    try:
        yield
    finally:
        if device is not None and device != home:
            layer.to(home)


def each_resident(layers: nn.ModuleList) -> Iterator[nn.Module]:
    """Yield decoder layers, each held as by `resident` until the next one is asked for.

    Meanwhile the next one is read from its files, so two layers are in memory.
    """
    for number, layer in enumerate(layers):
        with resident(layer):
            read_ahead(layers, number + 1)
            yield layer


def read_ahead(layers: nn.ModuleList, number: int) -> None:
    """Start to read a decoder layer for `resident`, if there is one with that number in files.

    For a GPU it is read to pinned host memory: the copy to the device does not wait for the disk.
    """
    stored: StoredLayer | None = vars(layers[number]).get(_STORED) if number < len(layers) else None
    if stored is not None and stored.ahead is None:
        stored.ahead = _reader().submit(_read, stored)


@functools.cache
def _reader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")


def is_stored(layer: nn.Module) -> bool:
    """Return whether a decoder layer is in files, from which it can be read again."""
    return _STORED in vars(layer)


def memory_of(model: nn.Module) -> ModelMemory:
    """Return the memory that a model with its decoder layers in files was opened with."""
    memory: ModelMemory = vars(model).get(_MEMORY, DEFAULT_MODEL_MEMORY)
    return memory


def set_memory(model: nn.Module, memory: ModelMemory) -> None:
    """Note a model's memory for `memory_of`."""
    vars(model)[_MEMORY] = memory


def is_streamed(model: nn.Module) -> bool:
    """Return whether a model's decoder layers are in files."""
    return any(map(is_stored, model.modules()))


def change(layer: nn.Module, apply: Callable[[], None]) -> None:
    """Change a decoder layer in place: now, or whenever it is read from its files."""
    stored: StoredLayer | None = vars(layer).get(_STORED)
    if stored is None:
        apply()
    else:
        stored.changes.append(apply)


def _read(stored: StoredLayer) -> dict[str, Tensor]:
    """Return a layer's parameters by name, in host memory from which its device copies fast."""
    values = {name: files[key] for name, (files, key) in stored.parameters.items()}
    if stored.device.type == "cuda":
        return {name: value.pin_memory() for name, value in values.items()}
    return {name: value.to(stored.device, copy=True) for name, value in values.items()}


@contextlib.contextmanager
def _filled(
    layer: nn.Module, stored: StoredLayer, values: dict[str, Tensor], device: torch.device
) -> Iterator[None]:
    """Give a layer its values, which are taken out of `values`, and make all changes to it; drop
    them afterwards."""
    moved = {name: values.pop(name).to(device, non_blocking=True) for name in list(values)}
    layer.load_state_dict(moved, strict=False, assign=True)
    try:
        for buffer in layer.buffers():
            buffer.data = buffer.data.to(device)
        for apply in stored.changes:
            apply()
        yield
    finally:
        _drop(layer, stored)


def _drop(layer: nn.Module, stored: StoredLayer) -> None:
    own = dict(layer.named_parameters())
    empty = {name: torch.empty_like(own[name], device="meta") for name in stored.parameters}
    layer.load_state_dict(empty, strict=False, assign=True)


def _stored_parameters(layer: nn.Module) -> dict[str, tuple[Mapping[str, Tensor], str]]:
    return {
        f"{module_name}.{name}" if module_name else name: (module._hf_hook.weights_map, name)
        for module_name, module in layer.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    }


def _outside(model: nn.Module, root: str) -> Iterator[str]:
    """Yield the names of the largest parts of a model without decoder layers."""
    path = root.split(".")
    for depth in range(len(path)):
        inside = ".".join(path[:depth])
        module = model.get_submodule(inside)
        own = [module.named_children(), module.named_parameters(recurse=False)]
        for name, _ in [*own[0], *own[1], *module.named_buffers(recurse=False)]:
            if name != path[depth]:
                yield f"{inside}.{name}" if inside else name


def _share_parameters(layers: nn.ModuleList) -> bool:
    distinct = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return len(list(layers.named_parameters(remove_duplicate=False))) != len(distinct)
