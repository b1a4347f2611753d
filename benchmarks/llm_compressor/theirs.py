"""Prune a model with llm-compressor, and report the CPU time; the counterpart of `ours.py`.

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
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="folder of a checkpoint")
parser.add_argument("--windows", required=True, help=".npy of token ids [nsamples, seqlen]")
parser.add_argument("--pruner", choices=MODIFIERS, required=True)
parser.add_argument("--pattern", help="such as 2:4; unset, half of the weights of each row")
parser.add_argument("--batch-size", type=int, required=True, help="windows in a forward pass")
parser.add_argument("--output", type=Path, required=True, help="JSON file")
arguments = parser.parse_args()

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
ids = torch.from_numpy(np.load(arguments.windows))  # [nsamples, seqlen]
windows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
pattern = {} if arguments.pattern is None else {"mask_structure": arguments.pattern}
recipe = MODIFIERS[arguments.pruner](
    sparsity=0.5,
    targets=["Linear"],
    ignore=["re:.*lm_head"],  # the plain name `lm_head` would not match
    **pattern,
)

start = time.process_time()
oneshot(
    model=model,
    recipe=recipe,
    dataset=DataLoader(windows, batch_size=arguments.batch_size),
    num_calibration_samples=len(windows),
)
seconds = time.process_time() - start

pruned = [
    each.weight
    for name, each in model.named_modules()
    if isinstance(each, torch.nn.Linear) and name != "lm_head"
]
arguments.output.write_text(
    json.dumps(
        {
            "cpu_seconds": seconds,
            "sparsity": sum(int((weight == 0).sum()) for weight in pruned)
            / sum(weight.numel() for weight in pruned),
        }
    )
)
