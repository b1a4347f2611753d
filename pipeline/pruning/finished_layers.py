"""Files of pruned decoder layers, kept for the next attempt if this one ends early."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.layer_files import (
    LayerRecord,
    apply_layer_file,
    layer_file,
    write_masks,
    write_weights,
)
from pipeline.models.matrices import Matrix
from pipeline.stage import Keep


class FinishedLayers:
    """The layers of one pruning, one file each.

    Args:
        folder: where the files go, `layer-<number>.safetensors`.
        masks: write masks; else weights.
        keep: None keeps nothing outside the folder.
        checkpoint: writes every layer too, while it is in memory.
    """

    def __init__(
        self,
        folder: Path,
        masks: bool,
        keep: Keep | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.folder = folder
        self.masks = masks
        self.kept = keep
        self.checkpoint = checkpoint
        folder.mkdir(parents=True, exist_ok=True)

    def restore(self, number: int, found: Sequence[Matrix]) -> LayerRecord | None:
        """Set a layer's matrices to what an earlier attempt made of them.

        Returns:
            What that attempt recorded of them; None if the layer is still to be pruned.
        """
        path = self.folder / layer_file(number)
        if self.kept is None or not self.kept.restore(path):
            return None
        record = apply_layer_file(path, found)
        if self.checkpoint is not None:
            self.checkpoint.write_layer(number)
        return record

    def save(
        self, number: int, found: Sequence[Matrix], masks: Mapping[str, Tensor], record: LayerRecord
    ) -> None:
        """Write a pruned layer, and keep it. Weights are written only to be kept."""
        path = self.folder / layer_file(number)
        if self.masks:
            write_masks(path, masks, record)
        elif self.kept is not None:
            write_weights(path, {matrix.name: matrix.weight for matrix in found}, record)
        if self.kept is not None:
            self.kept.keep(path)
        if self.checkpoint is not None:
            self.checkpoint.write_layer(number)
