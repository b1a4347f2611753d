from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cells import (
    GENERATED_FIELDS,
    Cell,
    cell_name,
    describe_spec,
    evaluate_spec,
    expand,
    prune_spec,
)
from jobs.grid import Grid
from pipeline.errors import InputError
from pipeline.files import fingerprint
from pipeline.specs import (
    OWL,
    ArithmeticProgression,
    CorpusMixture,
    FilterSpec,
    Magnitude,
    PruneSpec,
    SparseGPT,
    Uniform,
    Wanda,
)

Content = dict[str, Any]
Load = Callable[[Content], Grid]


def test_axes_are_multiplied_and_the_dense_model_comes_first(content: Content, load: Load) -> None:
    cells = expand(load(content))
    assert cells[0] == Cell(model="testbed")
    wanda = [cell for cell in cells if isinstance(cell.pruner, Wanda)]
    assert len(wanda) == 2 * 2 * 2  # calibrations, sparsities, seeds
    assert len({cell.model_dump_json() for cell in cells}) == len(cells)


def test_a_pruner_without_data_has_one_cell_for_all_calibrations_and_seeds(
    content: Content, load: Load
) -> None:
    cells = [cell for cell in expand(load(content)) if isinstance(cell.pruner, Magnitude)]
    assert [(cell.sparsity, cell.pattern) for cell in cells] == [(0.5, None), (0.5, "2:4")]
    assert {(cell.calibration, cell.seed, cell.nsamples) for cell in cells} == {
        ("none", None, None)
    }


ALLOCATIONS = ["uniform", {"name": "owl", "spread": 0.1}, "owl"]
PROGRESSION = {"name": "arithmetic-progression", "difference": 0.02}


def test_allocations_are_an_axis_of_their_own(content: Content, load: Load) -> None:
    content["cells"] |= {
        "pruner": "wanda",
        "sparsity": 0.5,
        "allocation": [*ALLOCATIONS, PROGRESSION],
    }
    cells = expand(load(content))[1:]
    assert len(cells) == 2 * 2 * 4  # calibrations, seeds, allocations
    assert {cell.allocation for cell in cells} == {
        Uniform(),
        OWL(spread=0.1),
        OWL(),
        ArithmeticProgression(difference=0.02),
    }


def test_magnitude_needs_a_calibration_if_its_allocation_does(content: Content, load: Load) -> None:
    content["cells"] |= {
        "pruner": "magnitude",
        "sparsity": 0.5,
        "allocation": ["uniform", "owl", PROGRESSION],
    }
    grid = load(content)
    cells = expand(grid)[1:]
    without = [cell for cell in cells if cell.allocation != OWL()]
    assert {cell.allocation for cell in without} == {
        Uniform(),
        ArithmeticProgression(difference=0.02),
    }
    assert len(without) == 2
    assert {(cell.calibration, cell.seed, cell.seqlen) for cell in without} == {
        ("none", None, None)
    }
    owl = [cell for cell in cells if cell.allocation == OWL()]
    assert {(cell.calibration, cell.seed, cell.nsamples, cell.seqlen) for cell in owl} == {
        (calibration, seed, 16, 64) for calibration in ("true", "own") for seed in (0, 1)
    }
    assert len(owl) == 4
    for cell in owl:
        spec = prune_spec(grid, cell)
        assert spec is not None
        assert spec.outliers is not None
        assert spec.outliers.calibration.seed == cell.seed


def test_kept_weights_can_be_fitted_to_the_cells_own_set_or_another(
    content: Content, load: Load
) -> None:
    fits = [None, {}, {"calibration": "own"}]
    content["cells"] |= {
        "calibration": "true",
        "pruner": ["magnitude", "wanda"],
        "sparsity": 0.5,
        "reconstruction": fits,
        "seed": 0,
    }
    content["exclude"] = [{"pruner": "magnitude", "reconstruction": fits[2]}]
    grid = load(content)
    specs = [prune_spec(grid, cell) for cell in expand(grid)[1:]]
    assert [spec.pruner.name for spec in specs if spec] == ["magnitude"] * 2 + ["wanda"] * 3
    plain, magnitude, _, own, other = specs
    assert plain is not None
    assert plain.calibration is None
    assert magnitude is not None
    assert own is not None
    assert magnitude.calibration == own.calibration
    assert other is not None
    assert other.calibration == own.calibration
    assert own.reconstruction is not None
    assert own.reconstruction.calibration is None
    assert other.reconstruction is not None
    assert other.reconstruction.calibration is not None
    assert isinstance(other.reconstruction.calibration.source, FilterSpec)
    assert other.reconstruction.calibration.seqlen == 64


