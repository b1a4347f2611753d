"""The order of work on simulated clusters, without Ray and in virtual time."""

import random
from collections.abc import Iterator

import pytest

from benchmarks.simulated_schedule import (
    MAKESPAN_TARGET,
    Simulation,
    list_schedule,
    lower_bound,
    overtaken,
    random_case,
)
from cluster.graph import Graph, Resources, Stage, needed
from cluster.schedule import (
    IDLE_SECONDS,
    START_SECONDS,
    EndActor,
    HandOver,
    Schedule,
    StartActor,
    bundle,
)


def stage(
    key: str, seconds: float, *inputs: str, pool: str | None = None, **resources: float
) -> Stage:
    return Stage(
        key=key, kind="k", label=key, spec={}, payload="", inputs=inputs, pool=pool,
        seconds=seconds, resources=Resources(**resources),
    )  # fmt: skip


def schedule(
    *stages: Stage, cpus: float, gpus: float = 0.0, workers: int | None = None
) -> Schedule:
    """Return a schedule whose stages without inputs are ready."""
    graph: Graph = {each.key: each for each in stages}
    made = Schedule(graph, workers)
    made.resize([{"CPU": cpus, "GPU": gpus}])
    made.order(needed(graph, graph, ()))
    for each in stages:
        if not each.inputs:
            made.add(each.key)
    return made


def steps(of: Schedule, now: float = 0.0) -> list[str]:
    """Return all steps that can be taken now."""

    def taken() -> Iterator[str]:
        while (step := of.step(now)) is not None:
            match step:
                case HandOver(stage):
                    yield stage.key
                case StartActor(stage):
                    yield f"start {stage.pool}"
                case EndActor(pool):
                    yield f"end {pool}"

    return list(taken())


CASES = [random_case(random.Random(seed)) for seed in range(200)]


def test_random_grids_take_at_most_a_tenth_longer_than_list_scheduling() -> None:
    ratios = [Simulation(case).run() / list_schedule(case) for case in CASES]
    assert max(ratios) <= MAKESPAN_TARGET
    assert sum(ratios) / len(ratios) <= 1.02


def test_the_list_schedule_is_within_grahams_bound() -> None:
    """Graham's bound for equal machines: less than twice the best makespan."""
    for case in CASES:
        assert lower_bound(case) * (1 - 1e-9) <= list_schedule(case)
        if len(case.nodes) == 1 and "GPU" not in case.nodes[0]:
            assert list_schedule(case) <= 2 * lower_bound(case)


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_no_awaited_stage_begins_after_a_ready_one_that_nobody_waits_for(
    workers: int | None,
) -> None:
    for case in CASES[:100]:
        simulation = Simulation(case, workers=workers)
        simulation.run()
        assert list(overtaken(case.graph, simulation.times)) == []


def test_no_more_is_handed_over_than_there_is_room_for() -> None:
    many = [stage(f"s-{number}", 1.0) for number in range(300)]
    assert len(steps(schedule(*many, cpus=2.0))) == 2
    assert len(steps(schedule(*many, cpus=100.0))) == 102  # a fiftieth waits with Ray
    assert len(steps(schedule(*many, cpus=100.0, workers=7))) == 7


def test_the_longest_remaining_path_goes_first_in_any_order_of_the_plan() -> None:
    made = schedule(
        stage("short", 1.0), stage("long", 5.0), stage("filter", 0.1),
        stage("reads-short", 1.0, "short"), stage("reads-filter", 50.0, "filter"), cpus=3.0,
    )  # fmt: skip
    assert steps(made) == ["filter", "short", "long"]  # nobody waits for `long`


def test_an_awaited_stage_without_room_keeps_unawaited_ones_from_its_place() -> None:
    made = schedule(
        stage("at-work", 9.0, cpus=3), stage("reads", 1.0, "at-work"),
        stage("wide", 1.0, cpus=2), stage("reads-wide", 1.0, "wide"), stage("leaf", 9.0), cpus=4.0,
    )  # fmt: skip
    assert steps(made) == ["at-work"]
    made.returned("at-work", 1.0)
    made.discard("at-work")
    assert steps(made) == ["wide", "leaf"]


