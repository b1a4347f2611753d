"""Make every stage of grids in this process, and print what came of each.

    python every_stage.py FOLDER DATE GRID...

Prints one JSON object: by key, the SHA-256 of every file and the report.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import time_machine


def main(folder: Path, grids: list[Path]) -> None:
    # Imported on that date: some libraries take the date, or a seed from it, while they are.
    from cluster.graph import needed
    from cluster.store import Partial, Store
    from jobs.check import check_plan
    from jobs.grid import load_grid
    from jobs.plan import make_plan
    from jobs.stages import execute

    found: dict[str, Any] = {}
    for grid in grids:
        plan = make_plan(load_grid(grid))
        check_plan(plan)
        for key in needed(plan.graph, plan.targets, found):
            stage = plan.graph[key]
            output = folder / key
            output.mkdir(parents=True)
            read = {other: folder / other for other in stage.inputs}
            partial = Partial(Store(str(folder / "store")), key)
            report = execute(stage.payload, read, output, 1, partial)
            files = {
                str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(output.rglob("*"))
                if path.is_file()
            }
            found[key] = {"files": files, "report": report}
    print(json.dumps(found))


if __name__ == "__main__":
    out, date, *paths = sys.argv[1:]
    with time_machine.travel(date, tick=True):
        main(Path(out), [Path(path) for path in paths])
