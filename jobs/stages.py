"""The table of all stages, and how a worker makes one."""

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, SerializeAsAny

from cluster.helpers import NO_HELPERS, Helpers
from cluster.store import Partial
from cluster.worker import WorkerLostError
from jobs.outside import hub_reads
from pipeline.environment import check_environment
from pipeline.errors import EngineDiedError
from pipeline.hub import HubItem, used
from pipeline.models.heap import keep_freed_memory
from pipeline.progress import Reporter, phase, reporting
from pipeline.specs import (
    DescribeSpec,
    DrawSpec,
    EvaluateSpec,
    FilterSpec,
    GenerateSpec,
    OutliersSpec,
    PretrainSpec,
    PruneSpec,
    ScoreSpec,
    ShardedSpec,
    ShardSpec,
    StageSpec,
    TestbedTasksSpec,
    WindowsSpec,
)


@dataclass(frozen=True)
class StageKind:
    """A kind of stage: what the rest of the code must know besides its spec."""

    spec: type[StageSpec]

    module: str
    """Holds its function `run`. Imported on the worker: planning must not wait for torch."""

    fixed_seconds: float
    """Time besides its passes: reading, storing and setting up libraries."""

    passes: float = 0.0
    """Passes of a token through the model. Training's backward pass counts two; outliers need the
    statistics and the outputs of every layer. For prunings the pruner's spec has the number."""

    utilisation: tuple[float, float] | None = None
    """Share of its devices' rate that it reaches on a CPU and on a GPU; None if it passes no tokens
    through a model. The ratios for a CPU were measured on one machine with a model of 135 million
    weights (bfloat16, AMX); those for a GPU are not measured by stage. A step of generation reads
    every weight for one token of each sample."""

    keeps_model: bool = False
    """It runs on actors that keep a model loaded; if it is sharded, its shards do."""

    keeps_parts: bool = False
    """It keeps finished parts for the next attempt, and its `run` takes a `Partial`."""

    shared: bool = False
    """Several actors can share one: its `run` takes `helpers`, and its module has a function
    `helper`, which makes a helper's part."""

    settings: tuple[str, ...] = ()
    """Fields of `resources.<stage>` that its `run` takes. They move no number beyond its last
    bits."""

    cell_fields: tuple[str, ...] | None = None
    """Fields of a cell that it depends on; None for all."""

    @property
    def sharded(self) -> bool:
        """Whether it is made in shards and joins them."""
        return issubclass(self.spec, ShardedSpec)


HIDDEN_BYTES = ("device_hidden_bytes", "host_hidden_bytes")
"""Budgets of stages that read a model one decoder layer at a time."""

_OF_MODELS = ("memory_bytes", *HIDDEN_BYTES)
"""Fields of `pipeline.models.memory.ModelMemory`."""

_OF_TEXTS = (
    "calibration",
    "model",
    "seqlen",
    "prefix_tokens",
    "num_samples",
    "temperature",
    "seed",
)

STAGES: dict[str, StageKind] = {
    kind.spec.model_fields["kind"].default: kind
    for kind in (
        StageKind(
            PretrainSpec,
            "pipeline.testbed.pretrain",
            fixed_seconds=5.0,
            passes=3.0,
            utilisation=(1.0, 0.3),
            cell_fields=("model",),
        ),
        StageKind(TestbedTasksSpec, "pipeline.testbed.tasks", fixed_seconds=1.0, cell_fields=()),
        StageKind(
            GenerateSpec,
            "pipeline.generation.generate",
            fixed_seconds=2.0,
            passes=1.0,
            utilisation=(0.3, 0.1),
            keeps_model=True,
            cell_fields=_OF_TEXTS,
        ),
        StageKind(
            DrawSpec,
            "pipeline.data.draw",
            fixed_seconds=0.5,
            cell_fields=("calibration", "model", "seqlen", "seed"),
        ),
        StageKind(
            ScoreSpec,
            "pipeline.scoring.score",
            fixed_seconds=2.0,
            passes=1.0,
            utilisation=(0.65, 0.5),
            keeps_model=True,
            settings=_OF_MODELS,
            cell_fields=_OF_TEXTS,
        ),
        StageKind(
            FilterSpec,
            "pipeline.scoring.filter",
            fixed_seconds=0.5,
            cell_fields=(*_OF_TEXTS, "drop_fraction", "drop_by", "within"),
        ),
        StageKind(WindowsSpec, "pipeline.data.windows", fixed_seconds=0.5),
        StageKind(
            DescribeSpec,
            "pipeline.scoring.describe",
            fixed_seconds=2.0,
            passes=1.0,
            utilisation=(0.65, 0.5),
            settings=_OF_MODELS,
        ),
        StageKind(
            OutliersSpec,
            "pipeline.pruning.outliers",
            fixed_seconds=2.0,
            passes=2.0,
            utilisation=(0.65, 0.5),
            shared=True,
        ),
        StageKind(
            PruneSpec,
            "pipeline.pruning.prune",
            fixed_seconds=2.0,
            utilisation=(0.65, 0.5),
            keeps_model=True,
            keeps_parts=True,
            shared=True,
            settings=HIDDEN_BYTES,
        ),
        StageKind(
            EvaluateSpec,
            "pipeline.evaluation.evaluate",
            fixed_seconds=5.0,
            passes=1.0,
            utilisation=(0.75, 0.4),
            keeps_parts=True,
            settings=_OF_MODELS,
        ),
    )
}
"""Every stage by name, in the order in which data pass through them."""

