"""Pilot pruning: cheap prunings that are compared on a probe text."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.run import Outcome
from cluster.store import Store
from jobs.__main__ import recommend
from jobs.grid import Grid
from jobs.pilot import (
    ROUNDS,
    Pilot,
    Standing,
    candidates,
    compare,
    print_cost,
    print_pilot,
    probe_corpus,
    round_plan,
    rounds_for,
    run_pilot,
    verdict,
)
from jobs.plan import Plan
from pipeline.errors import InputError
from pipeline.specs import EvaluateSpec, FirstLayers, PruneSpec
from tests.made import make_here

Content = dict[str, Any]
Load = Callable[[Content], Grid]


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "probe.txt"
    path.write_text("\n".join("Anna lives in Rome and Bo lives in Oslo. " * 4 for _ in range(60)))
    return path


def test_fewer_candidates_take_fewer_rounds() -> None:
    assert [len(rounds_for(count)) for count in (2, 3, 4, 5, 8, 9, 40)] == [1, 2, 2, 3, 3, 3, 3]
    assert rounds_for(2) == ROUNDS[-1:]


# ------------------------------------------------------------------------------------- comparison


def drawn(draws: np.random.Generator, levels: list[float], seeds: int) -> dict[str, list[Any]]:
    """KL by seed and window for two settings. Windows are hard or easy for all candidates alike,
    and each draw of calibration data has a level of its own."""
    hard = draws.gamma(4.0, 0.25, size=(2, 1, 48))
    found: dict[str, list[Any]] = {}
    for place, level in enumerate(levels):
        of_seed = 0.03 * draws.normal(size=(2, seeds, 1))
        noise = 0.15 * draws.normal(size=(2, seeds, 48))
        values = hard * (level + of_seed + noise) * np.array([1.0, 5.0])[:, None, None]
        found[f"c{place}"] = list(values)
    return found


def test_intervals_of_a_round_hold_together_as_often_as_they_say() -> None:
    """Against the truth that was planted, with the best named in advance by a clear distance."""
    draws = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        found = compare(drawn(draws, [0.6, 1.0, 1.0, 1.1], seeds=3))
        assert found[0].name == "c0"
        truths = {"c1": 0.4, "c2": 0.4, "c3": 0.5}
        mean = np.mean([0.6, 1.0, 1.0, 1.1])
        held += all(each.low <= truths[each.name] / mean <= each.high for each in found[1:])
    assert held / 300 > 0.93


def test_equal_candidates_are_told_apart_no_more_often_than_one_time_in_twenty() -> None:
    draws = np.random.default_rng(1)
    false = sum(
        any(each.is_worse for each in compare(drawn(draws, [1.0] * 4, seeds=3))[1:])
        for _ in range(300)
    )
    # The best of four equal ones is the luckiest, which costs more than Bonferroni pays back.
    assert false / 300 < 0.12


def test_every_setting_counts_the_same_whatever_its_scale() -> None:
    low, high = np.full((1, 4), 0.1), np.full((1, 4), 100.0)
    found = compare({"a": [low * 1.2, high], "b": [low, high * 1.1]})
    assert [each.name for each in found] == ["b", "a"]
    assert found[1].against_best == pytest.approx((0.2 / 1.1 - 0.1 / 1.05) / 2)


def test_the_verdict_says_what_is_not_told_apart_and_what_it_rests_on() -> None:
    early = [Standing("a", 0.1), Standing("b", 0.11, 0.1, 0.05, 0.2), Standing("c", 0.2, 1, -1, 3)]
    last = [Standing("b", 0.3), Standing("a", 0.31, 0.03, -0.1, 0.2)]
    text = verdict(Pilot("m", [early, last]), seeds=1)
    assert text.startswith("m: take b, or a: the pilot does not tell them apart.")
    assert "Dropped without being shown to be worse: c." in text
    assert "one seed" in text
    sure = [Standing("b", 0.3), Standing("a", 0.9, 1.0, 0.5, 1.5)]
    assert "better than a" in verdict(Pilot("m", [sure]), seeds=3)


# ------------------------------------------------------------------------------------------- plan


def test_a_round_prunes_few_layers_with_few_windows_and_measures_the_probe_alone(
    content: Content, load: Load, probe: Path
) -> None:
    grid = load(content)
    tried = candidates(grid)["testbed"]
    assert list(tried) == ["true", "own"]
    cells = [cell for own in tried.values() for cell in own]
    plan = round_plan(grid, probe_corpus(str(probe)), cells, ROUNDS[1])
    prunings = [spec for spec in plan.specs.values() if isinstance(spec, PruneSpec)]
    assert len(prunings) == 2 * 2 * 2
    assert {spec.allocation for spec in prunings} == {FirstLayers(share=0.5)}
    assert {spec.calibration.nsamples for spec in prunings if spec.calibration} == {4}
    measured = [spec for spec in plan.specs.values() if isinstance(spec, EvaluateSpec)]
    assert {tuple(entry.name for entry in spec.perplexity) for spec in measured} == {("probe",)}
    assert all(spec.compares and not spec.tasks for spec in measured)


def test_the_cost_is_an_upper_bound_that_is_printed_first(
    content: Content, load: Load, probe: Path
) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    content["cells"]["calibration"] = ["true", "own", "notes"]
    print_cost(load(content), probe_corpus(str(probe)), (), console)
    printed = console.export_text()
    assert "device hours at most, calibration sets included; the whole grid would take" in printed
    rows = [line.split("│")[1:4] for line in printed.splitlines() if "%" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["50%", "12.5%", "3"],
        ["100%", "25.0%", "2"],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": "true"}, "there is nothing to choose"),
        ({"pruner": "magnitude"}, "no pruner of the grid takes calibration data"),
    ],
)
def test_a_grid_without_a_choice_is_refused(
    content: Content, load: Load, change: Content, message: str
) -> None:
    content["cells"] |= change
    with pytest.raises(InputError, match=message):
        candidates(load(content))


def test_candidates_with_unequal_cells_are_refused(content: Content, load: Load) -> None:
    content["exclude"] = [{"calibration": "own", "sparsity": "2:4", "pruner": "wanda"}]
    with pytest.raises(InputError, match=r"testbed: own.*give both the same"):
        candidates(load(content))


def test_a_probe_that_is_short_or_absent_is_refused_before_any_work(
    tmp_path: Path, content: Content, load: Load, probe: Path
) -> None:
    (tmp_path / "short.txt").write_text("Anna lives in Rome.\n")
    with pytest.raises(InputError, match="holds 20 bytes, and a comparison needs 8,192"):
        probe_corpus(str(tmp_path / "short.txt"))
    with pytest.raises(InputError, match="no file is there"):
        probe_corpus(str(tmp_path / "none.txt"))
    content["corpora"]["probe"] = content["corpora"]["notes"]
    grid = load(content)
    with pytest.raises(InputError, match=r"corpora\.probe.*rename it"):
        round_plan(grid, probe_corpus(str(probe)), [], ROUNDS[0])


# -------------------------------------------------------------------------------------------- run


@pytest.fixture
def trial(content: Content, probe: Path, tmp_path: Path, tiny_model_folder: Path) -> Content:
    """A grid whose candidates are the probe's own text, noise, and a text that is too short."""
    draws = np.random.default_rng(0)
    noise, short = tmp_path / "noise.txt", tmp_path / "short.txt"
    letters = list("qxzjkvw1234567890")
    noise.write_text("\n".join("".join(draws.choice(letters, 400)) for _ in range(90)))
    short.write_text("Anna lives.\n")
    model = {"kind": "local-model", "path": str(tiny_model_folder / "model"), "dtype": "float32"}
    content |= {
        "models": {"tiny": model},
        "corpora": {
            name: {"kind": "file-corpus", "path": str(path)}
            for name, path in (("near", probe), ("noise", noise), ("short", short))
        },
        "calibrations": {name: {"corpus": name} for name in ("noise", "near", "short")},
        "evaluate": {"perplexity": [{"corpus": "near", "seqlen": 32, "max_windows": 4}]},
    }
    content["cells"] |= {
        "model": "tiny",
        "calibration": ["noise", "near", "short"],
        "pruner": "sparsegpt",
        "sparsity": 0.7,
        "seqlen": 32,
        "nsamples": 64,
    }
    return content


