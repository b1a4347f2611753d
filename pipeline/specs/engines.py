"""The engines that generate texts and answer tasks."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from pipeline.specs.base import Spec


class Vllm(Spec):
    """The vLLM engine. Each of its settings can change the last bit of a logit.

    The weights' type is the model's `dtype`. The longest text is `seqlen` for generating, and the
    model's longest for answering tasks.
    """

    name: Literal["vllm"] = "vllm"

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs over which a replica spreads every matrix."""

    pipeline_parallel_size: int = Field(default=1, ge=1)
    """GPUs, or groups of them, over which a replica spreads its layers."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory for weights and key-value cache. Unused on a CPU: there the cache has
    the size that a shard, or a batch of `batch_tokens`, needs."""

    enable_prefix_caching: bool = False
    """Compute only once what the prefixes of a shard share; useless for short prefixes."""

    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: a faster start, and slower generation."""

    @property
    def gpus(self) -> int:
        """GPUs of a replica on a machine with GPUs."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


VLLM_LOWEST_TEMPERATURE = 0.01
"""vLLM raises a lower temperature, except 0, to this."""


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
"""The engine that generates or answers. It is part of the key: engines differ in the last bits of a
logit, and so in the texts that they write."""
