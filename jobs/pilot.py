"""Pilot pruning: choose calibration data by cheap prunings that are compared on a probe text.

Every candidate prunes the model with few windows and few layers. The candidates whose pruned models
diverge most from the dense one are dropped, and the others prune again with more: successive
halving (Jamieson and Talwalkar 2016, AISTATS). The probe is a text of the user's, so candidates are
judged by what the model is for.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from scipy import stats

from cluster.run import Outcome
from cluster.store import Store
from jobs.cells import GENERATED_FIELDS, NO_CALIBRATION, Cell, candidate_names, expand
from jobs.gather import gather
from jobs.grid import Evaluation, Grid
from jobs.outside import with_fingerprints
from jobs.plan import Plan, count_stages, make_plan
from jobs.suites import CorpusPerplexity
from pipeline.errors import InputError
from pipeline.files import files
from pipeline.specs import FileCorpus, FirstLayers

logger = logging.getLogger(__name__)

_Values = npt.NDArray[np.float64]

PROBE = "probe"
"""Name of the probe among the grid's corpora."""

_PROBE_TOKENS = 128
"""Tokens of a window of the probe, unless the grid's windows are shorter."""

PROBE_WINDOWS = 64
"""At most this many windows of the probe."""

LEAST_PROBE_BYTES = 8192
"""About 16 windows: on fewer, hardly any difference would show."""

LEAST_WINDOWS = 4
"""A pilot has at least this many calibration windows."""

_CONFIDENCE = 0.95


class Round(NamedTuple):
    """How much of each pruning is done; the cost goes with the product."""

    layers: float
    """Share of the decoder layers, from the first on."""
    windows: float
    """Share of the calibration windows."""


ROUNDS = (Round(1 / 4, 1 / 16), Round(1 / 2, 1 / 8), Round(1.0, 1 / 4))
"""From the cheapest on. Two candidates take the last round alone, three or four the last two."""


class Standing(NamedTuple):
    """A candidate in one round."""

    name: str
    kl: float
    """Mean KL divergence from the dense model on the probe, in nats a token."""
    against_best: float = 0.0
    """Difference from the round's best candidate, as a share of the round's mean divergence."""
    low: float = 0.0
    high: float = 0.0
    """Its interval. The intervals of a round hold together with probability `_CONFIDENCE`."""

    @property
    def is_worse(self) -> bool:
        """Whether it is shown to be worse than the best."""
        return self.low > 0


