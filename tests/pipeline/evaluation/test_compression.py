from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.evaluation.compression import bytes_by_format, speed_2_4

HEADER = 256
"""Most bytes that safetensors may add to a tensor."""


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def test_bytes_are_those_of_weights_bits_and_what_is_not_zero(model: Any) -> None:
    weights = [weight for name, weight in model.named_parameters() if name.endswith("proj.weight")]
    count = sum(weight.numel() for weight in weights)
    assert count == 2 * (4 * 256 * 256 + 3 * 256 * 512)
    for weight in weights:
        weight.data.view(-1, 4)[:, :3] = 0.0
    found = bytes_by_format(model)
    room = HEADER * len(weights) * 2
    assert 0 < found["dense"] - 2 * count < room
    assert 0 < found["masks"] - count / 8 < room
    assert 0 < found["compressed"] - (count / 8 + 2 * count / 4) < room


def test_without_sparse_tensor_cores_the_speed_of_2_4_is_not_measured(model: Any) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        pytest.skip("this GPU has sparse tensor cores")
    assert speed_2_4(model) == "not measured: no GPU with sparse tensor cores"


def test_on_a_gpu_with_sparse_tensor_cores_only_2_4_weights_are_timed(model: Any) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no GPU with sparse tensor cores is here")
    model = model.cuda()
    assert speed_2_4(model) == "not measured: the weights are not 2:4"
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            weight.data.view(-1, 4)[:, :2] = 0.0
    assert float(speed_2_4(model)) > 0
