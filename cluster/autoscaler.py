"""Asking an autoscaler for what stages wait for, where the cluster has one."""

import ray
from ray.autoscaler.sdk import request_resources

from cluster.schedule import Bundle

MOST_MORE = 1000
"""Stages that a request asks for at the most, beyond those that are with Ray."""

ASK_SECONDS = 30.0
"""How long a request stands before the next one."""


class Request:
    """What the cluster is asked to have room for.

    Ray's newer autoscaler does nothing at all for a request that the largest permitted cluster
    could not hold, and does not tell how large that is. So all is asked for first, then half of it,
    a quarter and so on, and then all again; what has been started for one request stays for the
    next. A cluster without an autoscaler takes note of a request and does nothing.
    """

    def __init__(self) -> None:
        self._more = 0
        self._since = 0.0

    def update(self, taken: list[Bundle], ready: list[Bundle], now: float) -> None:
        """Ask for room for all that is with Ray and for some of what is ready besides.

        Args:
            taken: what is with Ray.
            ready: what has no place there yet, the most urgent first.
            now: seconds, of any clock that goes forward.
        """
        if not ready:
            self.take_back()
        elif not self._more or now - self._since >= ASK_SECONDS:
            self._more = self._more // 2 or min(len(ready), MOST_MORE)
            self._since = now
            _ask(taken + ready[: self._more])

    def take_back(self) -> None:
        """Ask for nothing more."""
        if self._more:
            _ask([])
        self._more = 0


def _ask(bundles: list[Bundle]) -> None:
    if ray.util.client.ray.is_connected():  # what `request_resources` reads is not to be had here
        ray.remote(num_cpus=0)(request_resources).remote(bundles=bundles)
    else:
        request_resources(bundles=bundles)
