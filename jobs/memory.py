"""Which stages read their models one decoder layer at a time, as far as a plan can say."""

from cluster.graph import Resources
from jobs.cost import WEIGHT_BYTES, Sizes, model_size
from pipeline.models.memory import WEIGHTS_SHARE, fits
from pipeline.specs import DescribeSpec, EvaluateSpec, ScoreSpec

SMALL_GPU_BYTES = 16e9
"""Models that fit a GPU with this memory are not mentioned: hardly any has less."""

ReadsTexts = ScoreSpec | DescribeSpec | EvaluateSpec
"""Stages that read a model by layer if it does not fit in memory. Pruning always does."""


def weight_bytes(spec: ReadsTexts, weights: float) -> float:
    """Return the bytes of all models that a stage needs at a time.

    Args:
        weights: of one model.
    """
    models = 2 if isinstance(spec, EvaluateSpec) and spec.compares else 1
    return models * weights * WEIGHT_BYTES[spec.model.dtype]


def is_streamed(spec: ReadsTexts, weights: float, memory: float | None) -> bool:
    """Return whether a stage reads its models by layer.

    Args:
        weights: of one model.
        memory: bytes of the GPU, or of the host for a stage without one; None takes the smallest
            GPU that is common.
    """
    return not fits(weight_bytes(spec, weights), SMALL_GPU_BYTES if memory is None else memory)


def reads_by_layer(spec: ReadsTexts, sizes: Sizes, resources: Resources) -> str | None:
    """Return why a stage reads its models by layer; None if it does not, or may not.

    Args:
        resources: what the stage runs on.
    """
    size, memory = model_size(spec.model, sizes), resources.memory_bytes
    if size is None or memory is None or resources.gpus:
        return None
    if not is_streamed(spec, size.whole, memory):
        return None
    share = f"{WEIGHTS_SHARE:.0%} of {spec.kind}.memory_bytes ({memory / 1e9:,.1f} GB)"
    return f"{weight_bytes(spec, size.whole) / 1e9:,.1f} GB of weights are more than {share}"


def least_gpu_bytes(spec: ReadsTexts, sizes: Sizes, resources: Resources) -> float | None:
    """Return the memory of the smallest GPU on which a stage loads its models whole.

    None if it has no GPU, the models' size is unknown, or they fit almost every GPU.
    """
    size = model_size(spec.model, sizes)
    if size is None or not resources.gpus or not is_streamed(spec, size.whole, SMALL_GPU_BYTES):
        return None
    return weight_bytes(spec, size.whole) / WEIGHTS_SHARE
