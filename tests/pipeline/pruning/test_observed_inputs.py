"""Statistics that are gathered without computing what they do not need."""

import functools

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.matrices import matrices
from pipeline.pruning.observed_inputs import observe_inputs


class Twice(nn.Module):
    """Its first matrix is used once more after its last one."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.again = again
        self.outputs = 0

    def forward(self, states: Tensor) -> Tensor:
        states = self.last(self.first(states))
        states = self.first(states) if self.again else states
        self.outputs += 1
        return states


@pytest.mark.parametrize("again", [False, True])
@torch.no_grad()
def test_statistics_are_of_every_product_though_later_batches_end_at_the_last(again: bool) -> None:
    layer = Twice(again)
    found = matrices("", layer)
    batches = [torch.randn(2, 5, 6) for _ in range(3)]
    with observe_inputs(found, ("squared_norms",), 6) as observe:
        for batch in batches:
            observe(functools.partial(layer, batch))
    assert layer.outputs == 1
    states = torch.cat(batches).double().flatten(0, 1)
    first, last = layer.first.weight.double(), layer.last.weight.double()
    norms = {"first": states.square().sum(0), "last": (states @ first.T).square().sum(0)}
    if again:
        norms["first"] += (states @ first.T @ last.T).square().sum(0)
    for matrix in found:
        wanted = norms[matrix.name.rpartition(".")[2]]
        torch.testing.assert_close(matrix.statistics["squared_norms"], wanted.float())
        assert matrix.tokens == 30 * (2 if again and matrix.name.endswith("first") else 1)
