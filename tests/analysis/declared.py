"""Simulated grids with a declared design: tables, per-window losses and the design's document."""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.labels import with_labels
from analysis.load import COLUMNS

ARMS = ("self", "random", "filtered")


class Noise(NamedTuple):
    """Standard deviations of an arm's log perplexity."""

    model: float = 0.02
    """Of the effect between models."""
    draw: float = 0.005
    window: float = 0.1
    """Of the effect between windows, which all models share."""
    rest: float = 0.05


class Simulated(NamedTuple):
    """A grid's results."""

    table: pd.DataFrame
    requests: pd.DataFrame


def simulated(
    effects: dict[str, float],
    noise: Noise,
    seed: int = 0,
    models: int = 8,
    draws: int = 2,
    windows: int = 32,
    level: float = 1.5,
) -> Simulated:
    """Return a grid of arms with planted effects on the log perplexity, and its dense models.

    Each model has draws of its own. Cells are named `arm/model/seed`.
    """
    chance = np.random.default_rng(seed)
    cells: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    by_window = chance.normal(0, 0.5, windows)

    def measure(cell: dict[str, Any], loss: Any) -> None:
        cells.append({**cell, "value": float(np.exp(loss.mean()))})
        losses.extend(
            {"cell": cell["cell"], "task": "heldout", "metric": "loss", "doc_id": at, "value": one}
            for at, one in enumerate(loss)
        )

    shared = {
        "grid": "planted", "status": "ok", "task": "heldout", "metric": "perplexity",
        "sparsity": 0.6, "pattern": "unstructured",
    }  # fmt: skip
    arms = {
        arm: (chance.normal(0, noise.model, models), chance.normal(0, noise.window, windows))
        for arm in effects
    }
    for model in range(models):
        name = f"testbed-{model}"
        dense = {"pruner": "dense", "calibration": "none", "model": name, "cell": f"dense/{name}"}
        measure({**shared, **dense}, by_window + level - 0.3)
        for (arm, effect), draw in itertools.product(effects.items(), range(draws)):
            own = model * draws + draw
            cell = {"calibration": arm, "pruner": "wanda", "model": name, "seed": own}
            drawn = chance.normal(0, noise.draw) + chance.normal(0, noise.rest, windows)
            of_model, of_window = arms[arm]
            loss = by_window + level + effect + of_model[model] + of_window + drawn
            measure({**shared, **cell, "cell": f"{arm}/{name}/{own}"}, loss)
    table = pd.DataFrame(cells, columns=list(COLUMNS)).astype({"seed": "Int64"})
    return Simulated(with_labels(table), pd.DataFrame(losses))


def declared(
    contrasts: dict[str, tuple[str, str]],
    models: int = 8,
    draws: int = 2,
    smallest: float = 1.0,
    **fields: Any,
) -> dict[str, Any]:
    """Return the document of a design that contrasts arms, and chooses among all of them."""
    cells = [
        f"testbed-{model}/{model * draws + draw}"
        for model, draw in itertools.product(range(models), range(draws))
    ]
    common = {"metric": "perplexity", "tasks": ["heldout"]}
    design = {
        "contrasts": [
            {"name": name, **common, "smallest": smallest, "family": "arms"} for name in contrasts
        ],
        "choices": [{"name": "arm", **common}],
        "floor": None,
        **fields,
    }
    return {
        "grid": "planted",
        "history": [{"design": design, "measured": 0, "cells": 3 * len(cells)}],
        "pairs": {
            name: [[f"{first}/{own}", f"{second}/{own}", 0] for own in cells]
            for name, (first, second) in contrasts.items()
        },
        "candidates": {"arm": list(ARMS)},
        "blocks": {
            "arm": [[0, [f"{arm}/{own}" for arm in ARMS]] for own in cells]
        },
    }  # fmt: skip