def test_a_cell_without_reconstruction_has_the_name_that_it_had() -> None:
    assert cell_name(Cell(model="m", pruner="wanda", sparsity=0.5)) == "579fb10f1b04"  # type: ignore[arg-type]


def test_the_default_allocation_is_uniform_whether_or_not_it_is_named(
    content: Content, load: Load
) -> None:
    unnamed = expand(load(content))
    content["cells"]["allocation"] = ["uniform", {"name": "uniform"}]
    assert expand(load(content)) == unnamed


def test_axes_of_generation_mean_nothing_to_real_corpora(content: Content, load: Load) -> None:
    content["cells"] |= {"pruner": "wanda", "prefix_tokens": [1, 4], "sparsity": 0.5, "seed": 0}
    cells = expand(load(content))[1:]
    assert [(cell.calibration, cell.prefix_tokens) for cell in cells] == [
        ("true", None),
        ("own", 1),
        ("own", 4),
    ]


def test_a_generated_cell_has_the_values_of_its_calibration(content: Content, load: Load) -> None:
    cells = [cell for cell in expand(load(content)) if cell.calibration == "own"]
    assert {tuple(getattr(cell, field) for field in GENERATED_FIELDS) for cell in cells} == {
        (2, 0.2, "perplexity", "set", 80, 0.6)
    }


def test_include_adds_cells_and_exclude_removes_them(content: Content, load: Load) -> None:
    content["include"] = [{"sparsity": 0.7, "pruner": {"name": "sparsegpt", "damping": 0.1}}]
    content["exclude"] = [{"calibration": "own", "sparsity": ["2:4", 0.7]}]
    cells = expand(load(content))
    assert not any(
        cell.calibration == "own" and (cell.pattern or cell.sparsity == 0.7) for cell in cells
    )
    included = [cell for cell in cells if cell.pruner == SparseGPT(damping=0.1)]
    assert [(cell.calibration, cell.sparsity, cell.seed) for cell in included] == [
        ("true", 0.7, 0),
        ("true", 0.7, 1),
    ]


def test_a_generated_cell_becomes_the_papers_recipe(content: Content, load: Load) -> None:
    grid = load(content)
    cell = next(cell for cell in expand(grid) if cell.calibration == "own" and cell.seed == 1)
    pruned = prune_spec(grid, cell)
    assert pruned is not None
    assert pruned.calibration is not None
    source = pruned.calibration.source
    assert isinstance(source, FilterSpec)
    samples = source.scores.samples
    assert (samples.top_k, samples.top_p, samples.temperature) == (50, 0.95, 0.6)
    assert (samples.repetition_penalty, samples.prefix_tokens, samples.seed) == (1.2, 2, 1)
    assert (source.drop_fraction, source.scores.include_prefix) == (0.2, False)
    assert samples.model == source.scores.model == pruned.model == grid.models["testbed"]
    assert samples.seqlen == pruned.calibration.seqlen == 64


def test_another_model_of_the_grid_can_score(content: Content, load: Load) -> None:
    content["models"]["judge"] = {"preset": "testbed-tiny", "seed": 5}
    content["calibrations"]["own"]["scorer"] = "judge"
    grid = load(content)
    cell = next(cell for cell in expand(grid) if cell.calibration == "own")
    pruned = prune_spec(grid, cell)
    assert pruned is not None
    assert pruned.calibration is not None
    source = pruned.calibration.source
    assert isinstance(source, FilterSpec)
    assert source.scores.model == grid.models["judge"]
    assert source.scores.samples.model == grid.models["testbed"]
    content["calibrations"]["own"]["scorer"] = "jugde"
    with pytest.raises(InputError, match=r"calibrations\.own\.scorer: 'jugde'.*'judge'"):
        expand(load(content))


