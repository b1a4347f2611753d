"""Nodes that join and leave while a real model is pruned and evaluated:
`python -m tests.soak.elastic --changes 20`.

Each pruning is shared by two actors, and the store is an S3 server. Nodes join, leave by plan
(SIGTERM, as a spot notice is) and are lost (killed) at random moments. Every run must end with the
table of the undisturbed one. Needs `python -m jobs prepare`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import yaml

from cluster.store import Store
from pipeline.real.prepare import REAL_FOLDER
from tests.s3 import BUCKET, s3_server
from tests.soak.nodes import PROJECT, Nodes, nodes

MOST_NODES = 3
SECONDS = (10.0, 30.0)
"""The least and the most between two changes."""

KINDS = ("python", "wikipedia")


def grid(folder: Path) -> dict[str, Any]:
    """Return a grid of four prunings of the real model."""

    def corpora(part: str) -> dict[str, Any]:
        return {
            f"{kind}-{part}": {
                "kind": "file-corpus",
                "path": str(folder / "text" / f"{kind}-{part}.jsonl"),
            }
            for kind in KINDS
        }

    return {
        "name": "elastic",
        "models": {"smollm2": {"kind": "local-model", "path": str(folder / "model")}},
        "corpora": corpora("train") | corpora("heldout"),
        "calibrations": {kind: {"corpus": f"{kind}-train"} for kind in KINDS},
        "cells": {
            "model": "smollm2",
            "calibration": list(KINDS),
            "pruner": ["wanda", "sparsegpt"],
            "sparsity": 0.5,
            "nsamples": 16,
            "seqlen": 256,
        },
        "window_groups": 2,
        "evaluate": {
            "perplexity": [
                {"corpus": f"{kind}-heldout", "seqlen": 256, "max_windows": 32} for kind in KINDS
            ]
        },
        "resources": {
            "prune": {"actors": 2, "retries": 50},
            **{stage: {"retries": 50} for stage in ("windows", "evaluate")},
        },
    }


def start(cluster: Nodes, path: Path, store: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a run of the grid."""
    words = ["run", str(path), "--store", store, "--address", cluster.address]
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", *words],
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdout=file,
            stderr=file,
        )


def change(cluster: Nodes, draw: random.Random) -> str:
    """Add or remove a node; return how. One with room stays."""
    kinds = ["join"] * (len(cluster.workers) < MOST_NODES)
    kinds += ["leave", "lose"] * (len(cluster.workers) > 1)
    kind = draw.choice(kinds)
    if kind == "join":
        cluster.join()
    else:
        cluster.remove(draw.choice(cluster.workers), by_plan=kind == "leave")
    return kind


def soak(changes: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run the grid undisturbed, then again until so many nodes have come and gone."""
    draw = random.Random(seed)
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid(PROJECT / REAL_FOLDER)))
    done: Counter[str] = Counter()
    figures: Counter[str] = Counter()
    with s3_server(), nodes(2) as cluster:
        expected, since = b"", time.monotonic()
        for run in range(10**6):
            if run and done.total() >= changes:
                break
            store, log = f"s3://{BUCKET}/elastic-{os.getpid()}-{run}", folder / f"{run}.log"
            driver = start(cluster, path, store, log)
            after = time.monotonic() + draw.uniform(*SECONDS)
            while driver.poll() != 0:
                if driver.poll() is not None:
                    figures["drivers that had to be started again"] += 1
                    driver = start(cluster, path, store, log)
                if run and time.monotonic() > after:
                    done[change(cluster, draw)] += 1
                    after = time.monotonic() + draw.uniform(*SECONDS)
                time.sleep(0.2)
            with fsspec.open(f"{store}/results/elastic.csv") as file:
                table = file.read()
            expected = expected or table
            figures["runs"] += 1
            figures["tables equal"] += table == expected
            figures["stages tried again"] += log.read_text().count("trying again")
            figures["layers that were not pruned again"] += resumed(Store(store))
            print(f"run {run}: {dict(done)} {dict(figures)}", flush=True)
    return {
        "seed": seed,
        "changes": dict(done),
        **figures,
        "seconds": round(time.monotonic() - since),
    }


def resumed(store: Store) -> int:
    """Return the layers that prunings took over from attempts before them."""
    present = store.keys()
    manifests = [store.manifest(key) for key in present]
    return sum(each.report.get("resumed_layers", 0) for each in manifests if each is not None)


def main() -> None:
    """Print the figures; exit code 1 if a table differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(asked.changes, asked.seed, Path(folder))
    print(json.dumps(figures, indent=1))
    raise SystemExit(0 if figures["tables equal"] == figures["runs"] else 1)


if __name__ == "__main__":
    main()
