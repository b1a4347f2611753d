"""`dtype: auto` of a grid's models: bfloat16 where the hardware multiplies it, else float32."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_FEATURES = ("amx_bf16", "avx512_bf16")
"""Linux's names of instructions that multiply bfloat16; docs/benchmarks.md has their gains."""

CPU_INFO = Path("/proc/cpuinfo")
"""Where Linux lists them. Systems without this file count as CPUs without the instructions."""

KINDS = ("hub-model", "local-model")
"""Models that have a dtype."""


@dataclass(frozen=True)
class AutoDtype:
    """The dtype that `auto` stands for in a grid, and why."""

    dtype: str
    reason: str
    on_gpus: bool
    """Whether the grid runs on GPUs, so that the CPU that reads it does not matter."""

    def __str__(self) -> str:
        return f"dtype auto is {self.dtype} ({self.reason})"


def auto_dtype(resources: object) -> AutoDtype:
    """Choose the dtype for a grid with these `resources`, as its file has them.

    Stages that ask for GPUs run on them, wherever the grid is read. Without GPUs the CPU decides.
    """
    if _ask_for_gpus(resources):
        return AutoDtype("bfloat16", "resources ask for GPUs", on_gpus=True)
    found = _cpu_features()
    for feature in CPU_FEATURES:
        if feature in found:
            return AutoDtype("bfloat16", f"this CPU has {feature}", on_gpus=False)
    return AutoDtype("float32", f"this CPU has no {' or '.join(CPU_FEATURES)}", on_gpus=False)


def with_dtypes(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, AutoDtype]]:
    """Replace `auto` in the models of a grid file's content.

    Other mistakes are left for validation to find.

    Returns:
        The content, and the chosen dtype by model.
    """
    models = content.get("models")
    autos = [
        name
        for name, model in (models.items() if isinstance(models, Mapping) else ())
        if isinstance(model, Mapping) and model.get("kind") in KINDS
        if model.get("dtype") == "auto"
    ]
    if not autos:
        return dict(content), {}
    chosen = auto_dtype(content.get("resources"))
    replaced = {name: {**content["models"][name], "dtype": chosen.dtype} for name in autos}
    changed = {**content, "models": {**content["models"], **replaced}}
    return changed, dict.fromkeys(autos, chosen)


def _ask_for_gpus(resources: object) -> bool:
    stages = resources.values() if isinstance(resources, Mapping) else ()
    asked = [stage.get("gpus") for stage in stages if isinstance(stage, Mapping)]
    return any(isinstance(gpus, int | float) and gpus > 0 for gpus in asked)


def _cpu_features() -> frozenset[str]:
    """Return the flags that all CPU cores have; none if the system does not list them."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    cores = [
        frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")
    ]
    return frozenset.intersection(*cores) if cores else frozenset()