def test_options_of_a_calibration_reach_its_stages(
    content: Content, load: Load, tmp_path: Path
) -> None:
    options = {
        "min_new_tokens": 9,
        "temperature_end": 0.2,
        "temperature_tokens": 5,
        "prompt": "chat",
        "redraws": 3,
    }
    filtering = {"drop_duplicates": True, "near_duplicate_similarity": 0.7}
    words = tmp_path / "words.txt"
    words.write_text("bad")
    content["calibrations"]["own"] |= {**options, **filtering, "banned_words": str(words)}
    grid = load(content)
    cell = next(cell for cell in expand(grid) if cell.calibration == "own")
    pruned = prune_spec(grid, cell)
    assert pruned is not None
    assert pruned.calibration is not None
    source = pruned.calibration.source
    assert isinstance(source, FilterSpec)
    assert {name: getattr(source, name) for name in filtering} == filtering
    assert source.banned_words is not None
    assert source.banned_words.fingerprint == fingerprint(str(words))
    assert {name: getattr(source.scores.samples, name) for name in options} == options


def test_prefixes_of_several_corpora_are_mixed_by_weight(content: Content, load: Load) -> None:
    content["calibrations"]["own"]["prefixes"] = {"other": 3, "true": 1}
    grid = load(content)
    cell = next(cell for cell in expand(grid) if cell.calibration == "own")
    pruned = prune_spec(grid, cell)
    assert pruned is not None
    assert pruned.calibration is not None
    source = pruned.calibration.source
    assert isinstance(source, FilterSpec)
    mixture = source.scores.samples.prefixes
    assert isinstance(mixture, CorpusMixture)
    assert {name: part.weight for name, part in mixture.parts.items()} == {"other": 3, "true": 1}
    assert {name: part.corpus for name, part in mixture.parts.items()} == {
        name: grid.corpora[name] for name in ("other", "true")
    }
    content["calibrations"]["own"]["prefixes"] = {"other": 3, "ture": 1}
    with pytest.raises(InputError, match=r"calibrations\.own\.prefixes: 'ture'.*'true'"):
        expand(load(content))


def test_one_generation_seed_shares_the_texts_between_seeds(content: Content, load: Load) -> None:
    content["calibrations"]["own"]["generation_seed"] = 7
    grid = load(content)
    specs = [prune_spec(grid, cell) for cell in expand(grid) if cell.calibration == "own"]
    windows = [spec.calibration for spec in specs if spec is not None and spec.calibration]
    assert {spec.seed for spec in windows} == {0, 1}
    assert len({spec.source.key for spec in windows if isinstance(spec.source, FilterSpec)}) == 1


def filters_of(content: Content, load: Load, **axes: object) -> list[FilterSpec]:
    """The filters of the cells of one seed and pruner."""
    content["cells"] |= {
        "calibration": "own",
        "pruner": "wanda",
        "sparsity": 0.5,
        "seed": 4,
        **axes,
    }
    grid = load(content)
    specs = [prune_spec(grid, cell) for cell in expand(grid) if cell.pruner is not None]
    sources = [spec.calibration.source for spec in specs if spec and spec.calibration]
    return [source for source in sources if isinstance(source, FilterSpec)]


def test_only_a_rule_that_draws_has_the_seed_of_its_cell(content: Content, load: Load) -> None:
    rules = ["perplexity", "min-k-plus-plus", "igsp", "zipcal", "random", "cola"]
    found = {each.drop_by: each for each in filters_of(content, load, drop_by=rules)}
    assert [found[rule].seed for rule in rules] == [0, 0, 0, 0, 4, 4]
    clusters = filters_of(content, load, drop_by="zipcal", within=["set", "cluster"])
    assert [each.seed for each in clusters] == [0, 4]


def test_hidden_states_are_taken_only_for_rules_that_read_them(
    content: Content, load: Load
) -> None:
    rules = ["perplexity", "random", "cola"]
    found = filters_of(content, load, drop_by=rules, within=["set", "cluster"])
    states = {(each.drop_by, each.within): each.scores.hidden_states for each in found}
    assert {pair for pair, taken in states.items() if taken} == {
        ("cola", "set"),
        *((rule, "cluster") for rule in rules),
    }
    plain = filters_of(content, load, drop_by="perplexity", within="set")
    assert plain[0].scores.key == found[0].scores.key


def test_a_rule_that_reads_no_score_is_the_same_work_for_every_scorer(
    content: Content, load: Load
) -> None:
    content["models"]["judge"] = {"preset": "testbed-tiny", "seed": 5}
    plain = filters_of(content, load, drop_by=["random", "perplexity"])
    content["calibrations"]["own"]["scorer"] = "judge"
    judged = filters_of(content, load, drop_by=["random", "perplexity"])
    assert [one.key == other.key for one, other in zip(plain, judged, strict=True)] == [True, False]


