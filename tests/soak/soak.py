"""Random kills over repeated runs of a small grid: `python -m tests.soak.soak --kills 200`.

Each run has a new store. While its driver is at work, workers, actors, nodes and the driver itself
are killed at random moments. A driver that ended before its grid is started again, as a user would.
Every run must end with the table of the undisturbed one.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from cluster.store import Store
from tests.soak import stand_in
from tests.soak.nodes import Job, Nodes, harm, nodes

KINDS = ("worker", "actor", "node", "driver")
KILLS_A_RUN = 8
STAGE_SECONDS = 0.3


def soak(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run grids until so many kills are done, and return the figures."""
    draw = random.Random(seed)
    killed: Counter[str] = Counter()
    runs = equal = drivers = began = 0
    with nodes(2) as started:
        expected = stand_in.expected_table()
        stages = len(stand_in.grid(folder, STAGE_SECONDS))
        since = time.monotonic()
        while killed.total() < kills:
            job = Job(started.address, folder / f"{runs}", folder / f"{runs}.log", STAGE_SECONDS)
            left = min(KILLS_A_RUN, kills - killed.total())
            drivers += _disturbed(started, job, left, killed, draw)
            runs += 1
            equal += stand_in.table(Store(str(job.store))) == expected
            began += len(stand_in.executions(job.log))
            print(f"run {runs}: {killed.total()} kills, {equal} tables equal", flush=True)
    return {
        "seed": seed,
        "kills": dict(sorted(killed.items())),
        "runs": runs,
        "drivers": drivers,
        "stages": runs * stages,
        "stages_repeated": began - runs * stages,
        "tables_equal": equal,
        "seconds": round(time.monotonic() - since),
    }


def _disturbed(
    started: Nodes, job: Job, kills: int, killed: Counter[str], draw: random.Random
) -> int:
    """Run one grid to its end; return how many drivers that took."""
    driver, drivers = job.start(), 1
    while True:
        if driver.poll() == 0:
            driver.communicate()
            return drivers
        if driver.poll() is not None:
            driver.communicate()
            driver, drivers = job.start(), drivers + 1
        if kills:
            kind = draw.choice(KINDS)
            time.sleep(draw.uniform(0.2, 2.0))
            # Before the first stage there is nothing to lose.
            if stand_in.executions(job.log) and driver.poll() is None:
                done = harm(started, driver, kind, draw)
                killed[kind] += done
                kills -= done
        else:
            time.sleep(0.1)


def main() -> None:
    """Print the figures; exit code 1 if a table differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(asked.kills, asked.seed, Path(folder))
    print(json.dumps(figures, indent=1))
    raise SystemExit(0 if figures["tables_equal"] == figures["runs"] else 1)


if __name__ == "__main__":
    main()
