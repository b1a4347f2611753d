"""Prune or round a model with llm-compressor, and report the CPU time: the counterpart of `ours`.

Run it by its path with the Python of an environment made from `requirements.txt` beside it. It
imports nothing of calprune.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="folder of a checkpoint")
parser.add_argument("--windows", required=True, help=".npy of token ids [nsamples, seqlen]")
parser.add_argument("--pruner", choices=[*MODIFIERS, "gptq"], required=True)
parser.add_argument("--pattern", help="such as 2:4; unset, half of the weights of each row")
parser.add_argument("--batch-size", type=int, required=True, help="windows in a forward pass")
parser.add_argument("--output", type=Path, required=True, help="JSON file")
parser.add_argument("--weights", type=Path, required=True, help="safetensors file")
arguments = parser.parse_args()

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
ids = torch.from_numpy(np.load(arguments.windows))  # [nsamples, seqlen]
windows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
ignore = ["re:.*lm_head"]  # the plain name `lm_head` would not match
if arguments.pruner == "gptq":  # 4 bits; what is not named is as `pipeline.specs.GPTQ` has it
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe: Any = GPTQModifier(
        config_groups=groups, ignore=ignore, actorder="static", dampening_frac=0.01, block_size=128
    )
else:
    pattern = {} if arguments.pattern is None else {"mask_structure": arguments.pattern}
    recipe = MODIFIERS[arguments.pruner](sparsity=0.5, targets=["Linear"], ignore=ignore, **pattern)

start = time.process_time()
oneshot(
    model=model,
    recipe=recipe,
    dataset=DataLoader(windows, batch_size=arguments.batch_size),
    num_calibration_samples=len(windows),
)
seconds = time.process_time() - start

pruned = {
    name: each.weight.detach().contiguous()
    for name, each in model.named_modules()
    if isinstance(each, torch.nn.Linear) and name != "lm_head"
}
save_file(pruned, arguments.weights)
arguments.output.write_text(
    json.dumps(
        {
            "cpu_seconds": seconds,
            "sparsity": sum(int((weight == 0).sum()) for weight in pruned.values())
            / sum(weight.numel() for weight in pruned.values()),
        }
    )
)
