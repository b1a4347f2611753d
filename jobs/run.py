"""Run a grid: make what its cells need and the store does not hold, then gather."""

import logging
import sys
import time
from importlib import metadata
from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import cluster
import jobs
import pipeline
from cluster import leases
from cluster.graph import Stage, needed
from cluster.run import Progress as Outcome
from cluster.run import run
from cluster.session import check_resources, session
from cluster.store import Failure, Manifest, Store
from jobs.fetch import with_copies
from jobs.plan import Plan
from jobs.stages import execute

logger = logging.getLogger(__name__)

RECORDED = ("calprune", "torch", "transformers", "ray", "lm-eval", "datasets", "numpy", "pyarrow")
"""Packages whose versions go with every artifact."""


def run_grid(plan: Plan, store: Store, address: str | None, workers: int | None) -> Outcome:
    """Make every cell's last stage and what it needs; go on where an earlier run stopped.

    Damaged artifacts are found first, reported, and made again.
    """
    leases.sweep(store, leases.Observer(store))
    store.sweep()
    present = store.keys() & plan.graph.keys()
    for key, problem in store.damaged(present).items():
        logger.warning("artifact %s is damaged: %s; it is made again", key, problem)
        store.discard(key)
    remade = present - store.keys()
    targets = list(dict.fromkeys([*plan.targets, *sorted(remade)]))
    missing = needed(plan.graph, targets, store.keys())
    logger.info(
        "%s: %d cells, %d stages, %d to make",
        plan.grid.name,
        len(plan.cells),
        len(plan.graph),
        len(missing),
    )
    if not missing:
        return Outcome()
    versions = {name: metadata.version(name) for name in RECORDED}
    graph, variables = with_copies(plan, store)
    with session(address, (pipeline, cluster, jobs), variables), Watch(len(missing)) as watch:
        check_resources({plan.graph[key].kind: plan.graph[key].resources for key in missing})
        return run(
            graph,
            targets,
            execute,
            store,
            versions,
            workers=workers,
            observe=watch.ended,
        )


class Watch:
    """Tells of every stage that ends: a line in the log, and in a terminal a bar as well."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.count = 0
        self.started = time.monotonic()
        self.samples = self.tokens = 0
        self.generating_since = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, disable=not sys.stderr.isatty())
        self.task = self.bar.add_task("stages", total=total)

    def __enter__(self) -> "Watch":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def ended(self, stage: Stage, result: Manifest | Failure) -> None:
        """Report one stage."""
        self.count += 1
        self.bar.update(self.task, advance=1, description=stage.label)
        place = f"[{self.count}/{max(self.total, self.count)}]"
        passed = time.monotonic() - self.started
        if isinstance(result, Failure):
            logger.error("%s %s failed: %s (%s)", place, stage.label, result.error, stage.key)
        else:
            far = self._generated(result, passed) if stage.kind == "generate" and stage.pool else ""
            logger.info(
                "%s %s: %.1f s (at %.0f s%s)", place, stage.label, result.seconds, passed, far
            )

    def _generated(self, shard: Manifest, passed: float) -> str:
        """How far generation has come, and how fast, since the first of its shards began."""
        if not self.samples:
            self.generating_since = passed - shard.seconds
        self.samples += shard.report["samples"]
        self.tokens += shard.report["tokens_generated"]
        rate = self.tokens / max(passed - self.generating_since, 1e-9)
        return f"; {self.samples:,} samples, {rate:,.0f} tokens/s"
