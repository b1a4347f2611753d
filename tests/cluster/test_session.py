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
