import ipaddress
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from cluster import address as module
from cluster.address import NoRayError
from cluster.session import session, set_keepalive

PROGRAM = """
import json, os, psutil, ray
from cluster.session import session

class Replica:
    def visible(self):
        return {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")}

with session(None, variables={"HF_HUB_OFFLINE": "1"}):
    actor = ray.remote(Replica).options(num_cpus=0, num_gpus=0).remote()
    variables = ray.get(actor.visible.remote())
    listening = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                listening.append((process.name(), connection.laddr.ip))
print(json.dumps({"variables": variables, "listening": listening}))
"""


@pytest.fixture(scope="module")
def ray_started() -> dict[str, Any]:
    """Return the environment of a process with a local Ray, and the work of its actor."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept.pop("HF_HUB_OFFLINE", None)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, "CUDA_VISIBLE_DEVICES": "3,5"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_a_local_ray_listens_on_the_loopback_only(ray_started: dict[str, Any]) -> None:
    found = ray_started["listening"]
    assert {name for name, _ in found} >= {"gcs_server", "raylet"}
    assert [(name, ip) for name, ip in found if not _is_loopback(ip)] == []


def _is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1, on a socket of IPv6
    return (mapped or address).is_loopback


def test_a_replica_that_asks_for_no_gpu_sees_the_devices_of_its_node(
    ray_started: dict[str, Any],
) -> None:
    assert ray_started["variables"]["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_workers_get_the_requested_variables(ray_started: dict[str, Any]) -> None:
    assert ray_started["variables"]["HF_HUB_OFFLINE"] == "1"


@pytest.fixture
def no_ray_but_a_web_server() -> Iterator[str]:
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "no-such-host.invalid:6379"]
)
def test_a_dead_address_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RAY_ANSWER_SECONDS", 0.3)
    with pytest.raises(NoRayError, match="no Ray answers there") as caught, session(address):
        pass
    assert str(caught.value).startswith(f"address: {address!r}: ")
    assert len(str(caught.value)) < 300
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(NoRayError, match=r"^RAY_ADDRESS: "), session(None):
        pass


def test_a_port_of_another_server_is_no_ray(
    no_ray_but_a_web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RAY_ANSWER_SECONDS", 0.3)
    with pytest.raises(NoRayError, match="no Ray answers"), session(no_ray_but_a_web_server):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://head:8265", "is a job server's address: use `submit --address http://head:8265`"),
        ("https://head", "is a job server's address"),
        ("hello", "'hello': cannot join: Invalid address format"),
    ],
)
def test_an_address_of_another_kind_is_explained(
    ray_of_its_own: None, address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoRayError, match=message) as caught, session(address):
        pass
    assert len(str(caught.value)) < 300
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(NoRayError, match=message), session(None):
        pass


def test_a_temporary_folder_with_a_long_name_is_explained(
    ray_of_its_own: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 93)))
    message = r"TMPDIR: .*set RAY_TMPDIR to a short folder"
    with pytest.raises(NoRayError, match=message), session(None):
        pass


def test_a_driver_pings_no_more_often_than_nodes_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ping every 20 s a node that was started without that setting ended every task after
    83 s: a gRPC server allows one in five minutes."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", variables)
    set_keepalive()
    every, answer = (f"RAY_grpc_client_keepalive_{name}_ms" for name in ("time", "timeout"))
    assert int(variables.get(every, "300000")) >= 300_000
    assert int(variables[answer]) < 120_000
