"""Copies in the store of what a grid reads from the hub."""

import dataclasses
import logging
import platform
import time
from importlib import metadata
from pathlib import Path

from cluster import leases
from cluster.graph import Graph
from cluster.store import CorruptArtifactError, Store
from jobs import outside
from jobs.grid import Grid
from jobs.plan import Plan
from jobs.stages import HUB
from pipeline.errors import InputError
from pipeline.hub import HubItem, download, model_item
from pipeline.specs import HubModel

logger = logging.getLogger(__name__)

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Environment of workers when the store holds all that they read from the hub."""


def hub_items(plan: Plan) -> list[HubItem]:
    """Return what the grid's stages read from the hub, each item once."""
    found = {item for spec in plan.specs.values() for item in outside.hub_reads(spec)}
    return sorted(found, key=lambda item: item.key)


def copied_items(plan: Plan, store: Store) -> list[HubItem]:
    """Return the hub items of the grid's stages that the store holds."""
    present = _present(store)
    # `hub_items` may load lm-eval, which takes seconds: skip it if there are no copies.
    return [item for item in hub_items(plan) if item.key in present] if present else []


def fetch(plan: Plan, store: Store) -> list[HubItem]:
    """Copy missing and damaged hub items into the store.

    Returns:
        The items copied.

    Raises:
        InputError: if the hub lacks an item or cannot be reached.
    """
    items = hub_items(plan)
    copied = {item.key for item in copied_items(plan, store)}
    for key, problem in store.damaged(copied).items():
        logger.warning("copy %s is damaged: %s; fetching it again", key, problem)
        store.discard(key)
    present = store.keys()
    missing = [item for item in items if item.key not in present]
    with leases.Claim(store, [item.key for item in items]) as claim:
        for item in missing:
            logger.info("fetching %s %s", item.kind, item.name)
            leases.acquire(store, item.key, claim.run, ())  # keeps `store gc` off it
            _fetch(item, store)
            leases.release(store, item.key, claim.run)
    return missing


def _fetch(item: HubItem, store: Store) -> None:
    started = time.monotonic()
    with store.attempt(item.key) as attempt:
        download(item, attempt.folder)
        attempt.commit(
            kind=f"hub-{item.kind}",
            spec=item._asdict(),
            report={},
            seconds=time.monotonic() - started,
            peak_memory_bytes=None,
            versions={"huggingface_hub": metadata.version("huggingface_hub")},
            host=platform.node(),
        )


def copies(plan: Plan, store: Store) -> dict[HubItem, Path]:
    """Return the local folder of each hub item of the plan that the store holds.

    Raises:
        InputError: if a copy is damaged.
    """
    return {item: _folder(item, store) for item in copied_items(plan, store)}


def model_copies(grid: Grid, store: Store) -> dict[HubItem, Path]:
    """Return the local folder of each hub model of the grid that the store holds.

    Raises:
        InputError: if a copy is damaged.
    """
    items = [model_item(model) for model in grid.models.values() if isinstance(model, HubModel)]
    present = _present(store) if items else set()
    return {item: _folder(item, store) for item in items if item.key in present}


def _folder(item: HubItem, store: Store) -> Path:
    try:
        return store.fetch(item.key)
    except CorruptArtifactError as error:
        raise _damaged(item, error.problem) from error


def _damaged(item: HubItem, problem: str) -> InputError:
    remedy = f"its copy in the store is damaged ({problem}); run `fetch` to copy it again"
    return InputError(item.kind, item.name, remedy)


def _present(store: Store) -> set[str]:
    keys = store.keys()
    return {key for key in keys if key.startswith(HUB)}


def with_copies(plan: Plan, store: Store) -> tuple[Graph, dict[str, str]]:
    """Return the plan's graph with the store's copies as inputs, and its workers' environment.

    The environment switches the hub off if the store holds every item.

    Raises:
        InputError: if a copy is damaged.
    """
    present = {item.key: item for item in copied_items(plan, store)}
    if not present:
        return plan.graph, {}
    for key, problem in store.damaged(present).items():
        raise _damaged(present[key], problem)
    graph = {}
    for key, stage in plan.graph.items():
        read = [item.key for item in outside.hub_reads(plan.specs[key]) if item.key in present]
        inputs = tuple(dict.fromkeys([*stage.inputs, *read]))
        graph[key] = dataclasses.replace(stage, inputs=inputs)
    complete = {item.key for item in hub_items(plan)} <= present.keys()
    return graph, OFFLINE if complete else {}
