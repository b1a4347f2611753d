"""Statistics are gathered without unneeded computation."""

import functools

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.matrices import Matrix, matrices
from pipeline.pruning.observed_inputs import InputObserver


class Twice(nn.Module):
    """Uses its first matrix again after its last one."""

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
    observer = InputObserver(found, ("squared_norms",), 6)
    for batch in batches:
        observer.observe(functools.partial(layer, batch))
    observer.take().hand_over(found)
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


@torch.no_grad()
def test_a_matrix_on_the_left_of_its_product_reads_the_columns_of_the_right() -> None:
    """Mamba multiplies like this."""
    torch.manual_seed(0)
    matrix, states = Matrix("in_proj", torch.randn(4, 6)), torch.randn(6, 5)
    observer = InputObserver([matrix], ("squared_norms",), 1)
    observer.observe(lambda: matrix.weight @ states)
    observer.take().hand_over([matrix])
    wanted = states.square().sum(dim=1)
    torch.testing.assert_close(matrix.statistics["squared_norms"], wanted)
    assert matrix.tokens == 5


@torch.no_grad()
def test_only_rows_of_zeros_are_no_tokens_of_an_expert() -> None:
    """Experts in one product get equally many rows. A token may hold zeros."""
    torch.manual_seed(0)
    stacked, states = torch.randn(2, 6, 4), torch.randn(2, 50, 6)
    states[:, :, 1:4] *= torch.rand(2, 50, 3) < 0.5
    states[0, 40:] = states[1, :15] = 0
    experts = [Matrix(f"experts.{i}", stacked[i].T, is_expert=True) for i in range(2)]
    observer = InputObserver(experts, ("squared_norms",), 1)
    observer.observe(lambda: torch.bmm(states, stacked))
    observer.take().hand_over(experts)
    assert [expert.tokens for expert in experts] == [40, 35]
    for expert, rows in zip(experts, states, strict=True):
        torch.testing.assert_close(expert.statistics["squared_norms"], rows.square().sum(dim=0))
