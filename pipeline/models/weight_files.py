"""Checks of a checkpoint's files before any weight is loaded."""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from pipeline.errors import InputError

logger = logging.getLogger(__name__)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Files with pickled weights."""

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
"""Files with configurations, tokenizers and code."""

_POINTER = b"version https://git-lfs"
"""First bytes of a file that Git LFS leaves in place of a large one."""

_POINTER_BYTES = 1024
"""Upper limit of a pointer file's size."""

_NAMED = 3
"""Names that an error lists; the others are counted."""

_PICKLE_REMEDY = (
    "which may run code when it is loaded: convert it to safetensors, or set allow_pickle: true "
    "for this model if you trust who made it"
)


# ---------------------------------------------------------------------------------------- folders


def check_files(folder: Path, allow_pickle: bool) -> None:
    """Check that a folder holds complete weights that transformers reads.

    Raises:
        InputError: if it does not.
    """

    def refused(remedy: str) -> InputError:
        return InputError("model", str(folder), remedy)

    if (folder / "adapter_config.json").is_file():
        raise refused(
            "holds a PEFT adapter, and the model that it adapts is not in the key: merge them "
            "(merge_and_unload) and save the result"
        )
    found = _weights(folder, allow_pickle)
    read = [path for form in SMALL_FILES for path in folder.glob(form)]
    read += folder.iterdir() if found is None else shards(found)
    pointers = sorted({path.name for path in read if _is_pointer(path)})
    if pointers:
        raise refused(
            f"{short_list(pointers)}: Git LFS pointers, not the files: run `git lfs pull`"
        )
    if found is not None:
        missing = sorted(path.name for path in shards(found) if not path.is_file())
        if missing:
            raise refused(
                f"{found.name} names files that are missing: {short_list(missing)}; fetch them"
            )
        return
    pickles = sorted(path.name for form in PICKLES for path in folder.glob(form))
    if pickles and not allow_pickle:
        raise refused(f"{pickles[0]} is a pickle, {_PICKLE_REMEDY}")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise refused(
            f"has {others[0]} but neither model.safetensors nor model.safetensors.index.json, "
            "which says where each tensor is: fetch it too"
        )
    quantized = sorted(path.name for path in folder.glob("*.gguf"))
    if quantized:
        raise refused(
            f"holds weights as GGUF only: take the original checkpoint, or convert {quantized[0]} "
            "with from_pretrained(folder, gguf_file=...).save_pretrained(new_folder)"
        )
    raise refused("has no weights: it needs model.safetensors, or its parts and their index")


def _weights(folder: Path, allow_pickle: bool) -> Path | None:
    """Return the file or index from which transformers reads a folder's weights."""
    names = ["model.safetensors", "model.safetensors.index.json"]
    if allow_pickle:
        names += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def safetensors_files(folder: Path) -> list[Path]:
    """Return the safetensors files with a folder's weights; none if one is missing."""
    found = _weights(folder, allow_pickle=False)
    files = [] if found is None else shards(found)
    return files if all(path.is_file() for path in files) else []


