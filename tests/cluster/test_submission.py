"""Following a log from a job server that fails in ways a real one cannot be made to fail."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from ray.job_submission import JobStatus

from cluster import address as cluster_address
from cluster import submission
from cluster.submission import JobServerError, follow_job


class Server:
    """Each entry is one connection: an error, or how much of the log it sends before it breaks."""

    def __init__(self, turns: list[Any], log: str) -> None:
        self.turns = iter(turns)
        self.log = log

    def get_job_info(self, job: str) -> Any:
        self.turn = next(self.turns, None)
        if isinstance(self.turn, Exception):
            raise self.turn
        status = JobStatus.SUCCEEDED if self.turn is None else JobStatus.RUNNING
        return SimpleNamespace(status=status, message="", driver_exit_code=0)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        text = self.log[: self.turn]
        for start in range(0, len(text), 5):
            yield text[start : start + 5]

    def get_job_logs(self, job: str) -> str:
        return self.log


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "RECONNECT_SECONDS", 0.0)


@pytest.mark.parametrize(
    "turns", [[], [7], [0, 12, 3], [4, requests.ConnectionError("gone"), 9], [RuntimeError("500")]]
)
def test_a_log_is_written_once_from_beginning_to_end(turns: list[Any]) -> None:
    log = "one\ntwo\nthree\n"
    written: list[str] = []
    assert follow_job(Server(turns, log), "job", written.append) == 0
    assert "".join(written) == log


def test_a_server_that_stays_unreachable_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submission, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(JobServerError, match="ask `jobs logs` later"):
        follow_job(Server([requests.ConnectionError("gone")], ""), "job", print)


def test_a_job_lost_with_its_head_must_be_submitted_again() -> None:
    unknown = RuntimeError("Request failed with status code 404: no such job")
    with pytest.raises(JobServerError, match="submit the grid again"):
        follow_job(Server([3, unknown], "one\n"), "job", lambda text: None)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_dead_cluster_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_address, "RAY_ANSWER_SECONDS", 2.0)
    monkeypatch.setenv(submission.SERVER_VARIABLE, "")  # as it is set back at the end
    with pytest.raises(JobServerError, match=f"address: '{address}': nothing answers") as caught:
        submission.connect(address)
    assert len(str(caught.value)) < 300
