"""Requests to the cluster's autoscaler, if it has one, for the room that stages wait for."""

import ray
from ray.autoscaler.sdk import request_resources

from cluster.schedule import Bundle

MAX_READY = 1000
"""The most stages that a request adds to those already with Ray."""

REQUEST_SECONDS = 30.0
"""How long a request stands before the next one."""


class RoomRequest:
    """The room that the cluster is asked for.

    Ray's v2 autoscaler ignores a request that the largest permitted cluster could not hold, and
    does not say how large that is. So first all is asked for, then half of it, a quarter and so on,
    and then all again; nodes started for one request stay for the next. A cluster without an
    autoscaler records a request and does nothing.
    """

    def __init__(self) -> None:
        self._size = 0
        self._since = 0.0

    def update(self, taken: list[Bundle], ready: list[Bundle], now: float) -> None:
        """Ask for room for everything that is with Ray and for some of what is ready besides.

        Args:
            taken: what is with Ray.
            ready: what is not with Ray yet, the most urgent first.
            now: seconds of a monotonic clock.
        """
        if not ready:
            self.withdraw()
        elif not self._size or now - self._since >= REQUEST_SECONDS:
            self._size = self._size // 2 or min(len(ready), MAX_READY)
            self._since = now
            _request(taken + ready[: self._size])

    def withdraw(self) -> None:
        """Ask for nothing more."""
        if self._size:
            _request([])
        self._size = 0


def _request(bundles: list[Bundle]) -> None:
    if ray.util.client.ray.is_connected():  # a client lacks what `request_resources` reads
        ray.remote(num_cpus=0)(request_resources).remote(bundles=bundles)
    else:
        request_resources(bundles=bundles)
