"""What is made once for all tests that need it: a local Ray, and a model that has learned."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from pipeline.testbed import pretrain
from pipeline.testbed.presets import PRETRAIN_PRESETS


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretraining stage's output for the preset `tiny`: `model/` and `training.parquet`."""
    folder = tmp_path_factory.mktemp("tiny")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more gain nothing at this size, and wait for each other
    pretrain.run(PRETRAIN_PRESETS["tiny"], {}, folder)
    torch.set_num_threads(threads)
    return folder
