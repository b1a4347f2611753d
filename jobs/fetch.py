"""Copies in the store of all that a grid reads from the hub."""

import dataclasses
import logging
import platform
import time
from importlib import metadata
from pathlib import Path

from cluster.graph import Graph
from cluster.store import Store
from jobs.grid import Grid
from jobs.plan import Plan
from jobs.stages import HUB
from pipeline.copies import HubItem, download, items, model_item
from pipeline.specs import HubModel

logger = logging.getLogger(__name__)

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Environment of workers that have a copy of all that they read."""


def hub_items(plan: Plan) -> list[HubItem]:
    """What the grid's stages read from the hub, each once."""
    found = [item for spec in plan.specs.values() for item in items(spec)]
    return sorted(set(found), key=lambda item: item.key)


def fetch(plan: Plan, store: Store) -> list[HubItem]:
    """Put copies into the store of what it does not have yet.

    Returns:
        What was copied.

    Raises:
        InputError: if the hub does not have something, or is out of reach.
    """
    present = store.keys()
    missing = [item for item in hub_items(plan) if item.key not in present]
    for item in missing:
        logger.info("fetching %s %s", item.kind, item.name)
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
    return missing


def copies(plan: Plan, store: Store) -> dict[HubItem, Path]:
    """Of what the plan reads from the hub, what the store has, each in a local folder."""
    present = _present(store)
    if not present:
        return {}  # and lm-eval, which takes seconds, is not asked what its tasks read
    return {item: store.fetch(item.key) for item in hub_items(plan) if item.key in present}


def model_copies(grid: Grid, store: Store) -> dict[HubItem, Path]:
    """Of the grid's models, the copies that the store has."""
    items = [model_item(model) for model in grid.models.values() if isinstance(model, HubModel)]
    present = _present(store) if items else set()
    return {item: store.fetch(item.key) for item in items if item.key in present}


def _present(store: Store) -> set[str]:
    keys = store.keys()
    return {key for key in keys if key.startswith(HUB)}


def with_copies(plan: Plan, store: Store) -> tuple[Graph, dict[str, str]]:
    """The plan's graph, in which stages read the copies that the store has, and the environment for
    its workers: the hub is switched off where there is a copy of everything."""
    present = _present(store)
    if not present:
        return plan.graph, {}
    graph = {}
    for key, stage in plan.graph.items():
        read = [item.key for item in items(plan.specs[key]) if item.key in present]
        inputs = tuple(dict.fromkeys([*stage.inputs, *read]))
        graph[key] = dataclasses.replace(stage, inputs=inputs)
    whole = {item.key for item in hub_items(plan)} <= present
    return graph, OFFLINE if whole else {}