def test_where_nothing_is_dropped_all_rules_are_one_cell(content: Content, load: Load) -> None:
    axes = {"drop_fraction": [0.0, 0.25], "drop_by": ["random", "zipcal"], "within": "cluster"}
    found = filters_of(content, load, **axes)
    assert [(each.drop_fraction, each.drop_by, each.within) for each in found] == [
        (0.0, "perplexity", "set"),
        (0.25, "random", "cluster"),
        (0.25, "zipcal", "cluster"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"within": "source"}, r"own\.within: 'source': all samples have one source: mix"),
        ({"within": "sauce"}, r"within: 'sauce': there is no such value.*'source'"),
        ({"drop_by": "min-k"}, r"drop_by: 'min-k': there is no such value.*min-k-plus-plus"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(
    content: Content, load: Load, change: Content, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        filters_of(content, load, **change)
    content["cells"] = {
        name: value for name, value in content["cells"].items() if name not in change
    }
    content["calibrations"]["own"] |= change
    with pytest.raises(InputError, match=message):
        filters_of(content, load)


@pytest.mark.parametrize("place", ["cells", "calibration"])
@pytest.mark.parametrize("rule", [{"drop_by": "zipcal"}, {"within": "cluster"}])
def test_a_rule_without_a_share_to_drop_is_refused(
    content: Content, load: Load, rule: Content, place: str
) -> None:
    del content["calibrations"]["own"]["drop_fraction"]
    content["calibrations"]["own"] |= rule if place == "calibration" else {}
    axes = rule if place == "cells" else {}
    (name,) = rule
    with pytest.raises(InputError, match=rf"calibrations\.own\.{name}.*give drop_fraction"):
        filters_of(content, load, **axes)
    (kept,) = filters_of(content, load, **axes, drop_fraction=0)
    assert kept.drop_fraction == 0


def test_sources_of_a_mixture_can_be_filtered_each_by_itself(content: Content, load: Load) -> None:
    content["calibrations"]["own"]["prefixes"] = {"other": 1, "true": 1}
    (found,) = filters_of(content, load, within="source")
    assert (found.within, found.scores.hidden_states, found.seed) == ("source", False, 0)


def test_dense_and_pruned_models_have_the_same_evaluation(content: Content, load: Load) -> None:
    grid = load(content)
    specs = [evaluate_spec(grid, cell) for cell in expand(grid)]
    assert len({spec.model_copy(update={"model": specs[0].model}).key for spec in specs}) == 1


def test_only_pruned_models_are_compared_with_the_dense_one(content: Content, load: Load) -> None:
    plain = load(content)
    entries = [entry.model_dump() | {"kl": True} for entry in plain.evaluate.perplexity]
    grid = load({**content, "evaluate": {"perplexity": entries}})
    for cell in expand(grid):
        spec = evaluate_spec(grid, cell)
        assert spec.compares == (cell.pruner is not None)
        without = spec.model_copy(update={"perplexity": evaluate_spec(plain, cell).perplexity})
        assert (spec.key == without.key) == (cell.pruner is None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.5}, r"cells\.sparsity: 1.5: must be less than 1"),
        ({"sparsity": "9:4"}, r"N must not exceed M"),
        ({"sparsity": "half"}, r"not of the form N:M"),
        ({"pruner": "wander"}, r"cells\.pruner.*wander"),
        ({"model": "testbad"}, r"cells\.model: 'testbad'.*did you mean 'testbed'"),
        ({"calibration": "tru"}, r"cells\.calibration: 'tru'.*did you mean 'true'"),
        ({"calibration": "none"}, r"pruner wanda needs data"),
        (
            {"calibration": "none", "pruner": "magnitude", "allocation": "owl"},
            r"allocation owl needs data",
        ),
        ({"allocation": "owls"}, r"cells\.allocation.*owls"),
        ({"allocation": {"name": "owl", "spread": 2}}, r"allocation\.spread: 2: .*at most 0\.5"),
        ({"allocation": "by-hand"}, r"allocation\.sparsities.*is missing"),
        (
            {"reconstruction": {"calibration": "tru"}},
            r"cells\.reconstruction\.calibration: 'tru'.*did you mean 'true'",
        ),
        ({"reconstruction": {"epoch": 2}}, r"cells\.reconstruction\.epoch.*did you mean 'epochs'"),
        ({"seed": []}, r"cells\.seed: \[\]: is an axis without values"),
        ({"seeds": 1}, r"cells\.seeds: 1: there is no such field"),
        ({"nsamples": "many"}, r"cells\.nsamples: 'many'.*whole number"),
    ],
)
def test_a_wrong_cell_is_named_with_its_field_and_value(
    content: Content, load: Load, change: Content, message: str
) -> None:
    content["cells"] |= {"pruner": "wanda", **change}
    with pytest.raises(InputError, match=message):
        expand(load(content))


