"""What a benchmark writes down: its figures and the machine that they hold for."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what the figures of a run depend on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }


def write_json(path: Path | None, record: object) -> None:
    """Write a dictionary, or a dataclass with its derived properties such as ratios, to a file.

    Args:
        path: None writes nothing.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_plain(record), indent=2) + "\n")


def _plain(value: object) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if not is_dataclass(value):
        return value
    derived = [name for name, each in vars(type(value)).items() if isinstance(each, property)]
    names = [each.name for each in fields(value)] + derived
    return {name: _plain(getattr(value, name)) for name in names}
