"""Estimates of a stage's time and size: a stated model, not a measurement.

A stage's work is its tokens times its passes through the model, at 2 FLOP per parameter and token:
those of the decoder layers, and of the output layer but for prunings, which do not reach it. It is
divided by the rate of its devices and the share of that rate that such stages reach; a fixed
time and that of loading the model are added. All experts of a mixture count. A run scales the
estimates by what it measures (`jobs.forecast`).
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.graph import Resources
from jobs.grid import Cost
from jobs.stages import STAGES, stage_name
from pipeline.generation.shards import shard_samples
from pipeline.specs import (
    DescribeSpec,
    DrawSpec,
    EvaluateSpec,
    FilterSpec,
    FirstLayers,
    GenerateSpec,
    LocalTasks,
    Model,
    OutliersSpec,
    PretrainSpec,
    PruneSpec,
    ScoreSpec,
    ShardedSpec,
    ShardSpec,
    StageSpec,
    TaskSpec,
    TestbedTasksSpec,
    WindowsSpec,
)

CORE_FLOPS = 5.0e10
"""FLOP per second of a CPU core with AVX2 or AVX-512, in matrix products."""

GPU_FLOPS = 4.0e14
"""FLOP per second of a GPU: half of what an H200 reaches in bfloat16."""

LAYERS = 30
"""Layers of a typical decoder; with its parameters they give the inputs of its matrices."""

TASK_TOKENS = 2_000_000
"""Tokens of an average lm-eval task, with all questions and choices."""

TOKEN_CHARACTERS = 4
"""Characters of a token, for tasks whose questions are in a file of their folder."""

MANY_WINDOWS = 256
"""Windows of a perplexity without a limit."""

QUESTION_TOKENS = 600
"""Tokens of a question with all its choices, for tasks with a limit."""

TESTBED_QUESTION_TOKENS = 60
"""Tokens of a question of the testbed's tasks, with all its choices."""

LOAD_SECONDS = 2.0e-9
"""Seconds to load a parameter: two bytes at 1 GB per second."""

CHOOSE_SECONDS = (3.0e-8, 2.0e-9)
"""Seconds for a CPU core, or a GPU, to choose, check, pack and store a pruned parameter."""

JOIN_SECONDS = 0.5
"""Seconds to join the shards of a stage, without a model."""

UNKNOWN_PARAMETERS = 1.0e9
"""Assumed size of a model of unknown size, where only the order of work depends on it."""

TOKEN_BYTES = 8
"""Bytes of an id and its share of the text."""

STATES_BYTES = 3 * 128 * 4
"""Bytes of a sample's mean hidden states: three layers of 128 numbers in float32."""

WEIGHT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a weight by dtype."""

MASK_BYTES = 1 / 8
"""Bytes of a weight of a model that is stored as masks."""


ONE_CORE = Resources()


@dataclass(frozen=True)
class ModelSize:
    """Numbers of a model's parameters."""

    whole: float
    layers: float
    """Of the decoder layers."""
    output: float
    """Of the output layer, which may be the embedding."""

    @classmethod
    def of(cls, parameters: float) -> "ModelSize":
        """Return the size of a model of which no more is known: all are the decoder's."""
        return cls(parameters, parameters, 0.0)


Sizes = Mapping[str, ModelSize]
"""By hub name or path of a model."""


@dataclass(frozen=True)
class Estimate:
    """Seconds on the stage's resources, and bytes in the store."""

    seconds: float
    bytes: float


FITTED_PASSES = (4.3, 3.0)
"""Passes of a reconstruction, and of each of its epochs: the dense and the pruned layer once,
attention for the input of the MLP, the error before and after; a step forward, and twice that
backward."""


def estimate(
    spec: StageSpec, cost: Cost, sizes: Sizes, resources: Resources = ONE_CORE
) -> Estimate | None:
    """Estimate a stage; return None if it needs a model of unknown size.

    Args:
        resources: what the stage runs on.
    """
    model = _model(spec)
    size = ModelSize.of(0.0) if model is None else model_size(model, sizes)
    if size is None:
        return None
    return Estimate(_seconds(spec, cost, size, resources), _bytes(spec, size.whole))


def expected_seconds(
    spec: StageSpec, cost: Cost, sizes: Sizes, resources: Resources = ONE_CORE
) -> float:
    """Estimate seconds to order stages by: a model of unknown size counts `UNKNOWN_PARAMETERS`."""
    known = estimate(spec, cost, sizes, resources)
    unknown = ModelSize.of(UNKNOWN_PARAMETERS)
    return _seconds(spec, cost, unknown, resources) if known is None else known.seconds


def _seconds(spec: StageSpec, cost: Cost, size: ModelSize, resources: Resources) -> float:
    """Add a fixed time, the model's weights once, and its passes: always more than 0."""
    name = stage_name(spec)
    fixed = STAGES[name].fixed_seconds
    if isinstance(spec, ShardedSpec):
        return JOIN_SECONDS
    if _model(spec) is None:
        return fixed
    seconds, tokens = fixed + LOAD_SECONDS * size.whole, _passes(spec) * _tokens(spec)
    passed = size.layers
    if isinstance(spec, PruneSpec):
        on_core, on_gpu = CHOOSE_SECONDS
        seconds += size.layers * (on_gpu if resources.gpus else on_core / resources.cpus)
        tokens += spec.pruner.column_passes * math.sqrt(size.layers / (12 * LAYERS))
        if isinstance(spec.allocation, FirstLayers):
            tokens *= spec.allocation.share
    elif not isinstance(spec, OutliersSpec):
        passed += size.output
    return seconds + 2.0 * passed * tokens / rate(name, cost, resources) / resources.actors