def test_a_grid_that_excludes_all_its_cells_is_refused(content: Content, load: Load) -> None:
    content["exclude"] = [{"model": "testbed"}]
    with pytest.raises(InputError, match=r"exclude.*leaves no cell"):
        expand(load(content))


def test_a_pruned_version_of_the_model_can_generate(content: Content, load: Load) -> None:
    content["calibrations"]["sparse"] = {
        "prefixes": "other",
        "num_samples": 80,
        "generator": {"pruner": "magnitude", "sparsity": 0.6},
    }
    content["calibrations"]["again"] = {
        **content["calibrations"]["sparse"],
        "generator": {"pruner": "wanda", "sparsity": 0.4, "calibration": "sparse"},
    }
    grid = load(content)
    cell = Cell(
        model="testbed",
        calibration="again",
        pruner=SparseGPT(),
        sparsity=0.5,
        seed=3,
        nsamples=16,
        seqlen=64,
    )
    pruned = prune_spec(grid, cell)
    assert pruned is not None
    writers = []
    while pruned.calibration is not None:
        assert isinstance(pruned.calibration.source, FilterSpec)
        assert pruned.calibration.seed == 3
        samples = pruned.calibration.source.scores.samples
        assert pruned.calibration.source.scores.model == samples.model
        assert isinstance(samples.model, PruneSpec)
        pruned = samples.model
        assert pruned.model == grid.models["testbed"]
        writers.append((pruned.pruner.name, pruned.sparsity))
    assert writers == [("wanda", 0.4), ("magnitude", 0.6)]


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ({"pruner": "wanda", "sparsity": 0.5}, "needs a calibration"),
        ({"pruner": "magnitude", "sparsity": 0.5, "calibration": "true"}, "takes no calibration"),
        ({"pruner": "wanda", "sparsity": 0.5, "calibration": "nothing"}, "is not defined"),
        ({"pruner": "wanda", "sparsity": 0.5, "calibration": "own"}, "needs itself, by own"),
    ],
)
def test_an_impossible_pruned_generator_is_refused(
    generator: Content, message: str, content: Content, load: Load
) -> None:
    content["calibrations"]["own"]["generator"] = generator
    with pytest.raises(InputError, match=message):
        expand(load(content))


def test_every_calibration_set_is_described_if_the_grid_asks_for_it(
    content: Content, load: Load
) -> None:
    plain, described = load(content), load({**content, "describe": {"reference": "notes"}})
    cells = expand(described)
    assert all(describe_spec(plain, cell) is None for cell in cells)
    for cell in cells:
        spec, pruned = describe_spec(described, cell), prune_spec(described, cell)
        if pruned is None or pruned.calibration is None:
            assert spec is None
            continue
        assert spec is not None
        assert spec.calibration == pruned.calibration
        assert spec.model == described.models["testbed"]
        assert spec.reference is not None
        assert spec.reference.source == described.corpora["notes"]
    with pytest.raises(InputError, match=r"describe\.reference"):
        describe_spec(load({**content, "describe": {"reference": "nothing"}}), cells[-1])


def test_a_calibration_may_mix_corpora_and_names_each(content: Content, load: Load) -> None:
    content["calibrations"]["mixed"] = {"corpus": {"true": 1, "other": 3}}
    content["cells"] |= {"calibration": "mixed", "pruner": "wanda"}
    grid = load(content)
    pruned = prune_spec(grid, expand(grid)[1])
    assert pruned is not None
    assert pruned.calibration is not None
    source = pruned.calibration.source
    assert isinstance(source, CorpusMixture)
    assert {name: part.weight for name, part in source.parts.items()} == {
        "true": 1,
        "other": 3,
    }
    content["calibrations"]["mixed"] = {"corpus": {"true": 1, "othr": 3}}
    with pytest.raises(InputError, match=r"calibrations\.mixed\.corpus: 'othr'.*other"):
        expand(load(content))
