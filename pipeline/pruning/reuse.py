"""What prunings of one worker share: a model in its files, and its first layer's statistics."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.models.loading import stream_model
from pipeline.models.matrices import decoder_layers
from pipeline.models.streaming import is_stored
from pipeline.pruning.first_layer import FirstLayer
from pipeline.specs import Model, PruneSpec, StageSpec, canonical_json
from pipeline.stage import Artifacts, Latest


class _Streamed:
    """A model whose layers are in files, and the folder that some of these are in."""

    def __init__(self, model: Model, artifacts: Artifacts) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="calprune-layers-")
        self.model = stream_model(model, artifacts, Path(self.scratch.name))


_streamed: Latest[_Streamed] = Latest(release=lambda held: held.scratch.cleanup())
_first_layers: Latest[FirstLayer] = Latest()


def streamed(spec: Model, artifacts: Artifacts) -> Any:
    """The model, loaded once for all prunings that follow each other on this worker.

    Its decoder layers are read anew for each of them. A model whose layers are in memory would
    stay pruned, so it is loaded again.
    """
    held = _streamed.get(_identity(spec, artifacts), lambda: _Streamed(spec, artifacts))
    if not all(is_stored(layer) for layer in decoder_layers(held.model)[1]):
        _streamed.forget()
    return held.model


def first_layer(spec: PruneSpec, statistics: Sequence[str], artifacts: Artifacts) -> FirstLayer:
    """What earlier prunings on this worker, if any, have found in the first layer."""
    assert spec.calibration is not None
    key = (_identity(spec.model, artifacts), spec.calibration.key, tuple(statistics))
    return _first_layers.get(key, FirstLayer)


def _identity(spec: Model, artifacts: Artifacts) -> tuple[bytes, Path | None]:
    folder = artifacts.get(spec.key) if isinstance(spec, StageSpec) else None
    return canonical_json(spec.model_dump(mode="json")), folder
