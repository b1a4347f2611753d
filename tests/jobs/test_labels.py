from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.grid import Grid, read_grid
from jobs.plan import make_plan

Content = dict[str, Any]
Load = Callable[[Content], Grid]
GRIDS = sorted([*Path("jobs/grids").glob("*.yaml"), *Path("analysis/studies").glob("*.yaml")])


def labels_of(grid: Grid) -> list[str]:
    return [stage.label for stage in make_plan(grid).graph.values()]


def test_labels_name_what_varies_the_calibration_first(content: Content, load: Load) -> None:
    assert sorted(labels_of(load(content))) == sorted(
        [
            "pretrain",
            "testbed-tasks",
            "evaluate dense",
            *(
                f"{kind} {rest}"
                for kind in ("prune", "evaluate")
                for target in ("50%", "2:4")
                for rest in (
                    f"magnitude {target}",
                    *(
                        f"{name} wanda {target} seed {s}"
                        for name in ("true", "own")
                        for s in (0, 1)
                    ),
                )
            ),
            *(f"windows {name} seed {seed}" for name in ("true", "own") for seed in (0, 1)),
            *(
                f"{kind} own seed {seed}{part}"
                for kind in ("generate", "score")
                for seed in (0, 1)
                for part in ("", " shard 1 of 2", " shard 2 of 2")
            ),
            *(f"filter own seed {seed}" for seed in (0, 1)),
        ]
    )


def test_a_label_leaves_out_what_does_not_vary(content: Content, load: Load) -> None:
    content["cells"] |= {"pruner": "wanda", "sparsity": 0.5, "seed": 0, "calibration": "own"}
    assert {"windows", "prune wanda 50%", "generate shard 2 of 2"} <= set(labels_of(load(content)))


def test_the_label_of_a_shared_stage_has_what_its_cells_have_in_common(
    content: Content, load: Load
) -> None:
    """Both calibrations read the same samples, and both seeds."""
    content["calibrations"]["own"]["generation_seed"] = 0
    content["calibrations"]["strict"] = content["calibrations"]["own"] | {"drop_fraction": 0.5}
    content["cells"]["calibration"] = ["true", "own", "strict"]
    labels = set(labels_of(load(content)))
    assert {"generate own+strict", "filter own", "filter strict", "windows own seed 1"} <= labels


def test_models_and_allocations_are_named_where_they_vary(content: Content, load: Load) -> None:
    content["models"]["second"] = {"preset": "testbed-tiny", "seed": 1}
    content["cells"] |= {
        "model": ["testbed", "second"],
        "pruner": "wanda",
        "seed": 0,
        "allocation": ["uniform", "owl", {"name": "owl", "spread": 0.1}],
    }
    labels = set(labels_of(load(content)))
    assert {"pretrain second", "outliers own second", "evaluate testbed dense"} <= labels
    assert "prune true testbed wanda 2:4 owl spread 0.1" in labels
    assert "prune true testbed wanda 2:4 owl" in labels


def test_an_axis_is_in_the_labels_of_the_stages_that_it_changes(
    content: Content, load: Load
) -> None:
    content["cells"] |= {
        "calibration": "own",
        "seed": 0,
        "pruner": "wanda",
        "sparsity": 0.5,
        "drop_fraction": [0.1, 0.2],
        "nsamples": [8, 16],
    }
    assert {
        "generate",
        "filter drop_fraction 0.1",
        "windows nsamples 8 drop_fraction 0.1",
        "evaluate wanda 50% nsamples 16 drop_fraction 0.2",
    } <= set(labels_of(load(content)))


def test_rules_of_the_filter_are_named_from_the_filter_on(content: Content, load: Load) -> None:
    axes = {"drop_by": ["random", "igsp"], "within": ["set", "cluster"]}
    content["cells"] |= {
        "calibration": "own",
        "seed": 0,
        "pruner": "wanda",
        "sparsity": 0.5,
        **axes,
    }
    labels = set(labels_of(load(content)))
    assert {"generate", "filter drop_by igsp within set"} <= labels
    assert "evaluate wanda 50% drop_by random within cluster" in labels


def test_the_label_of_a_pruning_for_a_generator_says_so(content: Content, load: Load) -> None:
    content["calibrations"]["pruned"] = {
        "prefixes": "other",
        "num_samples": 8,
        "generator": {"pruner": "wanda", "sparsity": 0.3, "calibration": "true"},
    }
    content["describe"] = {"reference": "true"}
    content["cells"] |= {"calibration": ["true", "pruned"], "seed": 0, "pruner": "wanda"}
    labels = set(labels_of(load(content)))
    assert {"prune pruned wanda 30% for generating", "prune pruned wanda 2:4"} <= labels
    assert {"windows as reference", "windows true", "generate pruned"} <= labels


def test_reconstructions_are_named_with_their_options_and_their_own_set(
    content: Content, load: Load
) -> None:
    fits = [None, {"epochs": 3}, {"calibration": "own"}]
    content["cells"] |= {
        "calibration": ["true", "notes"],
        "seed": 0,
        "pruner": "wanda",
        "sparsity": 0.5,
        "reconstruction": fits,
    }
    labels = labels_of(load(content))
    assert len(labels) == len(set(labels))
    assert {
        "prune true wanda 50%",
        "prune true wanda 50% reconstructed epochs 3",
        "evaluate notes wanda 50% reconstructed calibration own",
        "windows true",
        "windows own to fit to",
        "generate own to fit to",
    } <= set(labels)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_all_stages_of_a_grid_have_different_labels(path: Path) -> None:
    repeated = [label for label, times in Counter(labels_of(read_grid(path))).items() if times > 1]
    assert repeated == []