def rate(stage: str, cost: Cost, resources: Resources) -> float:
    """Return FLOP per second that a kind of stage reaches on its GPUs, or else on its cores."""
    reached = STAGES[stage].utilisation
    assert reached is not None, f"{stage} passes no tokens through a model"
    on_cpu, on_gpu = reached
    if resources.gpus:
        return on_gpu * (cost.flops_per_second or GPU_FLOPS * resources.gpus)
    return on_cpu * (cost.flops_per_second or CORE_FLOPS * resources.cpus)


def model_size(model: Model, sizes: Sizes) -> ModelSize | None:
    """Return a model's size, None if neither its spec nor `sizes` has it."""
    match model:
        case PruneSpec():
            return model_size(model.model, sizes)
        case PretrainSpec():
            heads = model.num_key_value_heads * model.head_dim
            attention = 2 * model.hidden_size * (model.hidden_size + heads)
            mlp = 3 * model.hidden_size * model.intermediate_size
            layers = float(model.num_layers * (attention + mlp))
            embedding = float(model.vocab_size * model.hidden_size)
            return ModelSize(layers + embedding, layers, embedding)
        case _:
            return sizes.get(model_name(model))


def model_name(model: Model) -> str:
    """Return a model's hub name or path, the testbed's kind."""
    match model:
        case PruneSpec():
            return model_name(model.model)
        case PretrainSpec():
            return model.kind
        case _:
            return model.name if model.kind == "hub-model" else model.path


def _model(spec: StageSpec) -> Model | None:
    """Return the model that the stage passes tokens through, if any."""
    if STAGES[stage_name(spec)].utilisation is None or isinstance(spec, ShardedSpec):
        return None
    if isinstance(spec, PretrainSpec):
        return spec
    made: Any = spec.of if isinstance(spec, ShardSpec) else spec
    model: Model = made.model
    return model


def _passes(spec: StageSpec) -> float:
    if isinstance(spec, PruneSpec):
        fitted = spec.reconstruction
        own = 0.0 if fitted is None else FITTED_PASSES[0] + FITTED_PASSES[1] * fitted.epochs
        return spec.pruner.forward_passes + own
    return STAGES[stage_name(spec)].passes


def _tokens(spec: StageSpec) -> float:
    match spec:
        case PretrainSpec():
            return spec.steps * spec.batch_size * spec.seqlen
        case ShardSpec():
            samples = spec.of if isinstance(spec.of, GenerateSpec) else spec.of.samples
            return len(shard_samples(samples, spec.index)) * samples.seqlen
        case (
            PruneSpec(calibration=WindowsSpec() as windows)
            | OutliersSpec(calibration=windows)
            | DescribeSpec(calibration=windows)
        ):
            return windows.nsamples * windows.seqlen
        case EvaluateSpec():
            texts = sum(
                (2 if entry.kl else 1) * (entry.max_windows or MANY_WINDOWS) * entry.seqlen
                for entry in spec.perplexity
            )
            return texts + sum(task_tokens(spec, task) for task in spec.tasks)
        case PruneSpec():
            return 0.0  # it takes no data
        case _:
            raise TypeError(f"the tokens of a stage {spec.kind} are not known")


def task_tokens(spec: EvaluateSpec, task: TaskSpec) -> float:
    """Estimate the tokens of a task's questions, with all choices."""
    if isinstance(spec.task_folder, TestbedTasksSpec):
        return spec.task_folder.questions * TESTBED_QUESTION_TOKENS
    if isinstance(spec.task_folder, LocalTasks):
        questions = _questions(Path(spec.task_folder.path), task.name)
        if questions is not None:
            return sum(questions[: task.limit]) / TOKEN_CHARACTERS
    return TASK_TOKENS if task.limit is None else task.limit * QUESTION_TOKENS


@functools.cache
def _questions(folder: Path, task: str) -> list[int] | None:
    """Return bytes of each question of a task with JSON Lines in its folder, None for others."""
    try:
        content = yaml.safe_load((folder / f"{task}.yaml").read_text())
        files = content["dataset_kwargs"]["data_files"]
        name = files if isinstance(files, str) else files[content["test_split"]]
        with (folder / name).open("rb") as lines:
            return [len(line) for line in lines]
    except (OSError, yaml.YAMLError, KeyError, TypeError):  # another form
        return None


def _bytes(spec: StageSpec, size: float) -> float:
    match spec:
        case PretrainSpec():
            return size * WEIGHT_BYTES["float32"]
        case PruneSpec():
            return size * (MASK_BYTES if spec.stores_masks else WEIGHT_BYTES[spec.dtype])
        case ShardSpec(of=GenerateSpec()):
            return _tokens(spec) * TOKEN_BYTES
        case GenerateSpec() | DrawSpec():
            return spec.num_samples * spec.seqlen * TOKEN_BYTES
        case FilterSpec():
            return _bytes(spec.scores.samples, size) * (1 - spec.drop_fraction)
        case WindowsSpec():
            return spec.nsamples * spec.seqlen * TOKEN_BYTES / 2
        case ScoreSpec():
            each = 12 * TOKEN_BYTES + STATES_BYTES * spec.hidden_states
            return spec.samples.num_samples * each
        case _:
            return 0.0
