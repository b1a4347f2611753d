"""Write an ordinary checkpoint one decoder layer at a time."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from pipeline.models.loading import load_tokenizer, stream_model
from pipeline.models.matrices import decoder_layers
from pipeline.models.streaming import each_resident
from pipeline.specs import Model
from pipeline.stage import Artifacts

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A checkpoint that is being written: a shard for each decoder layer, and one for all else.

    transformers writes every shard, so tensors have the checkpoint's names and forms where these
    differ from the model's.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.root, self.layers = decoder_layers(model)
        self.shards: dict[int, Path] = {}

    def write_layer(self, number: int) -> None:
        """Write a decoder layer, which must be in memory."""
        self._write(number, self.layers[number].state_dict(prefix=f"{self.root}.{number}."))

    def finish(self) -> None:
        """Write all but the decoder layers, then the index and the configuration."""
        inside = f"{self.root}."
        state = self.model.state_dict()
        rest = {name: value for name, value in state.items() if not name.startswith(inside)}
        self._write(len(self.layers), rest)
        weight_map: dict[str, str] = {}
        size = 0
        for path in self.shards.values():
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            weight_map |= dict.fromkeys(names, path.name)
            size += _tensor_bytes(path)
        metadata = {"total_parameters": self.model.num_parameters(), "total_size": size}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _write(self, number: int, state: dict[str, Tensor]) -> None:
        part = self.folder / "part"  # `save_pretrained` removes other shards beside its own
        own = self.model.generation_config
        # transformers reads settings that contradict each other, but does not write them.
        with generation_settings(self.model, GenerationConfig()):
            self.model.save_pretrained(part, state_dict=state, max_shard_size=sys.maxsize)
        path = part / "generation_config.json"
        own.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])
        name = f"model-{number + 1:05d}-of-{len(self.layers) + 1:05d}.safetensors"
        self.shards[number] = (part / "model.safetensors").rename(self.folder / name)
        for path in part.iterdir():  # configuration and code: the same for every shard
            path.replace(self.folder / path.name)
        part.rmdir()


def write_checkpoint(spec: Model, artifacts: Artifacts, folder: Path) -> None:
    """Write a model and its tokenizer as an ordinary checkpoint for `from_pretrained` and vLLM.

    Raises:
        InputError: if there is no such model, or it has no tokenizer.
        LayerFileError: if masks do not fit their model.
    """
    tokenizer = load_tokenizer(spec, artifacts)
    scratch = folder / "scratch"
    model = stream_model(spec, artifacts, scratch, torch.device("cpu"))
    checkpoint = Checkpoint(model, folder)
    for number, _ in enumerate(each_resident(checkpoint.layers)):
        checkpoint.write_layer(number)
    checkpoint.finish()
    tokenizer.save_pretrained(folder)
    shutil.rmtree(scratch, ignore_errors=True)


def _tensor_bytes(path: Path) -> int:
    """Return the bytes of a safetensors file without its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


@contextmanager
def generation_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replace a model's generation settings, which fill in what a call leaves unset."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
