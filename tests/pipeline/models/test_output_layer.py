"""Logits in parts: what is kept of them, and what memory they take."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from pipeline.models.output_layer import joined

GROWTH = """
import resource, sys
import numpy as np, torch
from pipeline.models.heap import keep_freed_memory
from pipeline.evaluation.perplexity import ScoredWindow, losses
from pipeline.models.output_layer import OutputLayer
from transformers import LlamaConfig, LlamaForCausalLM

keep_freed_memory()
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=49_152, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1,
)
layer = OutputLayer(LlamaForCausalLM(config).eval())
window = ScoredWindow(np.arange(513, dtype=np.int64), 1, 0, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
list(losses(layer, [[window] * 16]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
"""Prints by how many KiB a process grows while 8,192 tokens are scored: 1.6 GB of logits."""


def test_values_of_parts_are_joined_in_order() -> None:
    first, second = torch.randn(7), torch.randn(7) > 0

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
            yield first[part], second[part]

    found = joined(parts(), 7)
    assert torch.equal(found[0], first)
    assert torch.equal(found[1], second)
    with pytest.raises(ValueError, match="7 positions instead of 8"):
        joined(parts(), 8)


@pytest.mark.skipif(sys.platform != "linux", reason="KiB on Linux, bytes on a Mac")
def test_a_process_does_not_grow_by_all_logits_of_a_batch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 500e6
