from dataclasses import replace

from cluster.graph import Stage, descendants, longest_paths, needed, readers, unlocked


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


def test_all_that_a_target_needs_comes_before_it() -> None:
    order = needed(GRAPH, ["evaluate", "dense"], present=set())
    assert sorted(order) == sorted(GRAPH)
    for position, key in enumerate(order):
        assert set(GRAPH[key].inputs) <= set(order[:position])


def test_what_is_there_is_not_made_and_neither_is_what_only_it_needed() -> None:
    assert needed(GRAPH, ["evaluate"], present={"prune"}) == ["evaluate"]
    assert needed(GRAPH, ["evaluate", "dense"], present={"evaluate", "dense"}) == []
    assert needed(GRAPH, ["prune"], present={"pretrain"}) == ["windows", "prune"]


def test_descendants_are_all_that_reads_a_stage_however_far() -> None:
    assert descendants(readers(GRAPH), "windows") == {"prune", "evaluate"}
    assert descendants(readers(GRAPH), "evaluate") == set()


def test_a_stage_unlocks_as_many_others_as_descend_from_it() -> None:
    counts = unlocked(GRAPH, needed(GRAPH, ["evaluate", "dense"], ()))
    assert counts == {key: len(descendants(readers(GRAPH), key)) for key in GRAPH}
    assert counts == {"pretrain": 4, "windows": 2, "prune": 1, "evaluate": 0, "dense": 0}
    assert unlocked(GRAPH, ["windows", "evaluate"]) == {"windows": 0, "evaluate": 0}


def test_a_stage_has_the_longest_way_to_the_end_before_it() -> None:
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
