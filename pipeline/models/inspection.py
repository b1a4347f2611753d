"""Where a model's checkpoint is, and what is known of it before its weights are loaded."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.errors import InputError
from pipeline.hub import copy_of, hub_answers, local_folder, model_item
from pipeline.models.vocabulary import check_rows, embedding_rows
from pipeline.models.weight_files import (
    check_config,
    check_files,
    check_tensors,
    safetensors_files,
)
from pipeline.specs import HubModel, LocalModel, Model, PretrainSpec, PruneSpec
from pipeline.stage import Artifacts


class Inspected(NamedTuple):
    """A checkpoint without its weights."""

    config: Any
    tokenizer: Any
    unexpected_tensors: Sequence[str] = ()
    """Tensors that the model does not use; empty if its files are not on this machine."""


# --------------------------------------------------------------------------------------- location


def checkpoint_location(spec: Model, artifacts: Artifacts) -> tuple[str, dict[str, Any]]:
    """Return a model's folder or name on the hub, and the options of `from_pretrained`.

    A model that is stored as masks has the location of its dense model: tokenizer and
    configuration are the same, the weights are not.
    """
    match spec:
        case PruneSpec(stores_masks=True):
            return checkpoint_location(spec.model, artifacts)
        case HubModel():
            copy = copy_of(model_item(spec))
            trust = {"trust_remote_code": trusts_code(spec)}
            if copy is not None:
                return str(copy), trust
            return spec.name, {"revision": spec.revision, **trust}
        case LocalModel():
            return spec.path, {"trust_remote_code": trusts_code(spec)}
        case _:
            folder = artifacts[spec.key] / "model"
            return str(folder), {"trust_remote_code": trusts_code(spec)}


def trusts_code(spec: Model) -> bool:
    """Return whether the grid allows code that comes with the model, or with its dense model."""
    match spec:
        case PruneSpec():
            return trusts_code(spec.model)
        case PretrainSpec():
            return False
        case _:
            return spec.trust_remote_code


def allows_pickle(spec: Model) -> bool:
    """Return whether the grid allows unpickling this checkpoint's weights."""
    return isinstance(spec, HubModel | LocalModel) and spec.allow_pickle


# ----------------------------------------------------------------------------------------- checks


def inspect_model(spec: HubModel | LocalModel) -> Inspected | None:
    """Check all that can be known of a model without loading its weights.

    Returns:
        None if the hub is out of reach and the model is not in its cache.

    Raises:
        InputError: if there is no such model, its weights are incomplete or of a kind that is not
            pruned, or its tokenizer lacks what generation needs.
    """
    location, options = checkpoint_location(spec, {})
    copied = isinstance(spec, HubModel) and copy_of(model_item(spec)) is not None
    cached = isinstance(spec, HubModel) and not copied and not hub_answers()
    options["local_files_only"] = cached
    try:
        unexpected = check_checkpoint(spec, {}, local_files_only=cached)
        config = AutoConfig.from_pretrained(location, **options)
        read_generation_settings(location, config, options)
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        if cached:
            return None
        remedy = f"cannot be loaded: {loading_reason(error)}"
        raise InputError("model", location, remedy) from error
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        remedy = "its tokenizer has neither BOS nor EOS, and text cannot begin or end; add one"
        raise InputError("model", location, remedy)
    check_rows(location, tokenizer, embedding_rows(config))
    return Inspected(config, tokenizer, unexpected)


def check_checkpoint(
    spec: Model, artifacts: Artifacts, local_files_only: bool = False
) -> Sequence[str]:
    """Check the files of a checkpoint from outside before any weight is loaded.

    Returns:
        Tensors that the model does not use; empty if its files are not on this machine.

    Raises:
        InputError: if files or tensors are missing, damaged, or of a kind that is not pruned.
    """
    if not isinstance(spec, HubModel | LocalModel):
        return ()
    location, options = checkpoint_location(spec, artifacts)
    if isinstance(spec, LocalModel) and Path(location).is_file():
        raise InputError("model", location, "is a file: give the folder that it is in")
    folder = local_folder(spec)
    if folder is not None and str(folder) == location:  # the hub's cache may be incomplete
        check_files(folder, spec.allow_pickle)
    config = AutoConfig.from_pretrained(location, local_files_only=local_files_only, **options)
    check_config(location, config)
    files = [] if folder is None else safetensors_files(folder)
    return check_tensors(location, files, weightless_model(config, spec)) if files else ()


def weightless_model(config: Any, spec: Model) -> Any:
    """Return a model of a configuration on the meta device: shapes without values or memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusts_code(spec))


def read_generation_settings(
    location: str, config: Any, options: dict[str, Any]
) -> GenerationConfig:
    """Return a checkpoint's generation settings, else those that follow from its configuration.

    Raises:
        OSError: if the file with the settings cannot be read.
    """
    try:
        return GenerationConfig.from_pretrained(location, **options)
    except OSError:
        if Path(location, "generation_config.json").exists():  # and cannot be read
            raise
        return GenerationConfig.from_model_config(config)


# ----------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def loading_errors(location: str, problem: str = "cannot be loaded") -> Iterator[None]:
    """Turn what transformers raises into an `InputError` that names the model and the problem."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError("model", location, f"{problem}: {loading_reason(error)}") from error


def loading_reason(error: Exception) -> str:
    """Return the first line of an error, or what to do about code and pickles."""
    if "trust_remote_code" in str(error):
        return (
            "code comes with it, which is not run: set trust_remote_code: true for this model if "
            "you trust who wrote it"
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "safetensors" in lines[0]:
        return f"{lines[0]} (weights that are pickles are read with allow_pickle: true only)"
    return lines[0]
