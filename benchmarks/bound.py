"""How much calibration data can do: `python -m benchmarks.bound GRID --store STORE`.

Of all windows of a grid's calibration sets, a search looks for those with which Wanda changes a
model least on a probe: it exchanges some windows for others, and keeps what lowers the divergence
from the dense model. No selector on this pool can be worse than the best, so what is found is a
bound from below on what data can do here. The grid's own sets, and random sets of the pool, are
placed between the worst set and what was found, on the probe and on as much other text. The grid
must have run.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from benchmarks.record import write_json
from cluster.store import Store
from jobs.cells import Cell, expand, prune_spec
from jobs.grid import Grid, load_grid
from pipeline.data.windows import Cutting, cut_corpus, read_windows
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.prune import prune_model
from pipeline.specs import Wanda, WindowsSpec, nearest_stages

RANDOM_SETS = 10
"""Sets of the pool that stand for no choice."""

EXCHANGED = 0.1
"""Share of a set that an exchange replaces at first; it falls to one window."""

logger = logging.getLogger("benchmarks")


class Placed(NamedTuple):
    """One model's divergences from the dense model, in nats a token, on the probe and elsewhere."""

    model: str
    sets: dict[str, tuple[float, float]]
    """By calibration; `random` is a mean over sets, `found` what the search came to."""


def exchange(
    cost: Callable[[np.ndarray[Any, Any]], float],
    start: np.ndarray[Any, Any],
    pool: int,
    steps: int,
    seed: int = 0,
) -> np.ndarray[Any, Any]:
    """Return the cheapest set that exchanges lead to.

    Args:
        cost: of a set, the indices of its members in the pool.
        start: the first set.
        pool: its size.
        steps: how many exchanges are tried.
    """
    draws = np.random.default_rng(seed)
    best, least = start, cost(start)
    for step in range(steps):
        share = EXCHANGED * (1 - step / steps)
        count = max(1, round(share * len(start)))
        outside = np.setdiff1d(np.arange(pool), best)
        changed = best.copy()
        places = draws.choice(len(best), size=count, replace=False)
        changed[places] = draws.choice(outside, size=count, replace=False)
        tried = cost(changed)
        if tried < least:
            best, least = changed, tried
    return best


def share_of_gain(sets: dict[str, tuple[float, float]], name: str, on: int) -> float:
    """Return how much of the way from the worst set to what was found a set goes, from 0 to 1.

    Args:
        on: 0 for the probe, 1 for other text.
    """
    worst = max(reached[on] for reached in sets.values())
    return (worst - sets[name][on]) / (worst - sets["found"][on])


@torch.no_grad()
def divergence(dense: list[Tensor], model: Any, windows: Tensor) -> float:
    """Return the mean over tokens of KL(dense || model), in nats.

    Args:
        dense: log probabilities `[windows, tokens, entries]` of batches.
        windows: token ids of all of them.
    """
    size, total, tokens = len(dense[0]), 0.0, 0
    for batch, wanted in zip(torch.split(windows, size), dense, strict=True):
        own = functional.log_softmax(model(batch).logits.float(), dim=-1)
        total += float(functional.kl_div(own, wanted, log_target=True, reduction="sum"))
        tokens += batch.numel()
    return total / tokens


