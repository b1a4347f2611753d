import contextlib
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pytest

from tests.e2e.conftest import (
    RAY,
    Finished,
    Head,
    begin,
    calprune,
    command,
    environment,
)
from tests.s3 import S3Server

SECRET = "planted-secret-0123456789"


class Line:
    """A connection to a server that can be cut."""

    def __init__(self, server: str) -> None:
        host, port = server.removeprefix("http://").split(":")
        self.server = host, int(port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.ends: list[socket.socket] = []
        self.up = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float) -> None:
        """Drop all connections, and take none for so long."""
        self.up = False
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self.up = True

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            if not self.up:
                near.close()
                continue
            far = socket.create_connection(self.server)
            self.ends += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_a_log_goes_on_where_a_lost_connection_left_it_and_ends_with_the_jobs_exit_code(
    ray_head: Head, tmp_path: Path
) -> None:
    program = tmp_path / "count.py"
    program.write_text(
        "import time\n"
        "for n in range(150): print('line', n, flush=True); time.sleep(0.04)\n"
        "raise SystemExit(3)"
    )
    submit = [RAY, "job", "submit", "--address", ray_head.address, "--no-wait"]
    submit += ["--submission-id", "counting", "--", "python", str(program)]
    subprocess.run(submit, env=environment(), check=True, capture_output=True)
    line = Line(ray_head.address)
    follower = subprocess.Popen(
        command("logs", "counting", "--address", line.address),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    seen = iter(follower.stdout.readline, "")
    first = [next(text for text in seen if text == "line 20\n")]
    line.cut(seconds=2)
    rest = [*first, *follower.stdout.readlines()]
    assert rest == [f"line {number}\n" for number in range(20, 150)]
    assert follower.wait(timeout=60) == 3
    assert follower.stderr is not None
    assert "connection to the cluster was lost" in follower.stderr.read()
    asked = calprune("status", "counting", "--address", ray_head.address)
    assert "counting: failed" in asked.stdout
    stopped = calprune("stop", "counting", "--address", ray_head.address)
    assert "counting had ended" in stopped.stdout
    unknown = calprune("logs", "nobody", "--address", ray_head.address)
    assert unknown.returncode == 2
    assert "nobody" in unknown.stderr
    assert "Traceback" not in unknown.stderr


@pytest.fixture
def throttled() -> Iterator[tuple[S3Server, dict[str, str]]]:
    """An S3 server with a bucket, and the environment by which it is reached."""
    server = S3Server()
    variables = {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "calprune",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    _client(variables).create_bucket(Bucket="bucket")
    server.every = 50
    yield server, variables
    server.stop()


def _client(variables: dict[str, str]):
    return boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name=variables["AWS_DEFAULT_REGION"],
    )


def _names(s3, prefix: str) -> list[str]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=f"store/{prefix}")
    return [item["Key"] for page in pages for item in page.get("Contents", ())]


def _content(s3, name: str) -> bytes:
    return s3.get_object(Bucket="bucket", Key=name)["Body"].read()


def _join(head: Head) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [RAY, "start", "--address", head.join, "--block", "--num-cpus=1"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _workers(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The node's processes that are making a stage."""
    found = []
    for process in psutil.Process(node.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if re.match(r"ray::(make_artifact|Replica\.make)", title):
                found.append(process)
    return found


def _kill(node: subprocess.Popen[bytes]) -> None:
    for process in [
        *psutil.Process(node.pid).children(recursive=True),
        psutil.Process(node.pid),
    ]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    node.wait()


def test_a_submitted_grid_outlives_a_node_and_leaves_its_table_in_a_throttled_s3_and_no_secret(
    finished: tuple[Path, Finished],
    tmp_path: Path,
    grid: Path,
    ray_head: Head,
    throttled: tuple[S3Server, dict[str, str]],
) -> None:
    server, variables = throttled
    url = "s3://bucket/store"
    s3 = _client(variables)
    calibrated = ("shard", "generate", "score", "filter", "windows")
    begun = begin(finished[0], tmp_path / "begun", *calibrated)
    for path in begun.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), "bucket", f"store/{path.relative_to(begun)}")
    refused = server.refused
    node = _join(ray_head)
    words = ["submit", grid, "--store", url, "--address", ray_head.address]
    for name in variables:
        words += ["--env", name]
    run = subprocess.Popen(
        command(*words),
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output: list[str] = []
    assert run.stdout is not None
    reader = threading.Thread(target=lambda: output.extend(run.stdout or ()))
    reader.start()
    try:
        deadline = time.monotonic() + 240
        # Half of the prunings are there, and the node is at work.
        while len(_names(s3, "manifests/prune-")) < 3 or not _workers(node):
            assert run.poll() is None, "the run ended before its node: " + "".join(output)
            assert time.monotonic() < deadline, "the run made no progress: " + "".join(output)
            time.sleep(0.2)
    finally:
        _kill(node)
    code = run.wait(timeout=240)
    reader.join()
    log = "".join(output)
    assert code == 0, log
    assert server.refused > refused
    server.every = 0
    assert _content(s3, "store/results/tiny.csv") == (finished[0] / "results/tiny.csv").read_bytes()
    assert "bucket/store/results/tiny.parquet" in log
    assert SECRET not in log
    stored = _names(s3, "")
    assert any("/manifests/evaluate-" in name for name in stored)
    for name in stored:
        assert SECRET.encode() not in _content(s3, name), name
    logs = [path for path in ray_head.folder.glob("session_*/logs/**/*") if path.is_file()]
    assert any(path.name.startswith("job-driver-") for path in logs)
    for path in logs:
        assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--store", "relative"], "give an absolute path or a URL"),
        (["--store", "/no-store", "--env", f"TOKEN={SECRET}"], "give only the name of a variable"),
        (["--store", "/no-store", "--address", "http://127.0.0.1:9"], "check --address"),
    ],
)
def test_what_cannot_be_submitted_is_refused_without_a_traceback(
    grid: Path, words: list[str], message: str, ray_head: Head
) -> None:
    run = subprocess.run(
        command("submit", grid, *words),
        env={**environment(), "RAY_API_SERVER_ADDRESS": ray_head.address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2, run.stderr
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert SECRET not in run.stdout + run.stderr


def test_a_job_finds_a_finished_store_and_refuses_one_that_would_be_lost_with_it(
    finished: tuple[Path, Finished], grid: Path, ray_head: Head
) -> None:
    """As a user submits it with Ray's own command."""
    project = Path(__file__).parents[2]
    run = f"python -m jobs run {grid} --store"
    submit: list[str | Path] = [RAY, "job", "submit", "--address", ray_head.address]
    submit += ["--working-dir", project, "--"]
    submit += ["sh", "-c", f"{run} store; test $? = 2 && {run} {finished[0]}"]
    job = subprocess.run(submit, env=environment(), capture_output=True, text=True)
    log = " ".join((job.stdout + job.stderr).split())
    assert job.returncode == 0, log
    assert "give an absolute path or a URL" in log
    assert "0 to make" in log
