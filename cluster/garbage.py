"""What a store holds that nothing needs any more."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from cluster import leases
from cluster.store import CorruptArtifactError, Store


@dataclass(frozen=True)
class Garbage:
    """What may be removed; every list is sorted."""

    artifacts: list[str]
    """Keys."""
    attempts: list[str]
    """Full paths of folders that belong to no artifact and that nobody is writing."""
    kept: list[str]
    """Keys of unfinished stages with kept files that nobody will use."""
    failures: list[str]
    """Keys of stages that nobody asks for."""
    bytes: int
    """Size of all of it."""


def find(store: Store, reached: Collection[str]) -> Garbage:
    """Find what is not reached, not used by a living run, and not being made under a lease.

    Waits until it is known which runs are alive: up to a minute if one is dead.

    Args:
        reached: keys to keep.
    """
    needed = {*reached, *leases.Observer(store).used()}
    keys = store.keys()
    artifacts = sorted(keys - needed)
    attempts = _orphaned_attempts(store, keys)
    kept = sorted({path.rsplit("/", 2)[-2] for path in store.kept()} - needed)
    failures = sorted(store.names("failures") - needed)
    folders = [f"{store.root}/data/{key}" for key in artifacts]
    folders += [path for path in attempts if path.rsplit("/", 2)[-2] not in {*artifacts}]
    folders += [f"{store.root}/partial/{key}" for key in kept]
    size = sum(store.fs.du(folder) for folder in folders)
    return Garbage(artifacts, sorted(attempts), kept, failures, size)


def collect(store: Store, garbage: Garbage) -> None:
    """Remove garbage. A run that began meanwhile and needs some of it makes it again."""
    for key in garbage.artifacts:
        store.discard(key)
    for path in garbage.attempts:
        store.remove_folder(path)
    for key in garbage.kept:
        store.remove_folder(f"{store.root}/partial/{key}")
    for key in garbage.failures:
        store.clear_failure(key)


def _orphaned_attempts(store: Store, keys: Collection[str]) -> list[str]:
    """Return folders that belong to no artifact and that nobody can be writing."""
    of_key: dict[str, list[str]] = defaultdict(list)
    for path in store.attempts():
        of_key[path.rsplit("/", 2)[-2]].append(path)
    orphaned: list[str] = []
    for key, paths in of_key.items():
        if key in keys and len(paths) == 1:
            continue
        # Every attempt begins under a lease. The lease is read before the manifest, so an attempt
        # that ends in between has its manifest.
        run = leases.holder(store, key)
        if run is not None and store.read(f"runs/{run}.json") is not None:
            continue
        try:
            manifest = store.manifest(key)
        except CorruptArtifactError:
            continue
        orphaned += [path for path in paths if manifest is None or not path.endswith(manifest.data)]
    return orphaned
