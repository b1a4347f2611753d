import re
from dataclasses import replace
from pathlib import Path

from cluster.graph import (
    Resources,
    Stage,
    descendants,
    longest_paths,
    needed,
    reader_counts,
    readers,
)

FAULTS = Path(__file__).parents[2] / "docs" / "faults.md"


def stage(key: str, *inputs: str) -> Stage:
    return Stage(key=key, kind="k", label=key, spec={}, payload=key, inputs=inputs)


GRAPH = {
    each.key: each
    for each in (
        stage("pretrain"),
        stage("windows", "pretrain"),
        stage("prune", "pretrain", "windows"),
        stage("evaluate", "prune"),
        stage("dense", "pretrain"),
    )
}


def test_everything_that_a_target_needs_comes_before_it() -> None:
    order = needed(GRAPH, ["evaluate", "dense"], present=set())
    assert sorted(order) == sorted(GRAPH)
    for position, key in enumerate(order):
        assert set(GRAPH[key].inputs) <= set(order[:position])


def test_neither_a_present_stage_nor_what_only_it_needs_is_made() -> None:
    assert needed(GRAPH, ["evaluate"], present={"prune"}) == ["evaluate"]
    assert needed(GRAPH, ["evaluate", "dense"], present={"evaluate", "dense"}) == []
    assert needed(GRAPH, ["prune"], present={"pretrain"}) == ["windows", "prune"]


def test_descendants_are_all_direct_and_indirect_readers() -> None:
    assert descendants(readers(GRAPH), "windows") == {"prune", "evaluate"}
    assert descendants(readers(GRAPH), "evaluate") == set()


def test_reader_counts_are_the_numbers_of_direct_readers_among_the_given_stages() -> None:
    order = needed(GRAPH, ["evaluate", "dense"], ())
    assert reader_counts(GRAPH, order) == {key: len(readers(GRAPH)[key]) for key in GRAPH}
    assert max(reader_counts(GRAPH, order).values()) > 1
    # what leads to a stage only by one that is left out is not read by it
    assert reader_counts(GRAPH, ["windows", "evaluate"]) == {"windows": 0, "evaluate": 0}


def test_the_longest_path_of_a_stage_leads_to_the_end() -> None:
    seconds = {"pretrain": 1.0, "windows": 2.0, "prune": 4.0, "evaluate": 8.0, "dense": 100.0}
    timed = {key: replace(stage, seconds=seconds[key]) for key, stage in GRAPH.items()}
    order = needed(timed, timed, ())
    assert longest_paths(timed, order) == {
        "evaluate": 8.0,
        "dense": 100.0,
        "prune": 4.0 + 8.0,
        "windows": 2.0 + 4.0 + 8.0,
        "pretrain": 1.0 + 100.0,
    }
    assert longest_paths(timed, ["pretrain", "windows"]) == {"pretrain": 1 + 2.0, "windows": 2.0}


def test_retries_and_limits_have_the_defaults_that_the_page_on_faults_names() -> None:
    named = dict(re.findall(r"^- `(\w+)` \((\w+)\): ", FAULTS.read_text(), re.MULTILINE))
    assert named.keys() == {"retries", "time_limit_seconds", "memory_bytes"}
    for name, default in named.items():
        assert str(getattr(Resources(), name)) == default.replace("none", "None"), name
