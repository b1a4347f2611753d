"""Nodes in network namespaces, an S3 server beside the head, and cut cables between them."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from cluster.store import Store
from tests.soak import stand_in
from tests.soak.nodes import PROJECT, finish, wait_until

HEAD, FIRST, SECOND = "calprune-head", "calprune-one", "calprune-two"
ADDRESSES = {HEAD: "10.231.6.1", FIRST: "10.231.7.2", SECOND: "10.231.9.2"}
CABLES = [
    [(HEAD, "calprune-h1", "10.231.7.1"), (FIRST, "calprune-n1", ADDRESSES[FIRST])],
    [(HEAD, "calprune-h2", "10.231.9.1"), (SECOND, "calprune-n2", ADDRESSES[SECOND])],
]
TO_TEST = [(HEAD, "calprune-s", "10.231.8.1"), (None, "calprune-t", "10.231.8.2")]
"""The cable by which the test itself reaches the store."""
S3_PORT = "9000"
S3 = {
    "AWS_ENDPOINT_URL": f"http://{ADDRESSES[HEAD]}:{S3_PORT}",
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
}
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}
"""A node and a connection count as lost after seconds instead of half a minute."""


@pytest.fixture
def namespaces() -> Iterator[None]:
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("network namespaces need iproute2 and root")
    words = [["netns", "add", name] for name in ADDRESSES]
    for (head, one, _), (other, two, _) in (*CABLES, TO_TEST):
        words.append(["-n", head, "link", "add", one, "type", "veth", "peer", "name", two])
        words[-1] += ["netns", other or str(os.getpid())]
    for name, end, address in itertools.chain(*CABLES, TO_TEST):
        where = ["-n", name] if name else []
        words.append([*where, "link", "set", "lo", "up"])
        words.append([*where, "addr", "add", f"{address}/24", "dev", end])
        words.append([*where, "link", "set", end, "up"])
    words.append(["-n", HEAD, "addr", "add", f"{ADDRESSES[HEAD]}/32", "dev", "lo"])
    for (_, _, gateway), (name, _, _) in CABLES:  # to the head, and through it to each other
        words.append(["-n", name, "route", "add", "default", "via", gateway])
    forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
    words.append(["netns", "exec", HEAD, "sh", "-c", forward])
    try:
        for each in words:
            made = subprocess.run(["ip", *each], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"network namespaces are not permitted: {made.stderr.strip()}")
        yield
    finally:
        # A namespace that is deleted takes its ends of cables with it, but only some time later.
        subprocess.run(["ip", "link", "delete", TO_TEST[1][1]], capture_output=True)
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def store(namespaces: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store in S3, whose server is on the head's side of the cable."""
    words = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", S3_PORT]
    server = inside(HEAD, *words, output=subprocess.DEVNULL)
    endpoint = f"http://{TO_TEST[0][2]}:{S3_PORT}"
    for name, value in {**S3, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    try:
        wait_until(lambda: answers(endpoint))
        S3FileSystem.clear_instance_cache()  # those of other tests go to another server
        S3FileSystem().mkdir("namespaces")
        yield Store("s3://namespaces/store")
    finally:
        S3FileSystem.clear_instance_cache()
        server.kill()
        server.wait()


def answers(endpoint: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(endpoint, timeout=5):
        return True
    return False


def inside(name: str, *words: str, output: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start a process on one side of the cable."""
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *words],
        cwd=PROJECT,
        env={**os.environ, **QUICK, **S3, "PYTHONPATH": str(PROJECT), "RAY_AUTH_MODE": "disabled"},
        stdout=output,
        stderr=output,
        text=True,
    )


def start(name: str, *options: str) -> subprocess.Popen[str]:
    """Start a node in the foreground, so that ending it ends no other Ray on the machine, and wait
    until it has joined the cluster."""
    ray = str(Path(sys.executable).with_name("ray"))
    address = f"--node-ip-address={ADDRESSES[name]}"
    node = inside(name, ray, "start", "--block", address, *options)
    assert node.stdout is not None
    assert any("Ray runtime started" in line for line in node.stdout), node.communicate()
    return node


def cut(name: str) -> None:
    """Cut the cable of a node."""
    end = next(end for _, (other, end, _) in CABLES if other == name)
    subprocess.run(["ip", "-n", name, "link", "set", end, "down"], check=True)


def test_reachable_nodes_do_the_work_of_nodes_behind_cut_cables(
    store: Store, tmp_path: Path
) -> None:
    """One is cut while an actor is at work there, then another one while a task is. Only the node
    that is cut next has room, so the stage is there for certain. It may still finish its stages
    while others make them again: the table is the same."""
    log = tmp_path / "log"
    address = f"{ADDRESSES[HEAD]}:6379"
    options = ["--address", address, "--store", store.url, "--log", str(log), "--seconds", "2"]
    head = ["--head", "--port=6379", "--include-dashboard=false"]
    joining = [f"--address={address}", "--num-cpus=2"]
    started = [start(HEAD, *head, "--num-cpus=0")]
    try:
        started.append(start(FIRST, *joining))
        driver = inside(HEAD, sys.executable, "-m", "tests.soak.drive", *options)
        started.append(driver)

        def at_work(kind: str) -> bool:
            done = store.keys()
            began = stand_in.executions(log)
            return any(each.key.startswith(kind) and each.key not in done for each in began)

        for kind, there, following in (("generate", FIRST, SECOND), ("evaluate", SECOND, HEAD)):
            wait_until(lambda kind=kind: driver.poll() is not None or at_work(kind))
            assert driver.poll() is None, driver.communicate()
            cut(there)
            started.append(start(following, *joining))
        repeated = {key.partition("-")[0] for key in finish(driver)["repeated"]}
        assert {"generate", "evaluate"} <= repeated
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.communicate(timeout=60)
    began = {each.key for each in stand_in.executions(log)}
    assert began == set(stand_in.grid(log, 0.0)) == store.keys()
    assert len(stand_in.table(store).splitlines()) == stand_in.CELLS
    assert store.damaged(store.keys(), whole=True) == {}
