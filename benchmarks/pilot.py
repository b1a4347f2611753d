"""How often pilot pruning chooses right: `python -m benchmarks.pilot GRID --store FOLDER`.

For every model of a grid and every text that it measures, pilot pruning chooses among the grid's
calibrations on one half of the text. The truth is the divergence from the dense model on the other
half, after full prunings with other draws of every calibration set. Pilot pruning is compared with
a choice at random, by Min-K%++, and by full prunings on the probe; and its cost with theirs.
"""

import itertools
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks.record import write_json
from cluster.run import Outcome, run_graph
from cluster.session import session
from cluster.store import Store
from cluster.worker import Aids
from jobs import pilot
from jobs.cells import Cell
from jobs.grid import Grid, load_grid
from jobs.plan import Plan
from jobs.recommend import read_candidates, scores_only, scoring_plan
from jobs.stages import execute, help_make, prepared
from pipeline.data.corpora import read_documents
from pipeline.data.presets import CORPUS_PRESETS
from pipeline.specs import FileCorpus

_OTHER_SEEDS = 1000
"""Added to the seeds of the calibration sets that the truth rests on."""

_HALF_BYTES = 2**16
"""Bytes of each half of a text: enough for all windows of a probe, at 8 bytes a token."""

Losses = Mapping[str, float]
"""By candidate, its divergence on the second half over the best candidate's, less 1."""


class Choice(NamedTuple):
    """What a way of choosing took for one model and text."""

    way: str
    model: str
    text: str
    loss: float
    """Divergence over that of the best candidate, less 1."""
    right: float
    """1 if it took the best candidate; of a random choice, the probability."""


def halves(grid: Grid, text: str, folder: Path) -> tuple[FileCorpus, FileCorpus]:
    """Write every other document of a text to each of two files."""
    corpus = {**CORPUS_PRESETS, **grid.corpora}[text]
    written = [0, 0]
    paths = [folder / f"{text}-{half}.jsonl" for half in ("probe", "truth")]
    with paths[0].open("w") as first, paths[1].open("w") as second:
        for number, document in enumerate(read_documents(corpus)):
            half = number % 2
            (first, second)[half].write(json.dumps({"text": document.text}) + "\n")
            written[half] += len(document.text.encode())
            if min(written) > _HALF_BYTES:
                break
    probe, truth = (pilot.probe_corpus(str(path)) for path in paths)
    return probe, truth


def full_losses(
    grid: Grid,
    corpus: FileCorpus,
    tried: Mapping[str, Mapping[str, Sequence[Cell]]],
    store: Store,
    run: Callable[[Plan], Outcome],
) -> tuple[dict[str, Losses], Plan]:
    """Prune fully with every candidate; return each model's losses on a text, and the plan."""
    whole = pilot.Round(1.0, 1.0)
    cells = [cell for names in tried.values() for own in names.values() for cell in own]
    plan = pilot.round_plan(grid, corpus, cells, whole)
    failed = run(plan).failed
    assert not failed, failed
    found: dict[str, Losses] = {}
    for model, names in tried.items():
        measured = {
            name: pilot.divergences(store, pilot.keys_of(plan, own, whole))
            for name, own in names.items()
        }
        compared = pilot.compare(measured)
        relative = {each.name: each.against_best for each in compared}
        best = 1 - sum(relative.values()) / len(relative)  # on a scale whose mean is 1
        found[model] = {name: difference / best for name, difference in relative.items()}
    return found, plan


def choices(losses: Losses, taken: Mapping[str, str], model: str, text: str) -> list[Choice]:
    """Return what each way lost by what it took, and what a random choice loses on average."""
    best = min(losses, key=lambda name: losses[name])
    rows = [
        Choice(way, model, text, losses[name], float(name == best)) for way, name in taken.items()
    ]
    mean = sum(losses.values()) / len(losses)
    return [*rows, Choice("at random", model, text, mean, 1 / len(losses))]


def seconds(plans: Sequence[Plan], store: Store) -> float:
    """Return the seconds of all prunings and evaluations of some plans, each once."""
    specs = {key: spec for plan in plans for key, spec in plan.specs.items()}
    made = (
        store.manifest(key)
        for key, spec in specs.items()
        if spec.kind in ("prune", "outliers", "evaluate")
    )
    return sum(manifest.seconds for manifest in made if manifest is not None)


