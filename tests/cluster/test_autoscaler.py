from typing import Any

import pytest
import ray
from ray.autoscaler.sdk import request_resources

from cluster import autoscaler
from cluster.autoscaler import REQUEST_SECONDS, RoomRequest

ONE = {"CPU": 1.0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the sizes of the requests that were made."""
    made: list[int] = []
    monkeypatch.setattr(autoscaler, "request_resources", lambda bundles: made.append(len(bundles)))
    return made


def test_requests_halve_from_everything_to_one_stage_and_begin_again(asked: list[int]) -> None:
    request = RoomRequest()
    for number in range(5):
        request.update([ONE] * 2, [ONE] * 8, number * REQUEST_SECONDS)
        request.update([ONE] * 2, [ONE] * 8, number * REQUEST_SECONDS + 1.0)  # too soon
    assert asked == [2 + 8, 2 + 4, 2 + 2, 2 + 1, 2 + 8]


def test_a_request_is_withdrawn_once_when_nothing_waits(asked: list[int]) -> None:
    request = RoomRequest()
    request.update([ONE], [], 0.0)
    request.withdraw()
    assert asked == []
    request.update([], [ONE], 1.0)
    request.update([ONE], [], 2.0)
    request.withdraw()
    assert asked == [1, 0]


@pytest.mark.usefixtures("local_ray")
def test_a_cluster_without_an_autoscaler_accepts_any_request() -> None:
    before = ray.cluster_resources()["CPU"]
    request_resources(bundles=[{"CPU": 1.0}, {"CPU": 64.0, "GPU": 8.0}])
    assert ray.get(ray.remote(lambda: "done").remote()) == "done"
    assert ray.cluster_resources()["CPU"] == before
    request_resources(bundles=[])
