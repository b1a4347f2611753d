"""Count a checkpoint's parameters from its files, without loading or downloading it."""

import functools
import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from jobs.cost import WEIGHT_BYTES
from pipeline.hub import local_folder
from pipeline.specs import HubModel, LocalModel


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
    for count in (_in_safetensors, _in_pickles):
        found = count(folder)
        if found is not None:
            return float(found)
    return _of_config(str(folder), model.trust_remote_code)


def _in_safetensors(folder: Path) -> int | None:
    """Count by the headers, which have every tensor's shape."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = [whole] if whole.is_file() else list(folder.glob("*.safetensors"))
    try:
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
            files = [folder / name for name in names]
        return sum(map(_tensors, files)) if files else None
    except (OSError, ValueError, KeyError, SafetensorError):  # a run reports what is wrong
        return None


def _tensors(file: Path) -> int:
    with safe_open(file, framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


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
def _of_config(folder: str, trust_remote_code: bool) -> float | None:
    """Count by a model without weights; this imports torch, which takes seconds."""
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
    return float(sum(parameter.numel() for parameter in model.parameters()))