def test_a_stage_that_waits_for_a_gpu_leaves_cpus_to_others() -> None:
    made = schedule(
        stage("a", 9.0, gpus=1), stage("b", 9.0, gpus=1), stage("leaf", 1.0),
        stage("reads", 1.0, "a", "b"), cpus=4.0, gpus=1.0,
    )  # fmt: skip
    assert steps(made) == ["a", "leaf"]


def test_fractions_of_a_gpu_add_up() -> None:
    made = schedule(*(stage(f"s-{n}", 1.0, gpus=0.1) for n in range(20)), cpus=50.0, gpus=1.0)
    assert len(steps(made)) == 10


def test_a_pool_has_an_actor_for_each_stage_with_room() -> None:
    shards = [stage(f"s-{number}", 30.0, pool="p") for number in range(5)]
    made = schedule(*shards, cpus=3.0)
    assert steps(made) == ["start p"] * 3
    made.joined("p", 1.0)
    assert steps(made) == ["s-0"]
    made.lost("p")
    assert steps(made) == ["start p"]  # another for the one that died


def test_the_first_of_a_pool_is_its_most_urgent_ready_stage() -> None:
    made = schedule(stage("short", 1.0, pool="p"), stage("long", 5.0, pool="p"), cpus=0.0)
    for expected in ("long", "short"):
        assert made.first("p") == expected
        made.discard(expected)
    assert made.first("p") is None


def test_a_pool_has_its_minimum_of_actors_and_at_most_its_maximum() -> None:
    one = stage("s", 1.0, pool="p", min_replicas=2, max_replicas=3)
    assert steps(schedule(one, cpus=9.0)) == ["start p"] * 2
    many = [stage(f"s-{number}", 1.0, pool="p", max_replicas=3) for number in range(9)]
    assert steps(schedule(*many, cpus=9.0)) == ["start p"] * 3


def test_an_idle_actor_makes_way_for_a_stage_more_urgent_than_its_pools_next() -> None:
    p = [stage(f"p-{number}", 5.0, pool="p") for number in range(2)]
    for seconds, expected in ((2.0, ["p-1"]), (5.0 + 2 * START_SECONDS, ["end p", "start q"])):
        made = schedule(*p, stage("late", 1.0), stage("q", seconds, "late", pool="q"), cpus=1.0)
        assert steps(made) == ["late"]  # others wait for it
        made.returned("late", 1.0)
        made.discard("late")
        assert steps(made) == ["start p"]
        made.joined("p", 2.0)
        assert steps(made) == ["p-0"]
        made.returned("p-0", 3.0)
        made.add("q")
        assert steps(made) == expected


def test_of_idle_actors_one_without_work_makes_way_before_one_with_less_urgent_work() -> None:
    made = schedule(
        stage("p-0", 1.0, pool="p"), stage("p-1", 1.0, pool="p"), stage("q-0", 1.0, pool="q"),
        stage("r", 99.0, "p-0", "q-0", pool="r"), stage("reads", 1.0, "r"), cpus=2.0,
    )  # fmt: skip
    assert sorted(steps(made)) == ["start p", "start q"]
    for pool in ("p", "q"):
        made.joined(pool, 1.0)
    assert sorted(steps(made)) == ["p-0", "q-0"]
    for key in ("p-0", "q-0"):
        made.returned(key, 2.0)
        made.discard(key)
    made.add("r")
    assert steps(made, 2.0) == ["end q", "start r", "p-1"]


def test_an_idle_actor_ends_when_the_cluster_has_become_too_small_for_what_is_at_work() -> None:
    made = schedule(stage("p", 1.0, pool="p"), stage("at-work", 99.0), cpus=2.0)
    assert steps(made) == ["at-work", "start p"]
    made.joined("p", 1.0)
    assert steps(made, 1.0) == ["p"]
    made.returned("p", 2.0)
    made.discard("p")
    assert steps(made, 2.0) == []
    made.resize([{"CPU": 1.0}])
    assert steps(made, 2.0) == ["end p"]


def test_a_stage_fits_if_one_node_of_several_is_large_enough() -> None:
    made = schedule(*(stage(f"s-{number}", 1.0, cpus=4) for number in range(3)), cpus=0.0)
    made.resize([{"CPU": 1.0}, {"CPU": 8.0}])
    assert steps(made) == ["s-0", "s-1"]