LINES = tuple(
    line
    for name, kind in STAGES.items()
    for line in ([f"{name} shard", name] if kind.sharded else [name])
)
"""Lines of tables: one for each kind of stage, and one for its shards if it has any."""

HUB = "hub-"
"""Prefix of the keys of copies from the hub."""


def _as_spec(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    kind = value["kind"]
    spec = ShardSpec if kind == "shard" else STAGES[kind].spec
    return spec.model_validate(value)


class StageWork(BaseModel):
    """What a worker is given to make one stage."""

    spec: Annotated[SerializeAsAny[StageSpec], BeforeValidator(_as_spec)]

    settings: dict[str, int] = {}
    """Further arguments of the stage's `run`: `StageKind.settings`."""


def stage_name(spec: StageSpec) -> str:
    """Return the name of a spec's stage; a shard's is that of the whole."""
    return spec.of.kind if isinstance(spec, ShardSpec) else spec.kind


def line_of(spec: StageSpec) -> str:
    """Return which of `LINES` counts a stage."""
    return f"{stage_name(spec)} shard" if isinstance(spec, ShardSpec) else spec.kind


@contextlib.contextmanager
def prepared(kind: str, reporter: Reporter) -> Iterator[None]:
    """Import what stages of a kind need, and pass on what they report within the block."""
    with reporting(reporter):
        _module(kind)
        yield


def execute(
    payload: str,
    artifacts: Mapping[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers = NO_HELPERS,
) -> dict[str, Any]:
    """Make one stage in `output`.

    Args:
        payload: a `StageWork` as JSON.
        artifacts: key to folder of each input.
        cpus: threads for tensors; fixed because sums depend on how they are split.
        partial: finished parts of an attempt that died; pruning and evaluating take hours.
        helpers: actors that share the stage, each with a part from `help_make`.

    Raises:
        InputError: if the inputs do not fit the spec, or the node's environment would change
            numbers.
        WorkerLostError: if this process cannot make further stages.
    """
    check_environment()
    work = StageWork.model_validate_json(payload)
    spec = work.spec
    module, torch = _ready(spec, cpus)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    report: dict[str, Any]
    try:
        with used(_copies(spec, artifacts)):
            report = _run(module, work, artifacts, output, partial, helpers)
    except EngineDiedError as error:
        raise WorkerLostError(str(error)) from error
    if torch.cuda.is_available():
        report = {**report, "peak_device_bytes": torch.cuda.max_memory_allocated()}
    return report


def help_make(
    payload: str, artifacts: Mapping[str, Path], cpus: int, member: int, members: int
) -> Any:
    """Return a helper's part in a stage that several actors share.

    Args:
        payload: as of `execute`.
        member: its number among all actors, from 1: the first one makes the stage.
        members: how many there are.
    """
    check_environment()
    work = StageWork.model_validate_json(payload)
    module, _ = _ready(work.spec, cpus)
    with used(_copies(work.spec, artifacts)):
        return module.helper(work.spec, artifacts, member, members, **work.settings)


def _ready(spec: StageSpec, cpus: int) -> tuple[ModuleType, ModuleType]:
    """Return the module that makes a stage, and torch, set up for it."""
    keep_freed_memory()
    module = _module(stage_name(spec))
    torch = _imported("torch")
    torch.set_num_threads(cpus)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return module, torch


def _module(kind: str) -> ModuleType:
    """Import the module that makes stages of a kind: a new process takes seconds for it."""
    with phase("importing libraries"):
        return _imported(STAGES[kind].module)


def _imported(name: str) -> ModuleType:
    """Import a module without garbage collection and without scikit-learn.

    An import makes many objects and no garbage. Searching them would take a fifth of the time
    before a process's first stage, and later a second now and then. scikit-learn takes another
    fifth: transformers imports it, if it is installed, for a way of generating that no stage uses.
    """
    first = "torch" not in sys.modules
    gc.disable()
    try:
        with _hidden("sklearn"):
            return importlib.import_module(name)
    finally:
        if first:  # a later freeze would keep what earlier stages left
            gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Let a package seem not to be installed, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _copies(spec: StageSpec, artifacts: Mapping[str, Path]) -> dict[HubItem, Path]:
    """Return copies in the store of what the stage reads from the hub."""
    if not any(key.startswith(HUB) for key in artifacts):
        return {}
    return {item: artifacts[item.key] for item in hub_reads(spec) if item.key in artifacts}


def _run(
    module: ModuleType,
    work: StageWork,
    artifacts: Mapping[str, Path],
    output: Path,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    report: dict[str, Any]
    spec = work.spec
    if isinstance(spec, ShardSpec):
        report = module.run_shard(spec.of, spec.index, artifacts, output, **work.settings)
        return report
    kind, given = STAGES[spec.kind], dict[str, Any](work.settings)
    if kind.keeps_parts:
        given["keep"] = partial
    if kind.shared:
        given["helpers"] = helpers
    report = module.run(spec, artifacts, output, **given)
    return report
