"""A model that is loaded once for all prunings of it that follow each other on a worker."""

import tempfile
from pathlib import Path
from typing import Any

from pipeline.models.loading import model_identity, stream_model
from pipeline.models.matrices import decoder_layers
from pipeline.models.streaming import is_stored
from pipeline.specs import Model
from pipeline.stage import Artifacts, Latest


class _StreamedModel:
    """A model whose layers are in files, and the folder that some of these are in."""

    def __init__(self, model: Model, artifacts: Artifacts) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="calprune-layers-")
        self.model = stream_model(model, artifacts, Path(self.scratch.name))


_latest: Latest[_StreamedModel] = Latest(release=lambda held: held.scratch.cleanup())


def shared_model(spec: Model, artifacts: Artifacts) -> Any:
    """Return the model, loaded once for all prunings that follow each other on this worker.

    Its decoder layers are read again for each of them. A model whose layers are in memory would
    stay pruned, so it is loaded again.
    """
    held = _latest.get(model_identity(spec, artifacts), lambda: _StreamedModel(spec, artifacts))
    if not all(is_stored(layer) for layer in decoder_layers(held.model)[1]):
        _latest.forget()
    return held.model