@dataclasses.dataclass
class Pilot:
    """The candidates of one model, and what became of them."""

    model: str
    rounds: list[list[Standing]] = dataclasses.field(default_factory=list)
    """Each round's candidates, the best first."""
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Candidates that could not be pruned or measured, and why."""

    @property
    def best(self) -> Standing:
        """The first of the last round."""
        return self.rounds[-1][0]

    @property
    def not_told_apart(self) -> list[str]:
        """Candidates of the last round that are not shown to be worse than the best."""
        return [each.name for each in self.rounds[-1][1:] if not each.is_worse]


def probe_corpus(path: str) -> FileCorpus:
    """Return a probe text as a corpus, with its fingerprint.

    Raises:
        InputError: if there is no such file, or it is too short to compare anything on.
    """
    corpus = with_fingerprints(FileCorpus(path=path), PROBE)
    filesystem, names = files(path, PROBE)
    size = sum(filesystem.size(name) for name in names)
    if size < LEAST_PROBE_BYTES:
        remedy = f"holds {size:,} bytes, and a comparison needs {LEAST_PROBE_BYTES:,}: give more"
        raise InputError(PROBE, path, remedy)
    return corpus


def candidates(grid: Grid) -> dict[str, dict[str, list[Cell]]]:
    """Return the cells to try by model and candidate.

    A candidate is a calibration with its settings; its cells are its seeds under each of the grid's
    pruners and sparsities.

    Raises:
        InputError: if a model has fewer than two candidates, or they have other seeds, pruners or
            sparsities than each other.
    """
    cells = [cell for cell in expand(grid) if cell.seed is not None]
    found: dict[str, dict[str, list[Cell]]] = {}
    for cell, name in candidate_names(cells).items():
        found.setdefault(cell.model, {}).setdefault(name, []).append(cell)
    for model, names in found.items():
        if len(names) < 2:
            remedy = "there is nothing to choose: give several calibrations"
            raise InputError("cells.calibration", f"{model}: {', '.join(names)}", remedy)
        points = {
            name: {(_setting(cell), cell.seed) for cell in own} for name, own in names.items()
        }
        first = next(iter(points))
        for name, own in points.items():
            if own != points[first]:
                remedy = f"has other seeds, pruners or sparsities than {first}: give both the same"
                raise InputError("cells.calibration", f"{model}: {name}", remedy)
    if not found:
        raise InputError("cells.pruner", None, "no pruner of the grid takes calibration data")
    return found


def _setting(cell: Cell) -> Cell:
    """Return what candidates have in common: the model, and how it is pruned."""
    free = dict.fromkeys(("seed", "nsamples", "seqlen", *GENERATED_FIELDS))
    return cell.model_copy(update={"calibration": NO_CALIBRATION, **free})


def rounds_for(count: int) -> tuple[Round, ...]:
    """Return the rounds that so many candidates take."""
    return ROUNDS[-max(1, min(len(ROUNDS), math.ceil(math.log2(count)))) :]


def round_plan(grid: Grid, corpus: FileCorpus, cells: Sequence[Cell], share: Round) -> Plan:
    """Return the plan of one round: pilot prunings of some cells, measured on the probe.

    Raises:
        InputError: if the grid has a corpus of the probe's name.
    """
    if PROBE in grid.corpora:
        raise InputError(f"corpora.{PROBE}", PROBE, "the name is taken by the probe: rename it")
    tokens = min([_PROBE_TOKENS, *(cell.seqlen for cell in cells if cell.seqlen is not None)])
    measured = CorpusPerplexity(corpus=PROBE, seqlen=tokens, max_windows=PROBE_WINDOWS, kl=True)
    pilot = grid.model_copy(
        update={
            "name": f"{grid.name}-pilot",
            "corpora": {**grid.corpora, PROBE: corpus},
            "evaluate": Evaluation(perplexity=(measured,)),
            "describe": None,
        }
    )
    return make_plan(pilot, [_pilot_cell(cell, share) for cell in cells])


def _pilot_cell(cell: Cell, share: Round) -> Cell:
    assert cell.nsamples is not None
    windows = max(LEAST_WINDOWS, math.ceil(share.windows * cell.nsamples))
    changes: dict[str, object] = {"nsamples": min(windows, cell.nsamples)}
    if share.layers < 1:
        changes["allocation"] = FirstLayers(share=share.layers)
    return cell.model_copy(update=changes)


def print_cost(grid: Grid, corpus: FileCorpus, stored: Collection[str], console: Console) -> None:
    """Print what the pilot costs at most, beside the grid's own prunings."""
    tried = candidates(grid)
    table = Table(title=f"pilot of {grid.name}: at most")
    for heading in ("layers", "windows", "candidates", "device hours"):
        table.add_column(heading, justify="right")
    made = set(stored)
    total = 0.0
    for place, share in enumerate(ROUNDS):
        cells: list[Cell] = []
        count = 0
        for names in tried.values():
            later = rounds_for(len(names))
            first = len(ROUNDS) - len(later)
            if place >= first:
                left = _kept(len(names), place - first)
                count += left
                cells += [cell for name in list(names)[:left] for cell in names[name]]
        if not cells:
            continue
        plan = round_plan(grid, corpus, cells, share)
        hours = sum(line.device_hours for line in count_stages(plan, made))
        made |= plan.specs.keys()
        total += hours
        table.add_row(f"{share.layers:.0%}", f"{share.windows:.1%}", str(count), f"{hours:.2f}")
    console.print(table)
    whole = make_plan(grid)
    lines = count_stages(whole, set(stored))
    console.print(
        f"{total:.2f} device hours at most, calibration sets included; the whole grid would take "
        f" {sum(line.device_hours for line in lines):.2f}",
        soft_wrap=True,
    )


