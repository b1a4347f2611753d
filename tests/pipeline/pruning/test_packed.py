"""Packed checkpoints, read by compressed-tensors and by transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pipeline.errors import InputError
from pipeline.models.checkpoint import write_checkpoint
from pipeline.models.loading import load_model
from pipeline.pruning import prune
from pipeline.pruning.packed import check_packable, pack_checkpoint
from pipeline.specs import AWQ, RTN, LocalModel, Magnitude, PruneSpec

ROUNDED = RTN(bits=4, group_size=16)


@dataclasses.dataclass(frozen=True)
class Packed:
    spec: PruneSpec
    artifact: Path
    folder: Path


@pytest.fixture(scope="module")
def packed(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    dense = LocalModel(path=str(tiny_model_folder / "model"), dtype="bfloat16")
    spec = PruneSpec(model=dense, pruner=ROUNDED, sparsity=0.0)
    artifact, folder = (tmp_path_factory.mktemp(name) for name in ("pruned", "packed"))
    prune.run(spec, {}, artifact)
    check_packable(spec, artifact)
    write_checkpoint(spec, {spec.key: artifact}, folder)
    pack_checkpoint(folder, spec, artifact)
    return Packed(spec, artifact, folder)


def test_integers_times_scales_are_the_rounded_weights_to_the_bit(packed: Packed) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    rounded = load_model(packed.spec, {packed.spec.key: packed.artifact}).state_dict()
    stored: dict[str, torch.Tensor] = {}
    for path in packed.folder.glob("*.safetensors"):
        stored |= load_file(path)
    index = json.loads((packed.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in stored.values())
    matrices = [
        name.removesuffix(".weight_packed") for name in stored if name.endswith("weight_packed")
    ]
    assert len(matrices) == 7 * len({name.split(".")[2] for name in matrices})
    for name in matrices:
        shape = stored[f"{name}.weight_shape"].tolist()
        numbers = unpack_from_int32(stored[f"{name}.weight_packed"], 4, torch.Size(shape))
        scale = stored[f"{name}.weight_scale"].repeat_interleave(16, dim=1)
        product = numbers.to(torch.bfloat16) * scale
        assert torch.equal(product, rounded[f"{name}.weight"].cpu()), name
    kept = [name for name in stored if ".weight_" not in name]
    for name in kept:
        assert torch.equal(stored[name], rounded[name].cpu()), name
    assert {name.removesuffix(".weight") for name in rounded} - {"lm_head"} == {
        *matrices,
        *(name.removesuffix(".weight") for name in kept),
    } - {"lm_head"}


def test_transformers_reads_the_same_model(packed: Packed) -> None:
    ids = torch.arange(5, 45).view(2, 20)
    expected = load_model(packed.spec, {packed.spec.key: packed.artifact}).to("cpu")
    read = transformers.AutoModelForCausalLM.from_pretrained(packed.folder, dtype="bfloat16")
    with torch.inference_mode():
        logits, wanted = (model(ids).logits.float() for model in (read, expected))
    assert torch.allclose(logits, wanted, atol=0.05)  # bfloat16
    assert wanted.std() > 1


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (Magnitude(), "pruner: 'magnitude': leaves no integers to pack: take gptq or rtn"),
        (AWQ(), "pruner: 'awq': leaves no integers"),
        (RTN(bits=3), "bits: 3: does not fill a machine word: take 4 or 8"),
        (RTN(symmetric=False), "symmetric: False: has zero points"),
        (RTN(group_size=48), "group_size: 48: model.layers.0.* inputs: take a divisor"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_written(
    packed: Packed, pruner: Any, message: str
) -> None:
    spec = packed.spec.model_copy(update={"pruner": pruner})
    with pytest.raises(InputError, match=message):
        check_packable(spec, packed.artifact)
