"""Whether a Ray answers at an address. Ray's own client waits silently for 80 s and then exits."""

import os
import re
import socket

import grpc

RAY_ANSWER_SECONDS = 20.0
"""How long a Ray may take to answer."""


class NoRayError(RuntimeError):
    """No Ray answers at an address, or none can be started here; the message has the remedy."""


def check_cluster_address(field: str, address: str) -> None:
    """Check that a Ray answers at a cluster's address.

    Args:
        field: where the address comes from, for the message.
        address: `host:6379` or `ray://host:10001`; any other, such as `auto`, is left to Ray, which
            refuses it at once.

    Raises:
        NoRayError: if no Ray answers, or the address is a job server's.
    """
    if address.startswith(("http://", "https://")):
        raise NoRayError(
            f"{field}: {address!r}: is a job server's address: use `submit --address {address}`, "
            "or give the cluster's own address, HOST:6379 or ray://HOST:10001"
        )
    if not answers(address):
        raise NoRayError(
            f"{field}: {address!r}: no Ray answers there within {RAY_ANSWER_SECONDS:g} s: check "
            "that the head runs, that the port is 6379 (10001 with ray://), and that no firewall "
            "blocks it"
        )


def answers(address: str) -> bool:
    """Return whether a Ray answers at `host:port` or `ray://host:port`; True for other forms."""
    place = address.removeprefix("ray://")
    if not re.fullmatch(r"[^\s/]+:\d+", place):
        return True
    try:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            host, _, port = place.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), RAY_ANSWER_SECONDS).close()
        else:
            with grpc.insecure_channel(place) as channel:
                grpc.channel_ready_future(channel).result(timeout=RAY_ANSWER_SECONDS)
    except (OSError, grpc.FutureTimeoutError):
        return False
    return True
