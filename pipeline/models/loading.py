"""Loading whatever can stand where a model stands, and its tokenizer."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.errors import InputError
from pipeline.hub import copy_of, hub_answers, local_folder, model_item
from pipeline.models.layer_files import apply_masks
from pipeline.models.streaming import load_streamed
from pipeline.models.vocabulary import Vocabulary, check_rows, check_shared, embedding_rows
from pipeline.models.weight_files import (
    check_config,
    check_files,
    check_tensors,
    safetensors_files,
    whole_model,
)
from pipeline.progress import phase
from pipeline.specs import (
    HubModel,
    LocalModel,
    Model,
    PretrainSpec,
    PruneSpec,
    StageSpec,
    canonical_json,
)
from pipeline.stage import Artifacts, Latest

_NO_SAFETENSORS = "weights that are pickles are read with allow_pickle: true only"


class Inspected(NamedTuple):
    """What is known of a checkpoint before its weights are loaded."""

    config: Any
    tokenizer: Any
    unexpected_tensors: Sequence[str] = ()
    """Tensors that the model has no use for, where its files are at hand."""


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


@phase("loading the model")
def load_model(spec: Model, artifacts: Artifacts, device: torch.device | None = None) -> Any:
    """The model in evaluation mode, in its spec's dtype.

    A model that is stored as masks is the one that it was made from with these weights zeroed, bit
    for bit what the pruner left.

    Raises:
        InputError: if there is no such model, or its checkpoint lacks weights.
        LayerFileError: if masks do not fit their model.
    """
    if isinstance(spec, PruneSpec) and spec.stores_masks:
        model = load_model(spec.model, artifacts, device)
        apply_masks(model, artifacts[spec.key] / "masks")
        return model
    location, options = checkpoint_location(spec, artifacts)
    with _named(location):
        check_checkpoint(spec, artifacts)
        loaded = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=getattr(torch, model_dtype(spec)),
            use_safetensors=not allows_pickle(spec) or None,
            ignore_mismatched_sizes=True,  # they are reported, and refused, with their names
            output_loading_info=True,
            **options,
        )
    return whole_model(location, loaded).eval().to(device or default_device())


_models: Latest[tuple[Any, Any]] = Latest()


def loaded(model: Model, artifacts: Artifacts) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Raises:
        InputError: if it has one of them only, or neither.
    """
    folder = artifacts[model.key] if isinstance(model, StageSpec) else None
    return _models.get(
        (canonical_json(model.model_dump(mode="json")), folder),
        lambda: (load_model(model, artifacts), load_tokenizer(model, artifacts)),
    )


@phase("loading the model")
def stream_model(
    spec: Model, artifacts: Artifacts, scratch: Path, device: torch.device | None = None
) -> Any:
    """The same model, but for its decoder layers: they stay in the checkpoint's files until they
    are asked for by `pipeline.models.streaming.resident`.

    Args:
        scratch: a folder for as long as the model is used; see `load_streamed`.
        device: for all but the decoder layers.

    Raises:
        InputError: if there is no such model, or its checkpoint lacks weights.
        LayerFileError: if there are not as many files of masks as decoder layers.
    """
    if isinstance(spec, PruneSpec) and spec.stores_masks:
        model = stream_model(spec.model, artifacts, scratch, device)
        apply_masks(model, artifacts[spec.key] / "masks")
        return model
    location, options = checkpoint_location(spec, artifacts)
    dtype = getattr(torch, model_dtype(spec))
    options["use_safetensors"] = not allows_pickle(spec) or None
    with _named(location):
        check_checkpoint(spec, artifacts)
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
        remedy = f"has no tokenizer that loads: {_reason(error)}"
        raise InputError("model", location, remedy) from error


def inspect_model(spec: HubModel | LocalModel) -> Inspected | None:
    """Look at all of a model that can be known without loading its weights.

    Returns:
        None if the hub is out of reach and the model is not in its cache.

    Raises:
        InputError: if there is no such model, its weights are not all there or of a kind that is
            not pruned, or its tokenizer lacks what generation needs.
    """
    location, options = checkpoint_location(spec, {})
    copied = isinstance(spec, HubModel) and copy_of(model_item(spec)) is not None
    cached = isinstance(spec, HubModel) and not copied and not hub_answers()
    options["local_files_only"] = cached
    try:
        unexpected = check_checkpoint(spec, {}, local_files_only=cached)
        config = AutoConfig.from_pretrained(location, **options)
        _generation_settings(location, config, options)
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        if cached:
            return None
        raise InputError("model", location, f"cannot be loaded: {_reason(error)}") from error
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        remedy = "its tokenizer has neither BOS nor EOS, and text cannot begin or end; add one"
        raise InputError("model", location, remedy)
    check_rows(location, tokenizer, embedding_rows(config))
    return Inspected(config, tokenizer, unexpected)


