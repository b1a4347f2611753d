"""A small grid whose stages only take time. Each writes a digest of its inputs, so the last ones
show whether all stages before them were right."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.graph import Graph, Resources, Stage
from cluster.helpers import Helpers
from cluster.store import Partial, Store

SHARDS = 4
CELLS = 5


@dataclass(frozen=True)
class AtWork:
    """One execution of a stage, logged when it began."""

    key: str
    process: int
    raylet: int


def grid(log: Path, seconds: float) -> Graph:
    """Return a grid with a pretrained model, shards of its samples, and cells that prune and
    evaluate it."""

    def stage(key: str, *inputs: str, pool: str | None = None) -> Stage:
        payload = json.dumps({"key": key, "log": str(log), "seconds": seconds})
        kind = key.split("-")[0]
        asked = Resources(max_replicas=2, retries=3)
        return Stage(
            key=key, kind=kind, label=key, spec={}, payload=payload, inputs=inputs, pool=pool,
            resources=asked,
        )  # fmt: skip

    shards = [f"generate-{number}" for number in range(SHARDS)]
    stages = [stage("pretrain")]
    stages += [stage(key, "pretrain", pool="generate") for key in shards]
    stages += [stage("windows", *shards)]
    for number in range(CELLS):
        stages.append(stage(f"prune-{number}", "pretrain", "windows", pool="prune"))
        stages.append(stage(f"evaluate-{number}", f"prune-{number}"))
    return {each.key: each for each in stages}


def execute(
    payload: str,
    artifacts: Mapping[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    """Log the beginning, take the time, and write a digest of the key and all inputs."""
    fields = json.loads(payload)
    with Path(fields["log"]).open("a") as log:
        log.write(f"{fields['key']} {os.getpid()} {os.getppid()}\n")
    digest = hashlib.sha256(fields["key"].encode())
    for key in sorted(artifacts):
        digest.update((artifacts[key] / "digest").read_bytes())
    (output / "half").write_text("written before the work is done")
    time.sleep(fields["seconds"])
    (output / "digest").write_text(digest.hexdigest())
    return {}


def expected_table() -> str:
    """Compute the table without a cluster."""
    digests: dict[str, str] = {}
    for key, stage in grid(Path("log"), 0.0).items():
        text = key + "".join(digests[name] for name in sorted(stage.inputs))
        digests[key] = hashlib.sha256(text.encode()).hexdigest()
    return "".join(f"{key},{digests[key]}\n" for key in digests if key.startswith("evaluate"))


def executions(log: Path) -> list[AtWork]:
    """Return all executions in the order in which they began."""
    lines = log.read_text().splitlines() if log.exists() else []
    words = [line.split() for line in lines]
    return [AtWork(key, int(process), int(raylet)) for key, process, raylet in words]


def table(store: Store) -> str:
    """Return the grid's table: a line a cell."""
    keys = [f"evaluate-{number}" for number in range(CELLS)]
    return "".join(f"{key},{(store.fetch(key) / 'digest').read_text()}\n" for key in keys)
