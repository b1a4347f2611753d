"""Run a grid: make the stages that its cells need and the store lacks."""

import logging
from importlib import metadata

import cluster
import jobs
import pipeline
from cluster import leases
from cluster.board import Board
from cluster.graph import needed
from cluster.run import Outcome, run_graph
from cluster.session import alive_nodes, check_resources, nodes_may_grow, session
from cluster.store import Store
from cluster.worker import Aids
from jobs.check import check_room
from jobs.fetch import with_copies
from jobs.plan import Plan
from jobs.progress import progress_of, recall
from jobs.stages import execute, help_make, prepared
from jobs.watch import Watch

logger = logging.getLogger(__name__)

_RECORDED = ("calprune", "torch", "transformers", "ray", "lm-eval", "datasets", "numpy", "pyarrow")
"""Packages whose versions every artifact records."""


def run_grid(plan: Plan, store: Store, address: str | None, workers: int | None) -> Outcome:
    """Make every cell's last stage and its inputs; continue where an earlier run stopped.

    Damaged artifacts are reported first and made again.
    """
    leases.sweep(store, leases.Observer(store))
    store.sweep()
    present = store.keys() & plan.graph.keys()
    logger.info("checking %d artifacts of the store", len(present))
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
    for name, chosen in plan.grid.auto_dtypes.items():
        logger.info("models.%s: %s", name, chosen)
    if not missing:
        return Outcome()
    versions = {name: metadata.version(name) for name in _RECORDED}
    graph, variables = with_copies(plan, store)
    progress = progress_of(plan, missing)
    recall(progress, plan, store, sorted(present - remade))
    logger.info("joining the cluster at %s", address) if address else logger.info("starting Ray")
    with session(address, (pipeline, cluster, jobs), variables):
        logger.info("Ray runs; starting workers")
        board = Board()
        with Watch(progress, plan.grid.name, board, workers) as watch:
            check_resources({plan.graph[key].kind: plan.graph[key].resources for key in missing})
            nodes = alive_nodes()
            check_room(plan, missing, nodes, nodes_may_grow(nodes))
            return run_graph(
                graph,
                targets,
                execute,
                store,
                versions,
                aids=Aids(prepared, help_make),
                workers=workers,
                watcher=watch,
            )
