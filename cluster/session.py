"""A connection to Ray: a local Ray without set-up, or a named cluster."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import ray
from ray._private import ray_constants

from cluster.address import NoRayError, check_cluster_address
from cluster.credentials import has_credentials, set_credentials
from cluster.graph import Resources
from cluster.schedule import Bundle, bundle, places

logger = logging.getLogger(__name__)

KEEP_DEVICES = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""With the value 0, Ray leaves CUDA_VISIBLE_DEVICES alone for stages that ask for no GPU."""

KEEPALIVE = {"RAY_grpc_client_keepalive_timeout_ms": "20000"}
"""How long a driver waits for the answer to a ping before it counts a connection as dead, as behind
a cut cable; by Ray's own value two minutes. It pings every five minutes. With pings more often than
that, workers of nodes that were not started with the same setting end the connection, and with it
every stage that takes longer than three pings."""


class ResourceError(RuntimeError):
    """A stage asks for more than any node has."""


@contextlib.contextmanager
def session(
    address: str | None,
    code: Iterable[ModuleType] = (),
    variables: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Connect to Ray, and disconnect at the end.

    Args:
        address: a cluster (`auto`, `host:6379`, `ray://host:10001`). None joins the cluster of a
            submitted job, and otherwise starts a local Ray.
        code: packages that workers of a named cluster need; a submitted job has them in its working
            directory.
        variables: environment variables of the workers.

    Raises:
        NoRayError: if no Ray answers at the address, or none can be started here.
    """
    submitted = "RAY_ADDRESS" in os.environ
    named = address or os.environ.get("RAY_ADDRESS")
    if named:
        check_cluster_address("address" if address else "RAY_ADDRESS", named)
    set_keepalive()
    runtime_env: dict[str, Any] = {}
    if address and not submitted:
        runtime_env["py_modules"] = list(code)
    if KEEP_DEVICES not in os.environ:  # otherwise workers get it from the job or the nodes
        os.environ[KEEP_DEVICES] = "0"
        if address or submitted:
            runtime_env["env_vars"] = {KEEP_DEVICES: "0"}
    if variables:
        runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **variables}
    if submitted and has_credentials():
        runtime_env["worker_process_setup_hook"] = (
            f"{set_credentials.__module__}.{set_credentials.__name__}"
        )
    with contextlib.nullcontext() if address or submitted else _on_loopback():
        with _explained(named):
            ray.init(
                # Without an address never join a cluster that `ray start` left running.
                address=address or (None if submitted else "local"),
                runtime_env=runtime_env or None,
                include_dashboard=None if address or submitted else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        try:
            yield
        finally:
            ray.shutdown()


def set_keepalive() -> None:
    """Set `KEEPALIVE` for a connection that this process makes, unless the user has set it."""
    for name, value in KEEPALIVE.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _explained(named: str | None) -> Iterator[None]:
    """Turn Ray's errors into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if "AF_UNIX" in reason:
            name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
            raise NoRayError(
                f"{name}: {os.environ.get(name)!r}: too long for the names of Ray's sockets: "
                "set RAY_TMPDIR to a short folder, such as /tmp"
            ) from error
        where = f"address: {named!r}" if named else "Ray"
        raise NoRayError(f"{where}: cannot join: {reason[:200]}") from error


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Have a Ray that is started in the block listen on the loopback only.

    On Linux Ray listens on the machine's own address even if it is given the loopback's. On systems
    for which it has no clusters it takes the loopback's, so make it believe that this is one.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        os.environ.pop(name)
        if before[0] is not None:
            os.environ[name] = before[0]
        ray_constants.ENABLE_RAY_CLUSTER = before[1]


def alive_nodes() -> list[Bundle]:
    """Return the resources of each node of the cluster, as Ray names them."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def nodes_may_grow(nodes: Sequence[Bundle]) -> bool:
    """Return whether nodes may join: a cluster's, but not a local Ray's."""
    return "RAY_ADDRESS" in os.environ or len(nodes) != 1


def check_resources(wanted: Mapping[str, Resources]) -> None:
    """Check that some node can hold each kind of stage.

    Raises:
        ResourceError: if none can. On a cluster that may grow this is only a warning.
    """
    nodes = alive_nodes()
    grows = nodes_may_grow(nodes)
    for kind, resources in wanted.items():
        there = places(nodes, bundle(resources))
        if 0 < there < resources.actors:
            _refuse(
                f"resources.{kind}.actors: {resources.actors}: the cluster has room for {there}; "
                "lower it or add nodes",
                grows,
            )
        for field, name, amount in (
            ("cpus", "CPU", float(resources.cpus)),
            ("gpus", "GPU", resources.gpus),
        ):
            largest = max((node.get(name, 0.0) for node in nodes), default=0.0)
            if amount <= largest:
                continue
            _refuse(
                f"resources.{kind}.{field}: {amount:g}: the largest node has {largest:g} {name}; "
                "lower it or add a node",
                grows,
            )


def _refuse(message: str, grows: bool) -> None:
    if not grows:
        raise ResourceError(message)
    logger.warning("%s (waiting for the cluster to grow)", message)
