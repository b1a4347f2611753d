"""The tiny testbed model, trained once for all tests that need one that has learned something."""

from pathlib import Path

import pytest

from pipeline.testbed import pretrain
from pipeline.testbed.presets import PRETRAIN_PRESETS


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretraining stage's output for the preset `tiny`: `model/` and `training.parquet`."""
    folder = tmp_path_factory.mktemp("tiny")
    pretrain.run(PRETRAIN_PRESETS["tiny"], {}, folder)
    return folder
