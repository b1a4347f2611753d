"""A pruning continues after the decoder layers that an earlier attempt finished."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipeline.models.checkpoint import Checkpoint
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.finished_layers import FinishedLayers
from pipeline.pruning.prune import PruneReport, prune_model
from pipeline.specs import RIA, Magnitude, Pattern, Pruner, SparseGPT, Wanda

LAYERS = 4
CONFIG = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class Stopped(Exception):
    """The attempt has ended."""


class Kept:
    """Keeps files in memory. The attempt ends once this many are kept."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.files: dict[str, bytes] = {}

    def keep(self, path: Path) -> None:
        self.files[path.name] = path.read_bytes()
        if len(self.files) == self.most:
            raise Stopped

    def restore(self, path: Path) -> bool:
        if path.name in self.files:
            path.write_bytes(self.files[path.name])
        return path.name in self.files


class Written(Checkpoint):
    """Only the numbers of the layers."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def write_layer(self, number: int) -> None:
        self.layers.append(number)


def prune(pruner: Pruner, finished: FinishedLayers) -> tuple[Any, PruneReport]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG).float().eval()
    windows: Tensor = torch.randint(96, (4, 24), generator=torch.Generator().manual_seed(1))
    target = LayerTarget(0.5, Pattern(2, 4))
    return model, prune_model(model, windows, pruner, ModelTarget(target), finished=finished)


@pytest.mark.parametrize(
    "pruner", [Magnitude(), Wanda(), RIA(permutation=True), SparseGPT()], ids=lambda p: p.name
)
def test_a_second_attempt_gives_what_one_undisturbed_attempt_gives(
    pruner: Pruner, tmp_path: Path
) -> None:
    masks = not pruner.updates_weights
    undisturbed, wanted = prune(pruner, FinishedLayers(tmp_path / "undisturbed", masks))
    kept = Kept(2)
    with pytest.raises(Stopped):
        prune(pruner, FinishedLayers(tmp_path / "layers", masks, kept))
    kept.most = LAYERS + 1
    model, report = prune(pruner, FinishedLayers(tmp_path / "layers", masks, kept))
    assert (wanted.resumed_layers, report.resumed_layers) == (0, 2)
    for ours, theirs in zip(model.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert report.facts == wanted.facts
    assert any(report.facts.values()) == (pruner.name in ("ria", "sparsegpt"))
    assert (report.matrices, report.layers) == (wanted.matrices, wanted.layers)
    assert report.permutations.keys() == wanted.permutations.keys()
    assert bool(report.permutations) == (pruner.name == "ria")
    for name, order in wanted.permutations.items():
        assert torch.equal(report.permutations[name], order)


def test_a_checkpoint_gets_the_restored_layers_too(tmp_path: Path) -> None:
    kept = Kept(2)
    with pytest.raises(Stopped):
        prune(SparseGPT(), FinishedLayers(tmp_path, False, kept, Written()))
    kept.most = LAYERS + 1
    written = Written()
    prune(SparseGPT(), FinishedLayers(tmp_path, False, kept, written))
    assert written.layers == list(range(LAYERS))


def test_weights_that_nobody_keeps_are_not_written_and_masks_are(tmp_path: Path) -> None:
    prune(SparseGPT(), FinishedLayers(tmp_path / "weights", masks=False))
    prune(Wanda(), FinishedLayers(tmp_path / "masks", masks=True))
    assert not list((tmp_path / "weights").iterdir())
    assert len(list((tmp_path / "masks").iterdir())) == LAYERS
