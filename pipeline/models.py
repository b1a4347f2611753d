"""Loading whatever can stand where a model stands, and its tokenizer."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.copies import copy_of, model_item
from pipeline.errors import InputError
from pipeline.hub import hub_answers
from pipeline.layer_files import apply_masks
from pipeline.specs import HubModel, LocalModel, Model, PretrainSpec, PruneSpec
from pipeline.streaming import load_streamed

Artifacts = Mapping[str, Path]
"""A stage's input artifacts: key to local folder."""


def default_device() -> torch.device:
    """The accelerator that is there, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_dtype(spec: Model) -> str:
    """The type in which a model's weights are held; a pruned model keeps its dense model's."""
    match spec:
        case PruneSpec():
            return model_dtype(spec.model)
        case PretrainSpec():
            return "float32"
        case _:
            return spec.dtype


def load_model(spec: Model, artifacts: Artifacts, device: torch.device | None = None) -> Any:
    """The model in evaluation mode, in its spec's dtype.

    A model that is stored as masks is the one that it was made from with these weights zeroed, bit
    for bit what the pruner left.

    Raises:
        InputError: if there is no such model.
        LayerFileError: if masks do not fit their model.
    """
    if isinstance(spec, PruneSpec) and spec.stores_masks:
        model = load_model(spec.model, artifacts, device)
        apply_masks(model, artifacts[spec.key] / "masks")
        return model
    location, options = checkpoint_location(spec, artifacts)
    with _named(location):
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=getattr(torch, model_dtype(spec)), **options
        )
    return model.eval().to(device or default_device())


def stream_model(
    spec: Model, artifacts: Artifacts, scratch: Path, device: torch.device | None = None
) -> Any:
    """The same model, but for its decoder layers: they stay in the checkpoint's files until they
    are asked for by `pipeline.streaming.resident`.

    Args:
        scratch: a folder for as long as the model is used; see `load_streamed`.
        device: for all but the decoder layers.

    Raises:
        InputError: if there is no such model.
        LayerFileError: if there are not as many files of masks as decoder layers.
    """
    if isinstance(spec, PruneSpec) and spec.stores_masks:
        model = stream_model(spec.model, artifacts, scratch, device)
        apply_masks(model, artifacts[spec.key] / "masks")
        return model
    location, options = checkpoint_location(spec, artifacts)
    dtype = getattr(torch, model_dtype(spec))
    with _named(location):
        model = load_streamed(location, dtype, device or default_device(), scratch, **options)
    return model.eval()


def load_tokenizer(spec: Model, artifacts: Artifacts) -> Any:
    """The model's own tokenizer.

    Raises:
        InputError: if there is none.
    """
    location, options = checkpoint_location(spec, artifacts)
    try:
        return AutoTokenizer.from_pretrained(location, **options)
    except (OSError, ValueError) as error:
        remedy = f"has no tokenizer that loads: {_first_line(error)}"
        raise InputError("model", location, remedy) from error


def inspect_model(spec: HubModel | LocalModel) -> Any | None:
    """The configuration of a model that is not loaded yet, after a look at its tokenizer.

    Returns:
        None if the hub is out of reach and the model is not in its cache.

    Raises:
        InputError: if there is no such model, or its tokenizer lacks what generation needs.
    """
    location, options = checkpoint_location(spec, {})
    copied = isinstance(spec, HubModel) and copy_of(model_item(spec)) is not None
    cached = isinstance(spec, HubModel) and not copied and not hub_answers()
    try:
        config = AutoConfig.from_pretrained(location, local_files_only=cached, **options)
        tokenizer = AutoTokenizer.from_pretrained(location, local_files_only=cached, **options)
    except (OSError, ValueError) as error:
        if cached:
            return None
        raise InputError("model", location, f"cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        remedy = "its tokenizer has neither BOS nor EOS, and text cannot begin or end; add one"
        raise InputError("model", location, remedy)
    return config


def load_configs(spec: Model, artifacts: Artifacts) -> tuple[Any, GenerationConfig]:
    """The configuration and the generation settings of a checkpoint, as a loaded model has them."""
    folder, options = checkpoint_location(spec, artifacts)
    config = AutoConfig.from_pretrained(folder, **options)
    try:
        return config, GenerationConfig.from_pretrained(folder, **options)
    except OSError:
        return config, GenerationConfig.from_model_config(config)


def weightless_model(config: Any) -> Any:
    """A model of a configuration whose weights have shapes and no values, and take no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@contextlib.contextmanager
def _named(location: str) -> Iterator[None]:
    """Name the model in what its loading raises."""
    try:
        yield
    except OSError as error:
        raise InputError("model", location, f"cannot be loaded: {_first_line(error)}") from error


def checkpoint_location(spec: Model, artifacts: Artifacts) -> tuple[str, dict[str, str]]:
    """The folder or hub name of a model, and the options that tell its revision.

    Of a model that is stored as masks it is that of the model they are for: tokenizer and
    configuration are the same, the weights are not.
    """
    match spec:
        case PruneSpec(stores_masks=True):
            return checkpoint_location(spec.model, artifacts)
        case HubModel():
            copy = copy_of(model_item(spec))
            return (spec.name, {"revision": spec.revision}) if copy is None else (str(copy), {})
        case LocalModel():
            return spec.path, {}
        case _:
            return str(artifacts[spec.key] / "model"), {}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
