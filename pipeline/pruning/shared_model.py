"""A model that consecutive prunings on a worker share."""

import tempfile
from pathlib import Path
from typing import Any

from pipeline.environment import scratch_folder
from pipeline.models.loading import model_identity, stream_model
from pipeline.models.matrices import decoder_layers
from pipeline.models.streaming import is_stored
from pipeline.specs import Model
from pipeline.stage import Artifacts, Latest


class _StreamedModel:
    """A model with layers in files, and the folder of some of these."""

    def __init__(self, model: Model, artifacts: Artifacts) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="calprune-layers-", dir=scratch_folder())
        self.model = stream_model(model, artifacts, Path(self.scratch.name))


_latest: Latest[_StreamedModel] = Latest(release=lambda held: held.scratch.cleanup())


def shared_model(spec: Model, artifacts: Artifacts) -> Any:
    """Return the model, loaded once for all consecutive prunings of it on this worker.

    Its decoder layers are read again for each pruning. A model with layers in memory would stay
    pruned, so it is loaded again.
    """
    held = _latest.get(model_identity(spec, artifacts), lambda: _StreamedModel(spec, artifacts))
    if not all(is_stored(layer) for layer in decoder_layers(held.model)[1]):
        _latest.forget()
    return held.model
