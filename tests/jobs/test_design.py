"""A grid's declared design: what it compares, what is refused, and what is stored of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.store import Store
from jobs.cells import cell_name, expand
from jobs.check import check_plan
from jobs.declared import print_design, record_design, resolve
from jobs.design import detectable
from jobs.grid import Grid
from jobs.plan import make_plan
from pipeline.errors import InputError

Content = dict[str, Any]
Load = Callable[[Content], Grid]

CONTRAST = {
    "of": {"calibration": "own"},
    "against": {"calibration": "true"},
    "smallest": 1.0,
    "spread": 2.0,
}


@pytest.fixture
def declaring(content: Content) -> Content:
    content["models"] = {"testbed": {"preset": "testbed-tiny", "trainings": 3}}
    content["design"] = {"contrasts": {"own text": dict(CONTRAST)}}
    return content


def test_cells_pair_up_in_all_fields_but_those_compared(declaring: Content, load: Load) -> None:
    grid = load(declaring)
    pairs = resolve(grid, expand(grid)).pairs["own text"]
    assert len(pairs) == 3 * 2 * 2  # models, sparsities, seeds: magnitude takes no data
    for first, second, _ in pairs:
        assert (first.calibration, second.calibration) == ("own", "true")
        fields = ("model", "seed", "pruner", "sparsity", "pattern", "nsamples")
        assert all(getattr(first, name) == getattr(second, name) for name in fields)
    assert {pair.setting for pair in pairs} == {0, 1}


def test_a_field_without_meaning_for_one_side_agrees(declaring: Content, load: Load) -> None:
    declaring["cells"]["drop_fraction"] = [0.1, 0.3]
    declaring["design"]["contrasts"]["pruners"] = {
        **CONTRAST,
        "of": {"pruner": "wanda"},
        "against": {"pruner": "magnitude"},
        "where": {"sparsity": "2:4"},
    }
    grid = load(declaring)
    pairs = resolve(grid, expand(grid)).pairs
    assert len(pairs["own text"]) == 3 * 2 * 2 * 2
    assert {pair.second.seed for pair in pairs["pruners"]} == {None}
    assert {pair.first.pattern for pair in pairs["pruners"]} == {"2:4"}
    rates = {pair.first.drop_fraction for pair in pairs["pruners"]}
    assert rates == {None, 0.1, 0.3}


def test_a_sparsity_is_no_pattern_of_as_many_zeros(declaring: Content, load: Load) -> None:
    declaring["design"]["contrasts"]["own text"] |= {
        "of": {"sparsity": "2:4"},
        "against": {"sparsity": 0.5},
        "where": {"pruner": "wanda"},
    }
    grid = load(declaring)
    pairs = resolve(grid, expand(grid)).pairs["own text"]
    assert {(pair.first.pattern, pair.second.pattern) for pair in pairs} == {("2:4", None)}


def test_nested_seeds_are_draws_of_each_models_own_and_crossed_ones_are_shared(
    declaring: Content, load: Load
) -> None:
    def seeds(grid: Grid) -> dict[str, set[int]]:
        cells = [cell for cell in expand(grid) if cell.seed is not None]
        return {cell.model: {c.seed for c in cells if c.model == cell.model} for cell in cells}  # type: ignore[misc]

    nested = {"testbed-0": {0, 1}, "testbed-1": {2, 3}, "testbed-2": {4, 5}}
    assert seeds(load(declaring)) == nested
    declaring["design"]["seeds"] = "crossed"
    assert seeds(load(declaring)) == {model: {0, 1} for model in nested}


def test_a_choice_has_one_cell_for_each_candidate(declaring: Content, load: Load) -> None:
    declaring["design"]["choices"] = {"source": {"among": "calibration"}}
    grid = load(declaring)
    blocks = resolve(grid, expand(grid)).blocks["source"]
    assert blocks.candidates == ("true", "own")
    assert len(blocks.cells) == 3 * 2 * 2
    for _, (first, second) in blocks.cells:
        assert (first.calibration, second.calibration) == ("true", "own")
        assert (first.model, first.seed, first.pattern) == (
            second.model,
            second.seed,
            second.pattern,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": {"calibration": "owm"}}, r"contrasts\.own text\.of: .*selects no cell"),
        ({"of": {"calibartion": "own"}}, r"own text\.of: 'calibartion': .*did you mean 'calib"),
        ({"of": {"sparsity": "50%"}}, r"own text\.of\.sparsity: '50%'"),
        ({"against": {"calibration": "own"}}, r"own text: .*select the same cells"),
        ({"against": {"seed": 1}, "of": {"seed": 0}, "where": {"model": "testbed-0"}}, None),
        (
            {"against": {"seed": 2}, "of": {"seed": 0}},
            r"own text\.of: .*agrees with one of against",
        ),
        ({"tasks": ["ture"]}, r"own text\.tasks: 'ture': is not evaluated; did you mean 'true'"),
        ({"smallest": 0}, r"own text\.smallest: 0: must be more than 0"),
        ({"spread": None}, r"own text\.spread: None"),
    ],
)
def test_contrasts_that_select_nothing_are_refused(
    declaring: Content, load: Load, change: Content, message: str | None
) -> None:
    declaring["design"]["contrasts"]["own text"] |= change
    if message is None:
        check_plan(make_plan(load(declaring)))
    else:
        with pytest.raises(InputError, match=message):
            check_plan(make_plan(load(declaring)))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"among": "calibration", "where": {"calibration": "own"}},
            r"source\.among: .*no two values",
        ),
        ({"among": "pruner"}, r"source\.among: 'wanda': has several cells"),
        ({"among": "nsampels"}, r"source\.among: 'nsampels': .*did you mean 'nsamples'"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(
    declaring: Content, load: Load, choice: Content, message: str
) -> None:
    declaring["design"]["choices"] = {"source": choice}
    with pytest.raises(InputError, match=message):
        check_plan(make_plan(load(declaring)))


@pytest.mark.parametrize(
    ("design", "message"),
    [
        ({}, r"design: .*asks nothing"),
        ({"contrasts": {"a": CONTRAST}, "floor": {}}, r"design\.floor: .*gives no floor"),
        ({"contrasts": {"a": CONTRAST}, "seeds": "own"}, r"design\.seeds: 'own'"),
    ],
)
def test_a_design_without_content_is_refused(
    declaring: Content, load: Load, design: Content, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load({**declaring, "design": design})


def test_the_plan_says_what_the_replicates_let_it_see(declaring: Content, load: Load) -> None:
    declaring["design"]["contrasts"]["coarse"] = {**CONTRAST, "smallest": 20.0}
    console = Console(record=True, width=200)
    print_design(make_plan(load(declaring)), console)
    text = console.export_text()
    rows = {line.split()[1]: line for line in text.splitlines() if "3 x 2" in line}
    seen = f"{detectable('perplexity', 2.0, 3, 2):.2g} %"
    assert seen in rows["coarse"]
    assert "enough" in rows["coarse"]
    assert "too few models" in rows["own"]


def document(store: Store) -> Any:
    content = store.read("results/small.design.json")
    return None if content is None else json.loads(content)


def test_the_design_is_stored_once_and_a_change_is_added(
    declaring: Content, load: Load, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "store"))
    plan = make_plan(load(declaring))
    record_design(plan, store)
    record_design(plan, store)
    first = document(store)
    assert [version["measured"] for version in first["history"]] == [0]
    assert first["history"][0]["cells"] == 3 * 2 * 2 * 2
    assert first["history"][0]["design"]["replicates"]["testbed-1"] == [2, 3]
    names = {cell_name(cell) for cell in plan.cells.values()}
    assert all({*pair[:2]} <= names for pair in first["pairs"]["own text"])

    key, cell = next((k, cell) for k, cell in plan.cells.items() if cell.calibration == "own")
    assert cell.pruner is not None
    store.write(f"manifests/{key}.json", b"{}")
    declaring["design"]["contrasts"]["own text"]["smallest"] = 0.5
    record_design(make_plan(load(declaring)), store)
    assert [version["measured"] for version in document(store)["history"]] == [0, 1]


def test_another_number_of_models_is_another_design(
    declaring: Content, load: Load, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "store"))
    record_design(make_plan(load(declaring)), store)
    declaring["models"]["testbed"]["trainings"] = 4
    record_design(make_plan(load(declaring)), store)
    assert len(document(store)["history"]) == 2


def test_a_grid_without_a_design_stores_none(content: Content, load: Load, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    record_design(make_plan(load(content)), store)
    assert document(store) is None
