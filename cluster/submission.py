"""Jobs on a cluster through Ray's job server: submit, follow, inspect, stop."""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import aiohttp
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.address import RAY_ANSWER_SECONDS, answers

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 600.0
"""How long a job server may be unreachable before following a job is given up."""

SILENCE_SECONDS = 120.0
"""After so long without output a connection counts as dead and is opened again."""

RECONNECT_SECONDS = 1.0
"""Between two connections."""

SERVER_VARIABLE = "RAY_API_SERVER_ADDRESS"

Client: TypeAlias = JobSubmissionClient
Write = Callable[[str], object]

_NAMES_REMEDY = "`ray job list` names the jobs that the cluster knows"


class JobServerError(RuntimeError):
    """The job server cannot do what was asked; the message has the reason and the remedy."""


def connect(address: str | None) -> Client:
    """Connect to a job server.

    Args:
        address: `http://host:8265`; None takes `RAY_API_SERVER_ADDRESS`, `RAY_ADDRESS` or the
            cluster of this machine.

    Raises:
        JobServerError: if it does not answer.
    """
    if address is not None:
        os.environ[SERVER_VARIABLE] = address  # otherwise the variable would win
    asked = os.environ.get(SERVER_VARIABLE) or os.environ.get("RAY_ADDRESS", "auto")
    if not answers(asked):
        raise JobServerError(
            f"address: {asked!r}: nothing answers there within {RAY_ANSWER_SECONDS:g} s: give the "
            "job server's address, http://HOST:8265, and check that the head runs"
        )
    with _explained("check --address, and that the head runs and its port 8265 is forwarded"):
        return Client(address)


def submit_job(
    client: Client, job: str, words: Sequence[str], folder: Path, requirements: Sequence[str] = ()
) -> None:
    """Start a command on the cluster.

    Args:
        job: a new name, valid in file names and URLs.
        words: the command.
        folder: copied to every node, where it is the command's working directory.
        requirements: Python packages to install for this job.

    Raises:
        JobServerError: if the server refuses it.
    """
    environment: dict[str, object] = {"working_dir": str(folder)}
    if requirements:
        environment["pip"] = list(requirements)
    with _explained("look into the log of the cluster's job server"):
        client.submit_job(entrypoint=shlex.join(words), submission_id=job, runtime_env=environment)


def job_details(client: Client, job: str) -> JobDetails:
    """Return what the server knows of a job. Do not print its runtime environment.

    Raises:
        JobServerError: if there is no such job.
    """
    with _explained(_NAMES_REMEDY):
        return client.get_job_info(job)


def job_log(client: Client, job: str) -> str:
    """Return the job's log so far.

    Raises:
        JobServerError: if there is no such job, or its node is gone.
    """
    with _explained(_NAMES_REMEDY):
        text: str = client.get_job_logs(job)
        return text


def stop_job(client: Client, job: str) -> bool:
    """Ask a job to end; return False if it had already ended.

    Raises:
        JobServerError: if there is no such job.
    """
    with _explained(_NAMES_REMEDY):
        stopped: bool = client.stop_job(job)
        return stopped


def follow_job(client: Client, job: str, write: Write) -> int:
    """Write a job's log as it grows, each character once, and return the job's exit code.

    Reopens a connection that is lost or silent for too long, and continues the log where it
    stopped.

    Raises:
        JobServerError: if there is no such job, or the server stays unreachable.
    """
    log = _Log(write)
    answered = time.monotonic()
    lost = False
    while True:
        try:
            found = client.get_job_info(job)
            if found.status.is_terminal():
                return _finish(client, job, found, log)
            answered, lost = time.monotonic(), False
            asyncio.run(_tail(client, job, log))
        except AuthenticationError as error:
            raise JobServerError(str(error)) from error
        except (requests.RequestException, aiohttp.ClientError, OSError, RuntimeError) as error:
            if "status code 404" in str(error):
                raise JobServerError(
                    f"job {job}: the cluster does not know it, or no longer: "
                    "submit the grid again; the store has what was made"
                ) from error
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise JobServerError(
                    f"job {job}: its server has not answered for {PATIENCE_SECONDS:.0f} s; "
                    "the job may still run: ask `jobs logs` later"
                ) from error
            if not lost:
                logger.warning("the connection to the cluster was lost; trying again")
            lost = True
        time.sleep(RECONNECT_SECONDS)


def _finish(client: Client, job: str, found: JobDetails, log: "_Log") -> int:
    """Write the rest of an ended job's log and return the exit code."""
    try:
        log.write_new(client.get_job_logs(job))
    except (requests.RequestException, RuntimeError):
        logger.warning("the end of the log is lost with the job's node")
    if found.status != JobStatus.SUCCEEDED:
        logger.error("job %s: %s: %s", job, found.status.value.lower(), found.message)
    if found.driver_exit_code is not None:
        return int(found.driver_exit_code)
    return int(found.status != JobStatus.SUCCEEDED)


async def _tail(client: Client, job: str, log: "_Log") -> None:
    """Write the log until the server closes the connection or is silent for too long."""
    lines = client.tail_job_logs(job)  # always from the log's beginning
    position = 0
    try:
        while True:
            text = await asyncio.wait_for(anext(lines), SILENCE_SECONDS)
            position += len(text)
            log.write_new(text, position)
    except (StopAsyncIteration, TimeoutError):
        pass
    finally:
        await lines.aclose()


class _Log:
    """A log that is read from several connections and written once."""

    def __init__(self, write: Write) -> None:
        self.write = write
        self.position = 0

    def write_new(self, text: str, end: int | None = None) -> None:
        """Write what is new of a piece of the log.

        Args:
            end: the piece's end in the log; by default it is the whole log.
        """
        end = len(text) if end is None else end
        if end > self.position:
            self.write(text[self.position - end :])
            self.position = end


@contextmanager
def _explained(remedy: str) -> Iterator[None]:
    """Turn the client's errors into one line with a remedy."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
        ValueError,
        requests.RequestException,
        AuthenticationError,
    ) as error:
        reason = [line for line in str(error).strip().splitlines() if line.strip()]
        last = reason[-1] if reason else type(error).__name__
        raise JobServerError(f"job server: {last}; {remedy}") from error
