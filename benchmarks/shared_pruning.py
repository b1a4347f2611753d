"""Measure what a second actor brings to one pruning: `python -m benchmarks.shared_pruning`.

The model of `python -m jobs prepare` is pruned on Ray as in any run, by one actor and by two with
one thread each, in turns. The seconds are those of the stage: with the start of the second actor's
process, its libraries and its model. The masks or weights must be equal to the byte.
"""

import itertools
import os
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.record import machine, write_json
from cluster.run import run_graph
from cluster.session import session
from cluster.store import Manifest, Store
from cluster.worker import Aids
from jobs.grid import load_grid
from jobs.plan import Plan, make_plan
from jobs.stages import execute, help_make, prepared
from pipeline.real.prepare import REAL_FOLDER

PRUNERS = ("wanda", "sparsegpt")


def plan_of(folder: Path, nsamples: int, seqlen: int, actors: int) -> Plan:
    """Plan one pruning by each pruner, shared by so many actors."""
    real = Path(REAL_FOLDER).resolve()
    content = {
        "name": "shared",
        "models": {"real": {"kind": "local-model", "path": str(real / "model")}},
        "corpora": {
            "wikipedia": {
                "kind": "file-corpus",
                "path": str(real / "text" / "wikipedia-train.jsonl"),
            }
        },
        "calibrations": {"wikipedia": {"corpus": "wikipedia"}},
        "cells": {
            "model": "real",
            "calibration": "wikipedia",
            "pruner": list(PRUNERS),
            "sparsity": 0.5,
            "nsamples": nsamples,
            "seqlen": seqlen,
        },
        "evaluate": {"perplexity": [{"corpus": "wikipedia", "seqlen": 64, "max_windows": 1}]},
        "window_groups": 8,
        "resources": {"prune": {"actors": actors, "replicas": 1}},
    }
    path = folder / "shared.yaml"
    path.write_text(yaml.safe_dump(content))
    return make_plan(load_grid(path))


def pruned(plan: Plan, store: Store) -> dict[str, Manifest]:
    """Prune, and return the manifests by pruner."""
    keys = {
        plan.graph[key].spec["pruner"]["name"]: key
        for key, spec in plan.specs.items()
        if spec.kind == "prune"
    }
    aids = Aids(prepared, help_make)
    outcome = run_graph(plan.graph, list(keys.values()), execute, store, {}, aids=aids)
    assert not outcome.failed, outcome.failed
    found = {}
    for pruner, key in keys.items():
        manifest = store.manifest(key)
        assert manifest is not None
        found[pruner] = manifest
    return found


def main(
    nsamples: Annotated[int, typer.Option(min=8)] = 128,
    seqlen: Annotated[int, typer.Option(min=8)] = 512,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Compare the seconds of one actor and two."""
    os.environ["OMP_NUM_THREADS"] = "1"
    seconds = {(pruner, actors): float("inf") for pruner in PRUNERS for actors in (1, 2)}
    with tempfile.TemporaryDirectory() as name, session(None):
        folder, files = Path(name), dict[str, object]()
        for number, actors in itertools.product(range(rounds), (1, 2)):
            store = Store(str(folder / f"{number}-{actors}"))
            made = pruned(plan_of(folder, nsamples, seqlen, actors), store)
            for pruner, manifest in made.items():
                assert files.setdefault(pruner, manifest.files) == manifest.files, pruner
                seconds[pruner, actors] = min(seconds[pruner, actors], manifest.seconds)
    table = Table("pruner", "one actor (s)", "two (s)", "ratio")
    ratios = {pruner: seconds[pruner, 1] / seconds[pruner, 2] for pruner in PRUNERS}
    for pruner, ratio in ratios.items():
        one, two = seconds[pruner, 1], seconds[pruner, 2]
        table.add_row(pruner, f"{one:,.1f}", f"{two:,.1f}", f"{ratio:.2f}")
    Console(width=100).print(f"{nsamples} windows of {seqlen} tokens, bfloat16", table)
    measured = {f"{pruner} {actors}": each for (pruner, actors), each in seconds.items()}
    about = machine(torch.device("cpu"), torch.bfloat16)
    write_json(output, {**about, "cpus": os.cpu_count(), "seconds": measured, "ratios": ratios})


if __name__ == "__main__":
    typer.run(main)
