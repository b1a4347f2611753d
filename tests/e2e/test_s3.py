"""A grid whose artifacts are on S3, on a cluster that loses a node."""

import os
import subprocess
import time
from pathlib import Path

import fsspec

from tests.e2e.conftest import Finished, command, environment
from tests.s3 import BUCKET, s3_server
from tests.soak.nodes import nodes

STORE = f"s3://{BUCKET}/tiny-grid"


def test_a_grid_on_a_throttled_s3_that_loses_a_node_leaves_the_local_table(
    finished: tuple[Path, Finished], grid: Path, tmp_path: Path
) -> None:
    """Some of the grid's cells, so that it takes less time; each line is one of the whole grid."""
    some = tmp_path / "tiny.yaml"
    text = grid.read_text().replace("[magnitude, wanda, sparsegpt]", "[magnitude, wanda]")
    some.write_text(text.replace("[pretraining, self-generated]", "pretraining"))
    with s3_server() as server, nodes(2) as cluster:
        server.every = 50
        run = subprocess.Popen(
            command("run", some, "--store", STORE, "--address", cluster.address),
            env=os.environ
            | {"PATH": environment()["PATH"]},  # the cluster's own, whatever guards it
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        s3 = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        deadline = time.monotonic() + 300
        while not s3.glob(f"{BUCKET}/tiny-grid/leases/prune-*"):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline, "no pruning has begun"
            time.sleep(0.1)
        busy = max(cluster.workers, key=lambda node: len(cluster.at_work_on(node, "Replica")))
        cluster.kill(busy)
        cluster.replace(busy)
        _, errors = run.communicate(timeout=600)
        assert run.returncode == 0, errors
        assert server.refused > 0
        server.every = 0
        table = s3.cat_file(f"{BUCKET}/tiny-grid/results/tiny.csv").decode().splitlines()
    whole = (finished[0] / "results/tiny.csv").read_text().splitlines()
    assert len(table) > 5
    assert set(table) <= set(whole)
