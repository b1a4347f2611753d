"""Where a spec meets the function that makes its artifact."""

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, Field

from cluster.heap import keep_freed_memory
from cluster.store import Partial
from cluster.worker import WorkerLostError
from jobs.outside import hub_items
from pipeline.environment import check_environment
from pipeline.errors import EngineDiedError
from pipeline.hub import HubItem, used
from pipeline.progress import Reporter, phase, reporting
from pipeline.specs import (
    DescribeSpec,
    EvaluateSpec,
    FilterSpec,
    GenerateSpec,
    OutliersSpec,
    PretrainSpec,
    PruneSpec,
    ScoreSpec,
    ShardSpec,
    StageSpec,
    TestbedTasksSpec,
    WindowsSpec,
)

MODULES: dict[str, str] = {
    "pretrain": "pipeline.testbed.pretrain",
    "testbed-tasks": "pipeline.testbed.tasks",
    "generate": "pipeline.generation.generate",
    "score": "pipeline.scoring.score",
    "filter": "pipeline.scoring.filter",
    "windows": "pipeline.data.windows",
    "describe": "pipeline.scoring.describe",
    "outliers": "pipeline.pruning.outliers",
    "prune": "pipeline.pruning.prune",
    "evaluate": "pipeline.evaluation.evaluate",
}
"""Stage to module; imported on the worker, since planning must not wait for torch."""

HUB = "hub-"
"""How the keys of copies of what the hub holds begin."""


class Work(BaseModel):
    """One stage as a worker takes it."""

    spec: Annotated[
        PretrainSpec
        | TestbedTasksSpec
        | ShardSpec
        | GenerateSpec
        | ScoreSpec
        | FilterSpec
        | WindowsSpec
        | DescribeSpec
        | OutliersSpec
        | PruneSpec
        | EvaluateSpec,
        Field(discriminator="kind"),
    ]

    settings: dict[str, int] = {}
    """Further arguments of the stage's function. No result depends on them."""


def stage_name(spec: StageSpec) -> str:
    """The stage that a spec belongs to: a shard belongs to the stage that it is a part of."""
    return spec.of.kind if isinstance(spec, ShardSpec) else spec.kind


def prepare(kind: str) -> ModuleType:
    """The module that makes stages of a kind; a new process takes seconds to import it."""
    with phase("importing libraries"):
        return _imported(MODULES[kind])


@contextlib.contextmanager
def prepared(kind: str, reporter: Reporter) -> Iterator[None]:
    """Import what stages of a kind need, and pass on what they report within the block."""
    with reporting(reporter):
        prepare(kind)
        yield


def execute(
    payload: str, artifacts: Mapping[str, Path], output: Path, cpus: int, partial: Partial
) -> dict[str, Any]:
    """Make one stage in `output`.

    Args:
        payload: a `Work` as JSON.
        artifacts: key to folder of each input.
        cpus: threads of tensor work; fixed, since sums depend on how they are split.
        partial: what an attempt that died has finished; pruning and evaluating take hours.

    Raises:
        InputError: if the spec's inputs are not what it needs, or the node's environment would
            change numbers.
        WorkerLostError: if this process can make no further stage.
    """
    check_environment()
    keep_freed_memory()
    work = Work.model_validate_json(payload)
    spec = work.spec
    module = prepare(stage_name(spec))
    torch = _imported("torch")
    torch.set_num_threads(cpus)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    report: dict[str, Any]
    try:
        with used(_copies(spec, artifacts)):
            report = _run(module, work, artifacts, output, partial)
    except EngineDiedError as error:
        raise WorkerLostError(str(error)) from error
    if torch.cuda.is_available():
        report = {**report, "peak_device_bytes": torch.cuda.max_memory_allocated()}
    return report


def _imported(name: str) -> ModuleType:
    """The module. To look for garbage among so many new objects, of which none is, would take a
    fifth of the time in which a process begins its first stage, and a second now and then later."""
    first = "torch" not in sys.modules
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if first:  # a later one would keep what an earlier stage has left
            gc.freeze()
        gc.enable()


def _copies(spec: StageSpec, artifacts: Mapping[str, Path]) -> dict[HubItem, Path]:
    """Of what the stage reads from the hub, those that the store has copies of."""
    if not any(key.startswith(HUB) for key in artifacts):
        return {}
    return {item: artifacts[item.key] for item in hub_items(spec) if item.key in artifacts}


def _run(
    module: ModuleType,
    work: Work,
    artifacts: Mapping[str, Path],
    output: Path,
    partial: Partial,
) -> dict[str, Any]:
    report: dict[str, Any]
    spec = work.spec
    if isinstance(spec, ShardSpec):
        report = module.run_shard(spec.of, spec.index, artifacts, output)
    elif isinstance(spec, PruneSpec | EvaluateSpec):
        report = module.run(spec, artifacts, output, partial, **work.settings)
    else:
        report = module.run(spec, artifacts, output, **work.settings)
    return report
