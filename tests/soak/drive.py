"""A driver in a process of its own: runs the stand-in grid and prints what was repeated."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

import ray

from cluster.leases import Observer, sweep
from cluster.run import run_graph
from cluster.session import set_keepalive
from cluster.store import Store
from tests.soak import stand_in


def main() -> None:
    """Run the grid; exit code 1 if stages failed, which the same command tries again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--log", required=True, type=Path)
    parser.add_argument("--seconds", required=True, type=float)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    set_keepalive()
    ray.init(asked.address, log_to_driver=False, logging_level=logging.ERROR)
    store = Store(asked.store)
    sweep(store, Observer(store))
    store.sweep()
    grid = stand_in.grid(asked.log, asked.seconds)
    outcome = run_graph(grid, list(grid), stand_in.execute, store, {})
    print(json.dumps({"repeated": outcome.repeated, "failed": sorted(outcome.failed)}))
    sys.stdout.flush()
    os._exit(1 if outcome.failed else 0)  # otherwise what is left of Ray in the process may hang


if __name__ == "__main__":
    main()
