"""Whether a Ray answers at an address. Its own client waits for 80 s, silently, and then exits."""

import os
import re
import socket

import grpc

ANSWER_SECONDS = 20.0
"""How long a Ray may take to answer."""


class NoRayError(RuntimeError):
    """There is no Ray at an address, or none can be started here; the message says what to do."""


def check_cluster_address(field: str, address: str) -> None:
    """See that a Ray answers at a cluster's address.

    Args:
        field: where the address is from, for the error.
        address: `host:6379` or `ray://host:10001`; others, such as `auto`, are left to Ray, which
            refuses them at once.

    Raises:
        NoRayError: if none does, or it is the address of a job server.
    """
    if address.startswith(("http://", "https://")):
        raise NoRayError(
            f"{field}: {address!r}: is a job server's address: use `submit --address {address}`, "
            "or give the cluster's own address, HOST:6379 or ray://HOST:10001"
        )
    if not answers(address):
        raise NoRayError(
            f"{field}: {address!r}: no Ray answers there within {ANSWER_SECONDS:g} s: see that the "
            "head runs, that the port is its own (6379, or 10001 with ray://), and that no "
            "firewall is between"
        )


def answers(address: str) -> bool:
    """Whether something like Ray answers at `host:port` or `ray://host:port`; true of all else."""
    place = address.removeprefix("ray://")
    if not re.fullmatch(r"[^\s/]+:\d+", place):
        return True
    try:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            host, _, port = place.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        else:
            with grpc.insecure_channel(place) as channel:
                grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
    except (OSError, grpc.FutureTimeoutError):
        return False
    return True