def _kept(count: int, halvings: int) -> int:
    """Return how many of the candidates are left after some rounds."""
    for _ in range(halvings):
        count = math.ceil(count / 2)
    return count


def run_pilot(
    grid: Grid, corpus: FileCorpus, store: Store, run: Callable[[Plan], Outcome]
) -> list[Pilot]:
    """Try the candidates of each model, round by round.

    A candidate that fails is out, and the failure is its result: data that breaks a pruning is no
    choice.

    Args:
        run: makes a plan's stages in the store.

    Raises:
        InputError: if a model has fewer than two candidates, or all of them failed.
    """
    tried = candidates(grid)
    left = {model: list(names) for model, names in tried.items()}
    pilots = {model: Pilot(model) for model in tried}
    for place, share in enumerate(ROUNDS):
        playing = {
            model: names
            for model, names in left.items()
            if len(ROUNDS) - len(rounds_for(len(tried[model]))) <= place
        }
        cells = {
            model: {name: tried[model][name] for name in names} for model, names in playing.items()
        }
        all_cells = [cell for names in cells.values() for own in names.values() for cell in own]
        if not all_cells:
            continue
        plan = round_plan(grid, corpus, all_cells, share)
        logger.info(
            "pilot: %.0f %% of the layers, %.1f %% of the windows: %d prunings",
            100 * share.layers,
            100 * share.windows,
            len(all_cells),
        )
        run(plan)
        failures = _failures(plan, store)
        for model, names in cells.items():
            pilot = pilots[model]
            measured: dict[str, list[_Values]] = {}
            for name, own in names.items():
                made = keys_of(plan, own, share)
                reason = next((failures[key] for key in made.values() if key in failures), None)
                if reason is None:
                    measured[name] = divergences(store, made)
                else:
                    pilot.failed[name] = reason
            if not measured:
                reasons = "; ".join(f"{name}: {why}" for name, why in pilot.failed.items())
                raise InputError("cells.calibration", model, f"every candidate failed: {reasons}")
            pilot.rounds.append(compare(measured))
            kept = math.ceil(len(names) / 2)
            left[model] = [each.name for each in pilot.rounds[-1][:kept]]
    return list(pilots.values())


def _failures(plan: Plan, store: Store) -> dict[str, str]:
    """Return why cells of a plan have no result, by the key of their last stage."""
    return {
        row["evaluate_key"]: row["error"] or "it has not run"
        for row in gather(plan, store).to_pylist()
        if row["status"] != "ok"
    }


def keys_of(plan: Plan, cells: Sequence[Cell], share: Round) -> dict[Cell, str]:
    """Return the keys of the evaluations of a round's cells, by the grid's cell."""
    keys = {cell: key for key, cell in plan.cells.items()}
    return {cell: keys[_pilot_cell(cell, share)] for cell in cells}


def divergences(store: Store, made: Mapping[Cell, str]) -> list[_Values]:
    """Return a candidate's KL on each window of the probe: for each setting [seeds, windows].

    Args:
        made: the candidate's cells with the keys of their evaluations.
    """
    by_setting: dict[str, list[_Values]] = {}
    for cell in sorted(made, key=lambda cell: (_setting(cell).model_dump_json(), cell.seed)):
        rows = pq.read_table(store.fetch(made[cell]) / "requests.parquet").to_pylist()
        values = np.array([row["value"] for row in rows if row["metric"] == "kl"])
        by_setting.setdefault(_setting(cell).model_dump_json(), []).append(values)
    return [np.stack(seeds) for seeds in by_setting.values()]