def shards(weights: Path) -> list[Path]:
    """Return the files with weights: those that an index names, or the file itself.

    Raises:
        InputError: if the index cannot be read.
    """
    if weights.suffix != ".json":
        return [weights]
    try:
        names = json.loads(weights.read_text())["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError("model", str(weights), "is no index of weights: fetch it again") from error
    return [weights.parent / name for name in sorted(set(names))]


def _is_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > _POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


# --------------------------------------------------------------------------------- configurations


def check_config(location: str, config: Any) -> None:
    """Check that a configuration is that of a decoder-only model without quantized weights.

    Raises:
        InputError: if it is not.
    """
    if getattr(config, "is_encoder_decoder", False):
        remedy = "is an encoder-decoder model: take one that is a decoder only"
        raise InputError("model", location, remedy)
    # GPT-NeoX has the field too, and is a decoder.
    encoder = getattr(config, "is_decoder", None) is False
    if encoder and not config.model_type.startswith("gpt_neox"):
        remedy = "is an encoder (is_decoder: false), which reads ahead: take a decoder"
        raise InputError("model", location, remedy)
    for each in (config, config.get_text_config()):
        quantization = getattr(each, "quantization_config", None)
        if quantization is not None:
            if not isinstance(quantization, dict):
                quantization = quantization.to_dict()
            method = quantization.get("quant_method", "an unnamed method")
            method = getattr(method, "value", method)
            raise InputError(
                "model",
                location,
                f"its weights are quantized ({method}), which is not pruned: take the checkpoint "
                "that it was made from",
            )


# ---------------------------------------------------------------------------------------- tensors


def check_tensors(location: str, files: Sequence[Path], skeleton: Any) -> Sequence[str]:
    """Check names, shapes and types of the tensors in safetensors files against a model.

    transformers loads tensors without values into a model without weights, so all its renames,
    fusions and ties apply.

    Args:
        skeleton: the model on the meta device.

    Returns:
        Tensors that the model does not use.

    Raises:
        InputError: if one is missing, has another shape, is packed, or a file is damaged.
    """
    held = _meta_tensors(location, files)
    with _quiet():
        try:
            _, found = type(skeleton).from_pretrained(
                None,
                config=skeleton.config,
                state_dict=held,
                device_map="meta",
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except NotImplementedError:  # a conversion that needs values
            return ()
        except RuntimeError as error:  # from a conversion whose tensors do not fit together
            found = _compared(held, revert_weight_conversion(skeleton, skeleton.state_dict()))
            if not any(found.values()):
                raise InputError("model", location, f"cannot be loaded: {error}") from error
    return _unexpected(location, found)


def whole_model(location: str, loaded: tuple[Any, dict[str, Any]]) -> Any:
    """Return a loaded model, with the names of tensors that it does not use as
    `unexpected_tensors`.

    Args:
        loaded: what `from_pretrained` with `output_loading_info` returns.

    Raises:
        InputError: if weights are missing or have other shapes.
    """
    model, loading_info = loaded
    model.unexpected_tensors = _unexpected(location, loading_info)
    if model.unexpected_tensors:
        some = short_list(model.unexpected_tensors)
        logger.info("%s: the model has no use for %s", location, some)
    return model


def unexpected_tensors(model: Any) -> dict[str, list[str]]:
    """Return a report's entry for tensors that the model does not use; empty if there are none."""
    names: list[str] = getattr(model, "unexpected_tensors", [])
    return {"unexpected_tensors": names} if names else {}


def _unexpected(location: str, loading_info: dict[str, Any]) -> list[str]:
    """Return the unexpected tensors of a loading report.

    Raises:
        InputError: if parameters are missing, which transformers draws at random, or have other
            shapes.
    """
    missing, unexpected = (
        sorted(loading_info[f"{kind}_keys"]) for kind in ("missing", "unexpected")
    )
    if missing:
        packed = any(name.endswith(("qweight", "scales")) for name in unexpected)
        remedy = "looks quantized" if packed else "is incomplete"
        raise InputError(
            "model",
            location,
            f"lacks {short_list(missing)}: the checkpoint {remedy}, take another one",
        )
    mismatched = sorted(loading_info["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        more = f", and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
        shapes = f"{list(stored)}, but {list(expected)} by config.json"
        remedy = f"{name} is {shapes}{more}: fetch both again"
        raise InputError("model", location, remedy)
    return unexpected


def _meta_tensors(location: str, files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors in files by name, without their values."""
    held = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    form = part.get_dtype()
                    if form.startswith(("F8", "F4")) or (
                        form in ("I8", "U8") and name.endswith("weight")
                    ):
                        remedy = f"{name} is stored as {form}: take the checkpoint before it"
                        raise InputError("model", location, f"{remedy} was quantized")
                    held[name] = torch.empty(part.get_shape(), device="meta")
        except SafetensorError as error:
            remedy = f"{path.name} is damaged or cut short ({error}): fetch it again"
            raise InputError("model", location, remedy) from error
    return held


def _compared(held: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Collection[Any]]:
    """Compare tensors by name and shape, in the form of a loading report."""
    both = held.keys() & expected.keys()
    return {
        "missing_keys": expected.keys() - held.keys(),
        "unexpected_keys": held.keys() - expected.keys(),
        "mismatched_keys": [
            (name, held[name].shape, expected[name].shape)
            for name in both
            if held[name].shape != expected[name].shape
        ],
    }


def short_list(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report and progress bar, which are for loading."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