def test_data_of_the_probes_kind_is_chosen_and_data_that_fails_is_out(
    trial: Content, load: Load, probe: Path, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "store"))
    plans: list[Plan] = []

    def run(plan: Plan) -> Outcome:
        plans.append(plan)
        make_here(plan.graph, plan.targets, store, may_fail=True)
        return Outcome()

    (pilot,) = run_pilot(load(trial), probe_corpus(str(probe)), store, run)
    assert len(plans) == 2
    assert pilot.best.name == "near"
    assert pilot.best.kl > 0
    assert list(pilot.failed) == ["short"]
    console = Console(width=200, record=True, file=io.StringIO())
    print_pilot(pilot, 2, console)
    printed = console.export_text()
    assert "tiny: take near" in printed
    assert "short" in printed
    assert "failed" in printed


def test_the_command_prints_the_cost_and_then_the_choice(
    trial: Content,
    load: Load,
    probe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_here(plan: Plan, store: Store, address: str | None, workers: int | None) -> Outcome:
        make_here(plan.graph, plan.targets, store)
        return Outcome()

    monkeypatch.setattr("jobs.__main__.run_grid", run_here)
    trial["cells"] |= {"calibration": ["noise", "near"], "seed": 0}
    load(trial)
    store = str(tmp_path / "store")
    recommend(tmp_path / "grid.yaml", store, probe=str(probe))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.index("device hours at most") < printed.index("tiny: take near")
    assert "one seed: intervals cover the probe's windows" in printed
    trial["cells"] |= {"calibration": ["near", "short"]}
    load(trial)
    with pytest.raises(InputError, match=r"corpora\.short"):
        recommend(tmp_path / "grid.yaml", store, probe=str(probe))