def check_shared_vocabulary(
    field: str, named: Model, reader: Model, writer: Model, artifacts: Artifacts
) -> None:
    """Check that a model may read the token ids that another one wrote.

    Args:
        field, named: what in a grid names which of the two.

    Raises:
        InputError: if they have not one vocabulary.
    """

    def vocabulary(model: Model) -> Vocabulary:
        config, _ = load_configs(model, artifacts)
        tokenizer = load_tokenizer(model, artifacts)
        return Vocabulary(location(model), tokenizer.get_vocab(), embedding_rows(config))

    def location(model: Model) -> str:
        return checkpoint_location(model, artifacts)[0]

    if checkpoint_location(reader, artifacts) != checkpoint_location(writer, artifacts):
        check_shared(field, location(named), vocabulary(reader), vocabulary(writer))


def load_configs(spec: Model, artifacts: Artifacts) -> tuple[Any, GenerationConfig]:
    """The configuration and the generation settings of a checkpoint, as a loaded model has them.

    Raises:
        InputError: if there are none that can be read.
    """
    location, options = checkpoint_location(spec, artifacts)
    with _named(location):
        config = AutoConfig.from_pretrained(location, **options)
        return config, _generation_settings(location, config, options)


def _generation_settings(location: str, config: Any, options: dict[str, Any]) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(location, **options)
    except OSError:
        if Path(location, "generation_config.json").exists():  # and cannot be read
            raise
        return GenerationConfig.from_model_config(config)


def weightless_model(config: Any, spec: Model) -> Any:
    """A model of a configuration whose weights have shapes and no values, and take no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusts_code(spec))


@contextlib.contextmanager
def _named(location: str) -> Iterator[None]:
    """Name the model in what its loading raises."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError("model", location, f"cannot be loaded: {_reason(error)}") from error


def trusts_code(spec: Model) -> bool:
    """Whether the grid lets code run that comes with the model, or with the one it was made of."""
    match spec:
        case PruneSpec():
            return trusts_code(spec.model)
        case PretrainSpec():
            return False
        case _:
            return spec.trust_remote_code


def allows_pickle(spec: Model) -> bool:
    """Whether the grid lets weights of this checkpoint be unpickled."""
    return isinstance(spec, HubModel | LocalModel) and spec.allow_pickle


def check_checkpoint(
    spec: Model, artifacts: Artifacts, local_files_only: bool = False
) -> Sequence[str]:
    """Check a checkpoint that comes from outside by its files, before any weight is loaded.

    Returns:
        Tensors that the model has no use for, where its files are at hand.

    Raises:
        InputError: if files or tensors are missing, damaged, or of a kind that is not pruned.
    """
    if not isinstance(spec, HubModel | LocalModel):
        return ()
    location, options = checkpoint_location(spec, artifacts)
    if isinstance(spec, LocalModel) and Path(location).is_file():
        raise InputError("model", location, "is a file: give the folder that it is in")
    folder = local_folder(spec)
    if folder is not None and str(folder) == location:  # the hub's cache may not have all yet
        check_files(folder, spec.allow_pickle)
    config = AutoConfig.from_pretrained(location, local_files_only=local_files_only, **options)
    check_config(location, config)
    files = [] if folder is None else safetensors_files(folder)
    return check_tensors(location, files, weightless_model(config, spec)) if files else ()


def checkpoint_location(spec: Model, artifacts: Artifacts) -> tuple[str, dict[str, Any]]:
    """The folder or hub name of a model, and the options with which all of it is loaded.

    Of a model that is stored as masks it is that of the model they are for: tokenizer and
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


def _reason(error: Exception) -> str:
    """The first line of what was raised, or what to do about code and pickles."""
    if _wants_code(error):
        return (
            "code comes with it, which is not run: set trust_remote_code: true for this model if "
            "you trust who wrote it"
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]} ({_NO_SAFETENSORS})" if "safetensors" in lines[0] else lines[0]


def _wants_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)
