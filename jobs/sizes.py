"""Read the shapes of a checkpoint's tensors from its files, without loading or downloading it."""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from jobs.cost import WEIGHT_BYTES
from pipeline.hub import local_folder
from pipeline.specs import HubModel, LocalModel

TensorShapes = Mapping[str, tuple[int, ...]]
"""The shape of every tensor of a checkpoint, by name."""


def checkpoint_parameters(model: HubModel | LocalModel) -> float | None:
    """Count a model's parameters in a local folder, a copy in use, or the hub's cache.

    The count comes from the headers of its safetensors files, else from the bytes of its pickles,
    else from its configuration alone. All experts of a mixture count.

    Returns:
        None if there are no such files.
    """
    folder = local_folder(model)
    if folder is None:
        return None
    shapes = _in_safetensors(folder)
    if shapes is None:
        found = _in_pickles(folder)
        if found is not None:
            return found
        shapes = _of_config(str(folder), model.trust_remote_code)
    return None if shapes is None else float(sum(map(math.prod, shapes.values())))


def tensor_shapes(model: HubModel | LocalModel) -> TensorShapes | None:
    """Return the shapes in the headers of a model's safetensors files, else those of a model that
    its configuration makes; None if there are no such files."""
    folder = local_folder(model)
    if folder is None:
        return None
    found = _in_safetensors(folder)
    return _of_config(str(folder), model.trust_remote_code) if found is None else found


def _in_safetensors(folder: Path) -> TensorShapes | None:
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = [whole] if whole.is_file() else list(folder.glob("*.safetensors"))
    found: dict[str, tuple[int, ...]] = {}
    try:
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
            files = [folder / name for name in names]
        for file in files:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    found[name] = tuple(tensors.get_slice(name).get_shape())
    except (OSError, ValueError, KeyError, SafetensorError):  # a run reports what is wrong
        return None
    return found or None


def _in_pickles(folder: Path) -> float | None:
    """Count by the files' bytes and the dtype in the configuration."""
    config = _config(folder)
    files = list(folder.glob("pytorch_model*.bin")) or list(folder.glob("*.bin"))
    if not files or config is None:
        return None
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return sum(file.stat().st_size for file in files) / WEIGHT_BYTES.get(dtype, 4)


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config


@functools.cache
def _of_config(folder: str, trust_remote_code: bool) -> TensorShapes | None:
    """Take the shapes of a model without weights; this imports torch, which takes seconds."""
    if _config(Path(folder)) is None:
        return None
    from transformers import AutoConfig

    from pipeline.models.inspection import weightless_model

    local = LocalModel(path=folder, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = weightless_model(config, local)
    except (OSError, ValueError, KeyError, ImportError):  # `check_plan` reports what is wrong
        return None
    model.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
