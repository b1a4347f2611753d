"""How a model's sparsity is spread over its decoder layers: an axis apart from the pruner."""

from pipeline.specs import Allocation


def allocate(allocation: Allocation, sparsity: float, layers: int) -> list[float]:
    """The sparsity of each decoder layer; their mean is the model's."""
    return [sparsity] * layers