def compare(measured: Mapping[str, Sequence[_Values]]) -> list[Standing]:
    """Compare the candidates of a round; return them with the best first.

    Divergences are divided by their mean over all candidates of a setting, so that each setting (a
    pruner at a sparsity) counts the same. The difference of a candidate from the best has the
    variance of its mean over windows plus that over seeds, if there are several. Its interval is
    Student's t with degrees of freedom by Satterthwaite, at a level divided by the number of
    differences (Bonferroni).

    Args:
        measured: by candidate, for each setting the KL of each seed and window, [seeds, windows].
    """
    means = {name: float(np.mean([each.mean() for each in own])) for name, own in measured.items()}
    count = len(next(iter(measured.values())))
    scale = [float(np.mean([own[at].mean() for own in measured.values()])) for at in range(count)]
    relative = {
        name: np.mean([each / unit for each, unit in zip(own, scale, strict=True)], axis=0)
        for name, own in measured.items()
    }
    ordered = sorted(relative, key=lambda name: float(relative[name].mean()))
    level = 1 - (1 - _CONFIDENCE) / max(1, len(ordered) - 1)
    found = [Standing(ordered[0], means[ordered[0]])]
    for name in ordered[1:]:
        difference = relative[name] - relative[ordered[0]]
        mean, half = float(difference.mean()), _half_width(difference, level)
        found.append(Standing(name, means[name], mean, mean - half, mean + half))
    return found


def _half_width(difference: _Values, level: float) -> float:
    """Return half of the interval of a mean over seeds and windows, [seeds, windows]."""
    seeds, windows = difference.shape
    parts = [(difference.mean(axis=0), windows)]
    if seeds > 1:
        parts.append((difference.mean(axis=1), seeds))
    variances = [float(values.var(ddof=1)) / count for values, count in parts]
    total = sum(variances)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(
        variance**2 / (count - 1) for variance, (_, count) in zip(variances, parts, strict=True)
    )
    return float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(total)


def print_pilot(pilot: Pilot, seeds: int, console: Console) -> None:
    """Print the candidates of a model, each in its last round, and the choice."""
    table = Table(
        title=f"calibration data for {pilot.model}, by pilot pruning", title_justify="left"
    )
    for heading in ("calibration", "rounds", "KL (nats per token)", "against the best (95 %)"):
        table.add_column(heading)
    shown: set[str] = set()
    for number, round_ in reversed(list(enumerate(pilot.rounds, start=1))):
        for place, each in enumerate(round_):
            if each.name in shown:
                continue
            shown.add(each.name)
            difference = f"{each.against_best:+.1%} ({each.low:+.1%} to {each.high:+.1%})"
            table.add_row(each.name, str(number), f"{each.kl:.4g}", difference if place else "")
    for name, reason in pilot.failed.items():
        table.add_row(name, "", "failed", reason)
    console.print(table)
    console.print(verdict(pilot, seeds), markup=False, highlight=False, soft_wrap=True)


def verdict(pilot: Pilot, seeds: int) -> str:
    """Return the choice in words, with what it rests on."""
    tied = pilot.not_told_apart
    best = pilot.best.name
    if tied:
        choice = f"take {best}, or {' or '.join(tied)}: the pilot does not tell them apart."
    elif len(pilot.rounds[-1]) > 1:
        choice = f"take {best}: it is shown to be better than {pilot.rounds[-1][1].name}."
    else:
        choice = f"take {best}: it is the only one left."
    early = [
        each.name
        for round_, later in zip(pilot.rounds, pilot.rounds[1:], strict=False)
        for each in round_
        if each.name not in {one.name for one in later} and not each.is_worse
    ]
    unsure = f" Dropped without being shown to be worse: {', '.join(early)}." if early else ""
    drawn = "one seed: intervals cover the probe's windows, not the draw of calibration data"
    rests = f"{seeds} seeds" if seeds > 1 else drawn
    return f"{pilot.model}: {choice}{unsure} This rests on {rests}."
