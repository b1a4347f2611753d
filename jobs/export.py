"""Export a pruned model from a store as a checkpoint that other programs load."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from cluster.store import CorruptArtifactError, Manifest, Store
from jobs.before_after import measured_in
from jobs.model_card import model_card
from pipeline.errors import InputError
from pipeline.files import fingerprint
from pipeline.specs import LocalModel, Model, PruneSpec, StageSpec, spec_fields

_AGAIN = "run its grid again, then export"

AnyStage = TypeVar("AnyStage", bound=StageSpec)


def export(store: Store, key: str, folder: Path, *, packed: bool = False) -> None:
    """Write the pruned model `key` to `folder` as an ordinary checkpoint with its tokenizer and a
    card, which has what the store's results tables say of it.

    Args:
        packed: store the weights of a rounded model as integers (`pipeline.pruning.packed`).

    Raises:
        InputError: if the store has no such model, if it or the dense model under its masks is
            damaged, changed or gone, if it cannot be packed, or if the folder is not empty.
    """
    manifest = store.manifest(key)
    if manifest is None or manifest.kind != "prune":
        raise InputError(
            "key",
            key,
            f"{store.url} has no pruned model with this key; the results table's column prune_key "
            "lists them",
        )
    spec = stored_spec(manifest, PruneSpec)
    check_unused(folder)
    _check_dense(spec)
    artifacts = fetched(store, key, (spec, *spec.rests_on()))
    from transformers.utils.logging import disable_progress_bar

    from pipeline.models.checkpoint import write_checkpoint
    from pipeline.pruning.packed import check_packable, pack_checkpoint

    if packed:
        check_packable(spec, artifacts[key])
    disable_progress_bar()  # one for each shard
    with whole_folder(folder) as partial:
        write_checkpoint(spec, artifacts, partial)
        if packed:
            pack_checkpoint(partial, spec, artifacts[key])
        card = model_card(manifest, spec, measured_in(store, key), packed=packed)
        (partial / "README.md").write_text(card)


def check_unused(folder: Path) -> None:
    """Check that an export overwrites nothing.

    Raises:
        InputError: if the folder is not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError("folder", str(folder), "exists already; name a new or an empty folder")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to; rename it to `folder` once everything is written."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    partial.replace(folder)


def fetched(store: Store, key: str, specs: tuple[StageSpec, ...]) -> dict[str, Path]:
    """Return the folder, by key, of each artifact that the export of `key` reads.

    Raises:
        InputError: if one is damaged or gone.
    """
    try:
        return {part.key: store.fetch(part.key) for part in specs}
    except CorruptArtifactError as error:
        raise InputError("key", key, f"{error}; {_AGAIN}") from error


def stored_spec(manifest: Manifest, kind: type[AnyStage]) -> AnyStage:
    """Return the spec that an artifact was made from.

    Raises:
        InputError: if this release would give it another key.
    """
    remedy = f"was made by another release of calprune; {_AGAIN}"
    try:
        spec = kind.model_validate(spec_fields(manifest.spec))
    except ValidationError as error:
        raise InputError("key", manifest.key, remedy) from error
    if spec.key != manifest.key:
        raise InputError("key", manifest.key, remedy)
    return spec


def _check_dense(model: Model) -> None:
    """Check that a local model has not changed since its masks were made."""
    match model:
        case PruneSpec(stores_masks=True):
            _check_dense(model.model)
        case LocalModel(fingerprint=str()):
            if fingerprint(model.path, whole_files=False) != model.fingerprint:
                raise InputError(
                    "model", model.path, f"has changed since it was pruned; restore it, or {_AGAIN}"
                )
