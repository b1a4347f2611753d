"""The engines that generate and answer."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from pipeline.specs.base import Spec


class Vllm(Spec):
    """The vLLM engine. All its settings are here, since each can move the last bit of a logit.

    The weights' type is the model's `dtype`; the longest text is `seqlen` where it generates, and
    the longest that the model takes where it answers tasks.
    """

    name: Literal["vllm"] = "vllm"

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs over which every matrix of a replica is spread."""

    pipeline_parallel_size: int = Field(default=1, ge=1)
    """GPUs, or groups of them, over which a replica's layers are spread."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory for weights and key-value cache; unused on a CPU, where the cache
    is as large as a shard, or a batch of `batch_tokens`, needs."""

    enable_prefix_caching: bool = False
    """Compute what the prefixes of a shard share only once; of no use with short ones."""

    enforce_eager: bool = False
    """Neither compile the model nor capture CUDA graphs: a quicker start and slower generation."""

    @property
    def gpus(self) -> int:
        """GPUs of a replica, where there are any."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


VLLM_LOWEST_TEMPERATURE = 0.01
"""What vLLM raises a lower temperature to, but for 0."""


def _named_engine(value: object) -> object:
    """`"vllm"` as `{name: vllm}`, and `{name: transformers}` as `"transformers"`."""
    if value == "vllm":
        return {"name": "vllm"}
    return "transformers" if value == {"name": "transformers"} else value


def _engine_tag(value: object) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", value)
    return f"{name}-engine"


Backend = Annotated[
    Annotated[Literal["transformers"], Tag("transformers-engine")]
    | Annotated[Vllm, Tag("vllm-engine")],
    Discriminator(
        _engine_tag,
        custom_error_type="no_such_backend",
        custom_error_message="there is no such backend; known are transformers and vllm",
    ),
    BeforeValidator(_named_engine),
]
"""The engine that generates or answers. Two engines differ in the last bits of a logit, and so in
the text that they write: it is part of the key."""