def mean_and_interval(
    rows: Sequence[Choice],
    value: Callable[[Choice], float],
    possible: tuple[float, float] = (-math.inf, math.inf),
) -> str:
    """Return a mean in percent with Student's interval: over models, each a mean over its texts, or
    over the texts of one model.

    Args:
        possible: the lowest and the highest mean that there can be.
    """
    by_model: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_model[row.model].append(100 * value(row))
    several = len(by_model) > 1
    means = np.array(
        [np.mean(values) for values in by_model.values()]
        if several
        else next(iter(by_model.values()))
    )
    half = stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))
    over = "models" if several else "texts of one model"
    low, high = np.clip([means.mean() - half, means.mean() + half], *possible)
    return f"{means.mean():.1f} ({low:.1f} to {high:.1f}, over {len(means)} {over})"


def _other_draw(cell: Cell) -> Cell:
    return cell.model_copy(update={"seed": (cell.seed or 0) + _OTHER_SEEDS})


def main(
    grid_file: Annotated[Path, typer.Argument(help="Grid with candidates and texts.")],
    store_url: Annotated[str, typer.Option("--store", help="Where artifacts go.")],
    texts: Annotated[list[str] | None, typer.Option(help="Only these texts.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file of what was measured.")] = None,
) -> None:
    """Compare ways of choosing calibration data."""
    logging.basicConfig(level=logging.INFO)
    grid, store = load_grid(grid_file), Store(store_url)
    tried = pilot.candidates(grid)
    other = {
        model: {name: [_other_draw(cell) for cell in own] for name, own in names.items()}
        for model, names in tried.items()
    }
    rows: list[Choice] = []
    spent: dict[str, float] = defaultdict(float)
    folder = Path(store_url, "probes")
    folder.mkdir(parents=True, exist_ok=True)
    with session(None):

        def run(plan: Plan) -> Outcome:
            aids = Aids(prepared, help_make)
            return run_graph(plan.graph, plan.targets, execute, store, {}, aids=aids)

        described = scoring_plan(grid)
        assert not run(scores_only(described)).failed
        scores = read_candidates(described, store)
        for entry in grid.evaluate.all_perplexities():
            if texts and entry.corpus not in texts:
                continue
            probe, truth = halves(grid, entry.corpus, folder)
            plans: list[Plan] = []

            def run_and_keep(plan: Plan, plans: list[Plan] = plans) -> Outcome:
                plans.append(plan)
                return run(plan)

            found = {each.model: each for each in pilot.run_pilot(grid, probe, store, run_and_keep)}
            by_full, full_plan = full_losses(grid, probe, tried, store, run)
            true, _ = full_losses(grid, truth, other, store, run)
            spent["pilot"] += seconds(plans, store)
            spent["full prunings"] += seconds([full_plan], store)
            for model, losses in true.items():
                own = [each for each in scores if each.model == model]
                taken = {
                    "pilot pruning": found[model].best.name,
                    "full prunings": min(by_full[model], key=lambda name: by_full[model][name]),
                    "Min-K%++": max(own, key=lambda each: each.scores["min_k_plus_plus"]).name,
                }
                rows += choices(losses, taken, model, entry.corpus)
    table = Table(
        "way of choosing", "loss against the best (%)", "more than pilot's", "took the best (%)"
    )
    by_pilot = {(row.model, row.text): row.loss for row in rows if row.way == "pilot pruning"}
    for way, group in itertools.groupby(sorted(rows, key=lambda row: row.way), lambda row: row.way):
        own_rows = list(group)
        table.add_row(
            way,
            mean_and_interval(own_rows, lambda row: row.loss, (0, math.inf)),
            mean_and_interval(own_rows, lambda row: row.loss - by_pilot[row.model, row.text]),
            mean_and_interval(own_rows, lambda row: row.right, (0, 100)),
        )
    console = Console(width=140)
    console.print(table)
    console.print(
        f"{len(tried)} models, {len(next(iter(tried.values())))} candidates; prunings and "
        f"evaluations: pilot {spent['pilot']:.0f} s, full {spent['full prunings']:.0f} s"
    )
    write_json(output, {"choices": [row._asdict() for row in rows], "seconds": dict(spent)})


if __name__ == "__main__":
    typer.run(main)
