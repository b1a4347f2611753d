"""Statistics of a model's first decoder layer, to be taken once for several prunings."""

from collections.abc import Sequence

from torch import Tensor

from pipeline.models.matrices import Matrix


class FirstLayer:
    """Statistics of the first decoder layer, which is dense and has nothing below it: all prunings
    of a model with one calibration set find the same there. They are held in host memory."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[dict[str, Tensor], int]] = {}

    def recall(self, found: Sequence[Matrix]) -> bool:
        """Give the layer's matrices the statistics of an earlier pruning; False if there is none.

        Matrices that shared a statistic share it again.
        """
        if not self._known:
            return False
        moved: dict[int, Tensor] = {}
        for matrix in found:
            statistics, matrix.tokens = self._known[matrix.name]
            for value in statistics.values():
                if id(value) not in moved:
                    moved[id(value)] = value.to(matrix.weight.device)
            matrix.statistics = {name: moved[id(value)] for name, value in statistics.items()}
        return True

    def remember(self, found: Sequence[Matrix]) -> None:
        """Keep the statistics of the layer's matrices."""
        held: dict[int, Tensor] = {}
        for matrix in found:
            for value in matrix.statistics.values():
                if id(value) not in held:
                    held[id(value)] = value.cpu()
            statistics = {name: held[id(value)] for name, value in matrix.statistics.items()}
            self._known[matrix.name] = statistics, matrix.tokens
