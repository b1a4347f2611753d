import ipaddress
import json
import os
import subprocess
import sys

PROGRAM = """
import os, ray
from cluster.session import session

class Replica:
    def visible(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES")

with session(None):
    actor = ray.remote(Replica).options(num_cpus=0, num_gpus=0).remote()
    print(ray.get(actor.visible.remote()))
"""


LISTENING = """
import ipaddress, json, psutil, ray
from cluster.session import session

with session(None):
    ray.get(ray.remote(lambda: None).remote())
    found = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.append((process.name(), connection.laddr.ip))
print(json.dumps(found))
"""


def test_a_local_ray_listens_on_the_loopback_only() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", LISTENING], env=kept, capture_output=True, text=True
    )
    found = json.loads(run.stdout)
    assert {name for name, _ in found} >= {"gcs_server", "raylet"}, run.stderr
    assert [(name, ip) for name, ip in found if not _is_loopback(ip)] == []


def _is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1, on a socket of IPv6
    return (mapped or address).is_loopback


def test_a_replica_that_asks_for_no_gpu_sees_the_devices_of_its_node() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, "CUDA_VISIBLE_DEVICES": "3,5"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "3,5", run.stderr


def test_workers_get_the_variables_that_are_asked_for() -> None:
    program = PROGRAM.replace("session(None)", "session(None, variables={'HF_HUB_OFFLINE': '1'})")
    program = program.replace("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept.pop("HF_HUB_OFFLINE", None)
    run = subprocess.run([sys.executable, "-c", program], env=kept, capture_output=True, text=True)
    assert run.stdout.strip() == "1", run.stderr