def test_a_node_that_names_no_gpu_has_none() -> None:
    made = schedule(*(stage(f"s-{number}", 1.0, gpus=1) for number in range(3)), cpus=0.0)
    made.resize([{"CPU": 8.0}])
    assert steps(made) == ["s-0"]  # so that an autoscaler sees what waits


def test_an_actor_without_work_is_kept_for_a_while_or_until_its_place_is_needed() -> None:
    late = stage("late", 1.0, "wait")
    made = schedule(stage("p", 1.0, pool="p"), stage("wait", 1.0, "p"), late, cpus=1.0)
    assert steps(made) == ["start p"]
    made.joined("p", 1.0)
    assert steps(made) == ["p"]
    made.returned("p", 2.0)
    made.discard("p")
    assert steps(made, 3.0) == []
    made.add("wait")
    assert steps(made, 4.0) == ["end p", "wait"]
    made = schedule(stage("p", 1.0, pool="p"), cpus=1.0)
    steps(made)
    made.joined("p", 1.0)
    steps(made)
    made.returned("p", 2.0)
    made.discard("p")
    assert steps(made, 2.0 + IDLE_SECONDS) == []
    assert steps(made, 3.0 + IDLE_SECONDS) == ["end p"]


def test_a_cluster_without_room_gets_one_stage_of_each_lane_and_is_asked_for_all() -> None:
    made = schedule(
        *(stage(f"s-{number}", 1.0) for number in range(3)),
        *(stage(f"g-{number}", 1.0, gpus=1, pool="p") for number in range(2)), cpus=0.0,
    )  # fmt: skip
    assert steps(made) == ["s-0", "start p"]
    taken, ready = made.demand(most=10)
    assert taken == [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    assert ready == [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    assert made.demand(most=2)[1] == ready[:2]
    made.resize([{"CPU": 2.0}])
    assert steps(made) == ["s-1"]


def test_a_stage_that_fits_no_node_holds_nothing_up() -> None:
    made = schedule(
        stage("big", 99.0, cpus=8), stage("reads", 1.0, "big"), stage("leaf", 1.0), cpus=2.0
    )
    assert steps(made) == ["big", "leaf"]  # with Ray, `big` waits for a node


def test_the_demand_of_a_pool_is_bounded_by_its_maximum_of_actors() -> None:
    shards = [stage(f"s-{number}", 1.0, pool="p", max_replicas=3) for number in range(9)]
    made = schedule(*shards, cpus=1.0)
    assert steps(made) == ["start p"]
    taken, ready = made.demand(most=100)
    assert (len(taken), len(ready)) == (1, 2)


def test_the_demand_of_a_bounded_run_is_bounded() -> None:
    made = schedule(*(stage(f"s-{number}", 1.0) for number in range(9)), cpus=2.0, workers=3)
    assert len(steps(made)) == 2
    taken, ready = made.demand(most=100)
    assert (len(taken), len(ready)) == (2, 1)


def test_memory_is_a_resource_like_cpus() -> None:
    assert bundle(Resources(cpus=2, memory_bytes=5)) == {"CPU": 2.0, "memory": 5.0}
    made = schedule(*(stage(f"s-{n}", 1.0, memory_bytes=6) for n in range(3)), cpus=9.0)
    made.resize([{"CPU": 9.0, "memory": 12.0}])
    assert len(steps(made)) == 2


def test_a_stage_that_comes_back_has_its_old_rank() -> None:
    made = schedule(stage("a", 5.0), stage("b", 4.0), cpus=1.0)
    assert steps(made) == ["a"]
    made.returned("a", 1.0)
    made.add("a")
    assert steps(made) == ["a"]
    made.returned("a", 2.0)
    made.discard("a")
    made.discard("b")
    assert steps(made) == []


def test_a_simulated_grid_runs_every_stage_once_and_after_its_inputs() -> None:
    case = CASES[3]
    simulation = Simulation(case, START_SECONDS)
    simulation.run()
    times = simulation.times
    for key, each in case.graph.items():
        assert times[key].started >= times[key].ready
        assert times[key].ended == pytest.approx(times[key].started + case.seconds[key])
        assert all(times[name].ended <= times[key].started for name in each.inputs)