def measure(grid: Grid, name: str, store: Store, steps: int, probe_windows: int) -> Placed:
    """Search for one model, and place the grid's sets.

    Raises:
        KeyError: if the store lacks the model or a set.
    """
    cells = _cells(grid, name)
    by_set = _sets(grid, cells, store)
    spec = grid.models[name]
    artifacts = {stage.key: store.fetch(stage.key) for stage in nearest_stages((spec,))}
    model, tokenizer = load_model(spec, artifacts), load_tokenizer(spec, artifacts)
    entry = grid.evaluate.all_perplexities()[0]
    cut = Cutting(2 * probe_windows, entry.seqlen, "concat", seed=0)
    text = cut_corpus(grid.corpora[entry.corpus], tokenizer, cut)
    windows = torch.tensor(np.stack([window.ids for window in text.windows]))
    halves = windows[::2], windows[1::2]
    with torch.no_grad():
        dense = [
            [
                functional.log_softmax(model(batch).logits.float(), dim=-1)
                for batch in torch.split(half, 8)
            ]
            for half in halves
        ]
    pool = torch.cat(list(by_set.values()))
    size = len(next(iter(by_set.values())))
    target = ModelTarget(LayerTarget.parse(cells[0].sparsity, cells[0].pattern))

    def pruned(chosen: Tensor) -> Any:
        copied = copy.deepcopy(model)
        prune_model(copied, chosen, Wanda(), target)
        return copied

    def on_probe(indices: np.ndarray[Any, Any]) -> float:
        return divergence(dense[0], pruned(pool[np.sort(indices)]), halves[0])

    def on_both(chosen: Tensor) -> tuple[float, float]:
        made = pruned(chosen)
        return divergence(dense[0], made, halves[0]), divergence(dense[1], made, halves[1])

    placed = {each: on_both(chosen) for each, chosen in by_set.items()}
    draws = np.random.default_rng(0)
    random = [draws.choice(len(pool), size=size, replace=False) for _ in range(RANDOM_SETS)]
    reached = np.mean([on_both(pool[indices]) for indices in random], axis=0)
    placed["random"] = float(reached[0]), float(reached[1])
    best = min(by_set, key=lambda each: placed[each][0])
    start = size * list(by_set).index(best) + np.arange(size)
    found = exchange(on_probe, start, len(pool), steps)
    placed["found"] = on_both(pool[np.sort(found)])
    return Placed(name, placed)


def _cells(grid: Grid, name: str) -> list[Cell]:
    """Return a model's cells that Wanda prunes with the first of its seeds, one for each set."""
    own = [
        cell
        for cell in expand(grid)
        if cell.model == name and cell.pruner == Wanda() and cell.reconstruction is None
    ]
    if not own:
        raise typer.BadParameter(f"GRID: {grid.name!r} has no cells that wanda prunes")
    first: dict[str, Cell] = {}
    for cell in own:
        first.setdefault(cell.calibration, cell)
    return list(first.values())


def _sets(grid: Grid, cells: Sequence[Cell], store: Store) -> dict[str, Tensor]:
    found = {}
    for cell in cells:
        spec = prune_spec(grid, cell)
        assert spec is not None
        assert isinstance(spec.calibration, WindowsSpec)
        found[cell.calibration] = read_windows(store.fetch(spec.calibration.key))
    return found


def table_of(models: list[Placed]) -> Table:
    """Return each set's divergence and its share of the gain, with the range over models."""
    table = Table(title=f"{len(models)} models: divergence, and share of the gain (range)")
    for heading in ("set", "on the probe", "share", "on other text", "share"):
        table.add_column(heading)
    for name in models[0].sets:
        cells = [name]
        for on in (0, 1):
            values = [each.sets[name][on] for each in models]
            shares = [share_of_gain(each.sets, name, on) for each in models]
            cells.append(f"{np.mean(values):.4f}")
            cells.append(f"{np.mean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")
        table.add_row(*cells)
    return table


def main(
    grid: Annotated[Path, typer.Argument(help="A grid that has run.")],
    store: Annotated[str, typer.Option(help="Where it ran.")] = ".calprune",
    models: Annotated[int, typer.Option(min=1, help="The first ones of the grid.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Exchanges that are tried.")] = 300,
    probe_windows: Annotated[int, typer.Option(min=1, help="Windows of each half.")] = 32,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Print how much of the possible gain each of a grid's sets takes."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    loaded = load_grid(grid)
    found = []
    for name in list(loaded.models)[:models]:
        logger.info(name)
        found.append(measure(loaded, name, Store(store), steps, probe_windows))
    Console(width=100).print(table_of(found))
    write_json(output, found)


if __name__ == "__main__":
    typer.run(main)
