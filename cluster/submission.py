"""Jobs on a cluster through Ray's job server: submit, follow, ask, stop."""

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

from cluster.address import ANSWER_SECONDS, answers

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 600.0
"""How long a job server may be out of reach before a job is followed no longer."""

SILENCE_SECONDS = 120.0
"""After so long without a line, a connection is taken for dead and made anew."""

POLL_SECONDS = 1.0

SERVER_VARIABLE = "RAY_API_SERVER_ADDRESS"

Client: TypeAlias = JobSubmissionClient
Write = Callable[[str], object]


class JobServerError(RuntimeError):
    """The job server cannot do what was asked; the message says why and what to do."""


def connect(address: str | None) -> Client:
    """A client of the job server.

    Args:
        address: `http://host:8265`; None takes `RAY_API_SERVER_ADDRESS`, `RAY_ADDRESS` or the
            cluster of this machine.

    Raises:
        JobServerError: if it does not answer.
    """
    if address is not None:
        os.environ[SERVER_VARIABLE] = address  # which would win over what is asked for
    asked = os.environ.get(SERVER_VARIABLE) or os.environ.get("RAY_ADDRESS", "auto")
    if not answers(asked):
        raise JobServerError(
            f"address: {asked!r}: nothing answers there within {ANSWER_SECONDS:g} s: give the job "
            "server's address, http://HOST:8265, and see that the head runs"
        )
    with _explained("check --address, and that the head runs and its port 8265 is forwarded"):
        return Client(address)


def submit(
    client: Client, job: str, words: Sequence[str], folder: Path, requirements: Sequence[str] = ()
) -> None:
    """Start a command on the cluster.

    Args:
        job: a new name, for files and addresses.
        folder: is copied to every node, and is the command's working directory there.
        requirements: Python packages to install for this job, beside those of the nodes.

    Raises:
        JobServerError: if the server refuses it.
    """
    environment: dict[str, object] = {"working_dir": str(folder)}
    if requirements:
        environment["pip"] = list(requirements)
    with _explained("see what the cluster's job server says"):
        client.submit_job(entrypoint=shlex.join(words), submission_id=job, runtime_env=environment)


def details(client: Client, job: str) -> JobDetails:
    """What the server knows of a job. (Its runtime environment is not for printing.)

    Raises:
        JobServerError: if there is no such job.
    """
    with _explained("`ray job list` names the jobs that the cluster knows"):
        return client.get_job_info(job)


def log(client: Client, job: str) -> str:
    """The job's log so far.

    Raises:
        JobServerError: if there is no such job, or its node is gone.
    """
    with _explained("`ray job list` names the jobs that the cluster knows"):
        text: str = client.get_job_logs(job)
        return text


def stop(client: Client, job: str) -> bool:
    """Ask a job to end; False if it had ended.

    Raises:
        JobServerError: if there is no such job.
    """
    with _explained("`ray job list` names the jobs that the cluster knows"):
        stopped: bool = client.stop_job(job)
        return stopped


def follow(client: Client, job: str, write: Write) -> int:
    """Write a job's log as it comes, each character once, and return the job's exit code.

    A connection that is lost, or silent for too long, is made anew and goes on where the log was
    left.

    Raises:
        JobServerError: if there is no such job, or the server stays out of reach.
    """
    written = _Written(write)
    answered = time.monotonic()
    lost = False
    while True:
        try:
            found = client.get_job_info(job)
            if found.status.is_terminal():
                return _last(client, job, found, written)
            answered, lost = time.monotonic(), False
            asyncio.run(_tail(client, job, written))
        except AuthenticationError as error:
            raise JobServerError(str(error)) from error
        except (requests.RequestException, aiohttp.ClientError, OSError, RuntimeError) as error:
            if "status code 404" in str(error):
                raise JobServerError(
                    f"job {job}: the cluster does not know it (any more); "
                    "submit the grid again: what was made is in the store"
                ) from error
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise JobServerError(
                    f"job {job}: its server has not answered for {PATIENCE_SECONDS:.0f} s; "
                    "the job may go on without: ask `jobs logs` later"
                ) from error
            if not lost:
                logger.warning("the connection to the cluster was lost; trying again")
            lost = True
        time.sleep(POLL_SECONDS)


def _last(client: Client, job: str, found: JobDetails, written: "_Written") -> int:
    """Write what is left of the log of a job that has ended."""
    try:
        written.whole(client.get_job_logs(job))
    except (requests.RequestException, RuntimeError):
        logger.warning("the end of the log is lost with the job's node")
    if found.status != JobStatus.SUCCEEDED:
        logger.error("job %s: %s: %s", job, found.status.value.lower(), found.message)
    if found.driver_exit_code is not None:
        return int(found.driver_exit_code)
    return int(found.status != JobStatus.SUCCEEDED)


async def _tail(client: Client, job: str, written: "_Written") -> None:
    """Write the log until the server ends the connection, or it is silent for too long."""
    lines = client.tail_job_logs(job)  # always from the log's beginning
    position = 0
    try:
        while True:
            text = await asyncio.wait_for(anext(lines), SILENCE_SECONDS)
            position += len(text)
            written.up_to(position, text)
    except (StopAsyncIteration, TimeoutError):
        pass
    finally:
        await lines.aclose()


class _Written:
    """How much of a log has been written."""

    def __init__(self, write: Write) -> None:
        self.write = write
        self.position = 0

    def whole(self, text: str) -> None:
        """Write what is new of the whole log."""
        self.up_to(len(text), text)

    def up_to(self, end: int, text: str) -> None:
        """Write what is new of a piece of the log that ends there."""
        if end > self.position:
            self.write(text[self.position - end :])
            self.position = end


@contextmanager
def _explained(remedy: str) -> Iterator[None]:
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
