"""What a store holds that nothing needs any more."""

import logging
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from cluster import leases
from cluster.store import CorruptArtifactError, Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Garbage:
    """What may be removed; all sorted."""

    artifacts: list[str]
    """Keys."""
    attempts: list[str]
    """Full paths of folders that no artifact has and nobody is writing."""
    kept: list[str]
    """Keys of stages that nobody will finish, with files kept for another attempt."""
    failures: list[str]
    """Keys of stages that nobody asks for."""
    bytes: int
    """Size of all of it."""


def find(store: Store, reached: Collection[str]) -> Garbage:
    """What none of these keys names, no living run uses, and no lease says is being made.

    Waits until it is known which runs are alive: up to a minute if one is dead.
    """
    needed = {*reached, *leases.Observer(store).used()}
    keys = store.keys()
    artifacts = sorted(keys - needed)
    attempts = _left_attempts(store, keys)
    kept = sorted({path.rsplit("/", 2)[-2] for path in store.kept()} - needed)
    failures = sorted(store.names("failures") - needed)
    folders = [f"{store.root}/data/{key}" for key in artifacts]
    folders += [path for path in attempts if path.rsplit("/", 2)[-2] not in {*artifacts}]
    folders += [f"{store.root}/partial/{key}" for key in kept]
    size = sum(store.fs.du(folder) for folder in folders)
    return Garbage(artifacts, sorted(attempts), kept, failures, size)


def collect(store: Store, garbage: Garbage) -> None:
    """Remove it. Of what a run that has just begun would have used, that run makes another."""
    for key in garbage.artifacts:
        store.discard(key)
    for path in garbage.attempts:
        store.remove_folder(path)
    for key in garbage.kept:
        store.remove_folder(f"{store.root}/partial/{key}")
    for key in garbage.failures:
        store.clear_failure(key)


def _left_attempts(store: Store, keys: Collection[str]) -> list[str]:
    """Folders that are of no artifact and of nobody who may be writing them."""
    of_key: dict[str, list[str]] = defaultdict(list)
    for path in store.attempts():
        of_key[path.rsplit("/", 2)[-2]].append(path)
    left: list[str] = []
    for key, paths in of_key.items():
        if key in keys and len(paths) == 1:
            continue
        # Each was begun under a lease. In this order, one that ends meanwhile has its manifest.
        holder = leases.holder(store, key)
        if holder is not None and store.read(f"runs/{holder}.json") is not None:
            continue
        try:
            manifest = store.manifest(key)
        except CorruptArtifactError:
            continue
        left += [path for path in paths if manifest is None or not path.endswith(manifest.data)]
    return left
