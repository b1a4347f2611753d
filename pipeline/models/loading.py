"""Loading a model: whole or layer by layer, its tokenizer and its settings."""

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.environment import scratch_folder
from pipeline.models.inspection import (
    allows_pickle,
    check_checkpoint,
    checkpoint_location,
    loading_errors,
    read_generation_settings,
    weightless_model,
)
from pipeline.models.layer_files import apply_masks
from pipeline.models.memory import DEFAULT_MODEL_MEMORY, ModelMemory, fits
from pipeline.models.streaming import load_streamed, set_memory
from pipeline.models.vocabulary import Vocabulary, check_shared, embedding_rows
from pipeline.models.weight_files import whole_model
from pipeline.progress import phase
from pipeline.specs import Model, PruneSpec, StageSpec, canonical_json
from pipeline.stage import Artifacts, Latest


class _Held(NamedTuple):
    """What a worker keeps of a model."""

    model: Any
    tokenizer: Any = None
    scratch: tempfile.TemporaryDirectory[str] | None = None
    """The folder of some of its layers."""

    def release(self) -> None:
        """Remove the folder."""
        if self.scratch is not None:
            self.scratch.cleanup()


_models: Latest[_Held] = Latest(release=_Held.release)


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@phase("loading the model")
def load_model(spec: Model, artifacts: Artifacts, device: torch.device | None = None) -> Any:
    """Load a model in its spec's dtype and in evaluation mode.

    A model that is stored as masks is its dense model with those weights zeroed: bit for bit what
    the pruner left.

    Raises:
        InputError: if there is no such model, or its checkpoint lacks weights.
        LayerFileError: if masks do not fit their model.
    """
    if isinstance(spec, PruneSpec) and spec.stores_masks:
        model = load_model(spec.model, artifacts, device)
        apply_masks(model, artifacts[spec.key] / "masks")
        return model
    location, options = checkpoint_location(spec, artifacts)
    with loading_errors(location):
        check_checkpoint(spec, artifacts)
        loaded = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=getattr(torch, spec.dtype),
            use_safetensors=not allows_pickle(spec) or None,
            ignore_mismatched_sizes=True,  # `whole_model` refuses them by name
            output_loading_info=True,
            **options,
        )
    return whole_model(location, loaded).eval().to(device or default_device())


def loaded(model: Model, artifacts: Artifacts) -> tuple[Any, Any]:
    """Return a model and its tokenizer; those of the last call are kept.

    Raises:
        InputError: if either cannot be loaded.
    """
    held = _models.get(
        model_identity(model, artifacts),
        lambda: _Held(load_model(model, artifacts), load_tokenizer(model, artifacts)),
    )
    return held.model, held.tokenizer


def opened(model: Model, artifacts: Artifacts, memory: ModelMemory) -> Any:
    """Return a model, whole or not, as `open_model` does; that of the last call is kept.

    Raises:
        InputError, LayerFileError: as there.
    """

    def hold() -> _Held:
        scratch = tempfile.TemporaryDirectory(prefix="calprune-layers-", dir=scratch_folder())
        return _Held(open_model(model, artifacts, Path(scratch.name), memory), scratch=scratch)

    return _models.get((model_identity(model, artifacts), memory), hold).model


def model_identity(spec: Model, artifacts: Artifacts) -> tuple[bytes, Path | None]:
    """Return what identifies a model on a worker: its spec, and its folder if a stage makes it."""
    folder = artifacts.get(spec.key) if isinstance(spec, StageSpec) else None
    return canonical_json(spec.model_dump(mode="json")), folder


@phase("loading the model")
def stream_model(
    spec: Model, artifacts: Artifacts, scratch: Path, device: torch.device | None = None
) -> Any:
    """Load a model but for its decoder layers, which stay in the checkpoint's files.

    `pipeline.models.streaming.resident` reads a layer.

    Args:
        scratch: a folder for as long as the model is used; see `load_streamed`.
        device: for all but the decoder layers.

    Raises:
        InputError: if there is no such model, or its checkpoint lacks weights.
        LayerFileError: if the number of mask files is not that of the decoder layers.
    """
    if isinstance(spec, PruneSpec) and spec.stores_masks:
        model = stream_model(spec.model, artifacts, scratch, device)
        apply_masks(model, artifacts[spec.key] / "masks")
        return model
    location, options = checkpoint_location(spec, artifacts)
    dtype = getattr(torch, spec.dtype)
    options["use_safetensors"] = not allows_pickle(spec) or None
    with loading_errors(location):
        check_checkpoint(spec, artifacts)
        model = load_streamed(location, dtype, device or default_device(), scratch, **options)
    return model.eval()


def open_model(
    spec: Model,
    artifacts: Artifacts,
    scratch: Path,
    memory: ModelMemory = DEFAULT_MODEL_MEMORY,
    models: int = 1,
) -> Any:
    """Load a model whole if its weights fit in memory, else but for its decoder layers.

    Args:
        scratch: as in `stream_model`.
        models: how many models of this size are to be in memory at a time.

    Raises:
        InputError, LayerFileError: as `load_model` and `stream_model` do.
    """
    device = default_device()
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = memory.memory_bytes or machine
    if fits(models * weight_bytes(spec, artifacts), available):
        return load_model(spec, artifacts)
    model = stream_model(spec, artifacts, scratch)
    set_memory(model, memory)
    return model


def weight_bytes(spec: Model, artifacts: Artifacts) -> int:
    """Return the bytes of a model's weights in memory, from its configuration.

    Raises:
        InputError: if it has none that can be read.
    """
    location, options = checkpoint_location(spec, artifacts)
    with loading_errors(location):
        config = AutoConfig.from_pretrained(location, **options)
        model = weightless_model(config, spec)
    model.tie_weights()
    dtype: torch.dtype = getattr(torch, spec.dtype)
    weights: int = sum(each.numel() for each in model.parameters())
    return dtype.itemsize * weights


def load_tokenizer(spec: Model, artifacts: Artifacts) -> Any:
    """Load a model's own tokenizer.

    Raises:
        InputError: if there is none that loads.
    """
    location, options = checkpoint_location(spec, artifacts)
    with loading_errors(location, "has no tokenizer that loads"):
        return AutoTokenizer.from_pretrained(location, **options)


def load_configs(spec: Model, artifacts: Artifacts) -> tuple[Any, GenerationConfig]:
    """Load a checkpoint's configuration and generation settings, as its loaded model has them.

    Raises:
        InputError: if they cannot be read.
    """
    location, options = checkpoint_location(spec, artifacts)
    with loading_errors(location):
        config = AutoConfig.from_pretrained(location, **options)
        return config, read_generation_settings(location, config, options)


def check_shared_vocabulary(
    field: str, named: Model, reader: Model, writer: Model, artifacts: Artifacts
) -> None:
    """Check that a model may read the token ids that another one wrote.

    Args:
        field: the field of the grid that names one of the two.
        named: that model.

    Raises:
        InputError: if their vocabularies differ.
    """

    def vocabulary(model: Model) -> Vocabulary:
        config, _ = load_configs(model, artifacts)
        tokenizer = load_tokenizer(model, artifacts)
        return Vocabulary(location(model), tokenizer.get_vocab(), embedding_rows(config))

    def location(model: Model) -> str:
        return checkpoint_location(model, artifacts)[0]

    if checkpoint_location(reader, artifacts) != checkpoint_location(writer, artifacts):
        check_shared(field, location(named), vocabulary(reader), vocabulary(writer))
