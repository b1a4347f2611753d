"""What a run reports to."""

from collections.abc import Mapping

from cluster.board import Board
from cluster.graph import Stage
from cluster.store import Failure, Manifest


class Watcher:
    """Receives the events of a run, in the driver's main thread. This one ignores them."""

    def __init__(self, board: Board | None = None) -> None:
        """
        Args:
            board: where workers write how far they are; None has them write nothing.
        """
        self.board = board

    def started(self, stage: Stage) -> None:
        """Receive a stage that is handed to Ray, once for every try."""

    def ended(self, stage: Stage, result: Manifest | Failure) -> None:
        """Receive a stage that was made or has failed for good."""

    def replicas(self, counts: Mapping[str, int]) -> None:
        """Receive the number of actors by kind of stage, after every step of the run."""


UNWATCHED = Watcher()
