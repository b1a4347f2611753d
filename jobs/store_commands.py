"""`python -m jobs store ls|verify|du|gc`: list, check and tidy a store."""

import logging
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from cluster import garbage
from cluster.store import CorruptArtifactError, Manifest, Store
from jobs.console import console
from jobs.fetch import copied_items
from jobs.grid import load_grid
from jobs.grid_files import grid_file
from jobs.plan import make_plan
from jobs.stages import LINES
from jobs.stores import StoreUrl, open_store

logger = logging.getLogger(__name__)

store_app = typer.Typer(no_args_is_help=True, help="Look at a store and tidy it.")


@store_app.command(name="ls")
def list_artifacts(store: StoreUrl = ".calprune") -> None:
    """List all artifacts: key, size, when it was made and where."""
    table = Table()
    for heading in ("key", "size", "seconds", "made", "host"):
        table.add_column(heading, overflow="fold")
    for manifest in _manifests(open_store(store)):
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.finished))
        size, seconds = decimal(manifest.bytes), f"{manifest.seconds:,.1f}"
        table.add_row(manifest.key, size, seconds, made, manifest.host)
    console.print(table)


@store_app.command()
def verify(store: StoreUrl = ".calprune") -> None:
    """Compare the checksum of every file of every artifact; exit with 1 if one differs."""
    kept = open_store(store)
    keys = kept.keys()
    damaged = kept.damaged(keys, whole=True)
    for key, problem in damaged.items():
        console.print(f"{key}: {problem}", markup=False, soft_wrap=True)
    console.print(
        f"{len(keys)} artifacts, {len(damaged)} damaged; "
        "a run makes these again, and `fetch` copies from the hub"
    )
    if damaged:
        raise typer.Exit(1)


@store_app.command()
def du(store: StoreUrl = ".calprune") -> None:
    """Print how much each kind of stage holds."""
    kept = open_store(store)
    artifacts: dict[str, list[Manifest]] = defaultdict(list)
    for manifest in _manifests(kept):
        artifacts[manifest.kind].append(manifest)
    table = Table(show_footer=True)
    everything = [manifest for manifests in artifacts.values() for manifest in manifests]
    table.add_column("stage", footer="all")
    table.add_column("artifacts", footer=str(len(everything)), justify="right")
    total = decimal(sum(manifest.bytes for manifest in everything))
    table.add_column("size", footer=total, justify="right")
    known = [kind for kind in LINES if kind in artifacts]
    for kind in [*known, *sorted(artifacts.keys() - known)]:  # copies from the hub come last
        manifests = artifacts[kind]
        size = decimal(sum(manifest.bytes for manifest in manifests))
        table.add_row(kind, str(len(manifests)), size)
    console.print(table)
    unfinished = sum(kept.fs.size(path) for path in kept.kept())
    console.print(f"kept of stages that are not done: {decimal(unfinished)}")


@store_app.command()
def gc(
    grids: Annotated[
        list[Path],
        typer.Argument(
            parser=grid_file,
            help="Grids whose artifacts stay: files or names.",
            show_default=False,
        ),
    ],
    store: StoreUrl = ".calprune",
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove it; by default, only list it.")
    ] = False,
) -> None:
    """Remove what no given grid reaches and no present run uses.

    Results tables stay, and so do copies from the hub that the given grids read.
    """
    kept = open_store(store)
    plans = [make_plan(load_grid(path)) for path in grids]
    reached = {key for plan in plans for key in plan.graph}
    reached |= {item.key for plan in plans for item in copied_items(plan, kept)}
    found = garbage.find(kept, reached)
    for key in found.artifacts:
        console.print(key, soft_wrap=True)
    for path in (*found.attempts, *found.kept):
        logger.info("unfinished: %s", path)
    summary = (
        f"{len(found.artifacts)} artifacts, {len(found.attempts) + len(found.kept)} unfinished, "
        f"{len(found.failures)} failures: {decimal(found.bytes)}"
    )
    if delete:
        garbage.collect(kept, found)
    console.print(f"{summary} {'removed' if delete else 'to remove; --delete removes them'}")


def _manifests(store: Store) -> list[Manifest]:
    """Return the manifests of all artifacts by key; log those that cannot be read."""
    found = []
    for key in sorted(store.keys()):
        try:
            manifest = store.manifest(key)
        except CorruptArtifactError as error:
            logger.warning("%s", error)
            continue
        if manifest is not None:
            found.append(manifest)
    return found
