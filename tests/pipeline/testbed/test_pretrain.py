"""The testbed's model learns what counting tokens cannot; the same spec gives the same bytes."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import InputError
from pipeline.specs import PretrainSpec, WorldSpec
from pipeline.testbed import pretrain
from pipeline.testbed.presets import PRETRAIN_PRESETS
from pipeline.testbed.world import PRETRAINING_MIXTURE, world_documents

TINY = PRETRAIN_PRESETS["tiny"]

INITIAL_LOSS = math.log(TINY.vocab_size) + 0.5
"""Of normal logits of variance 1, as initial weights of variance 1 / hidden_size give them."""

FEW_STEPS = TINY.model_copy(update={"steps": 3, "batch_size": 4, "seqlen": 32})


def token_stream(tokenizer: Any, split: str, count: int) -> np.ndarray:
    """`<s> document </s>` joined."""
    ids: list[int] = []
    rows = world_documents(TINY.world, PRETRAINING_MIXTURE, split, 0)
    for _, text in itertools.islice(rows, count):
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return np.array(ids)


def unigram_perplexity(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    counts = np.bincount(train, minlength=vocab_size) + 0.1
    return float(np.exp(-np.log(counts / counts.sum())[held_out].mean()))


def bigram_perplexity(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    counts = np.full((vocab_size, vocab_size), 0.1)
    np.add.at(counts, (train[:-1], train[1:]), 1)
    log_shares = np.log(counts / counts.sum(axis=1, keepdims=True))
    return float(np.exp(-log_shares[held_out[:-1], held_out[1:]].mean()))


def test_the_tiny_model_predicts_far_better_than_unigrams_and_bigrams(
    tiny_model_folder: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder / "model").eval()
    train = token_stream(tokenizer, "train", 1400)  # about as much as the model saw
    held_out = token_stream(tokenizer, "evaluation", 100)
    whole = held_out[: len(held_out) // TINY.seqlen * TINY.seqlen]
    windows = torch.from_numpy(whole).view(-1, TINY.seqlen)
    with torch.no_grad():
        perplexity = math.exp(model(input_ids=windows, labels=windows).loss)

    unigram = unigram_perplexity(train, held_out, TINY.vocab_size)
    bigram = bigram_perplexity(train, held_out, TINY.vocab_size)
    assert perplexity < 0.6 * bigram < 0.2 * unigram


def test_the_loss_falls_and_the_learning_rate_rises_and_falls(tiny_model_folder: Path) -> None:
    history = pq.read_table(tiny_model_folder / "training.parquet").to_pandas()
    assert list(history.columns) == ["step", "loss", "learning_rate"]
    assert list(history.step) == list(range(TINY.steps))
    assert history.loss[0] == pytest.approx(INITIAL_LOSS, rel=0.05)
    assert history.loss[-10:].mean() < history.loss[:10].mean() / 3
    peak = int(history.learning_rate.idxmax())
    assert history.learning_rate[peak] == pytest.approx(TINY.learning_rate, rel=0.02)
    assert history.learning_rate[:peak].is_monotonic_increasing
    assert history.learning_rate[peak:].is_monotonic_decreasing
    assert 0 < history.learning_rate.iloc[-1] < TINY.learning_rate / 50


def trained(spec: PretrainSpec, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    pretrain.run(spec, {}, folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_spec_gives_the_same_bytes_after_other_work(tmp_path: Path) -> None:
    first = trained(FEW_STEPS, tmp_path / "first")
    torch.rand(7)
    np.random.rand(7)
    assert trained(FEW_STEPS, tmp_path / "second") == first
    assert {"model/model.safetensors", "model/tokenizer.json", "training.parquet"} <= set(first)


def test_another_seed_gives_another_model(tmp_path: Path) -> None:
    first = trained(FEW_STEPS, tmp_path / "first")
    other = trained(FEW_STEPS.model_copy(update={"seed": 1}), tmp_path / "other")
    assert first["model/model.safetensors"] != other["model/model.safetensors"]


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trained(FEW_STEPS, tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_checkpoint_is_the_specs_llama(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder / "model")
    config = model.config
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_hidden_layers) == (TINY.hidden_size, TINY.num_layers)
    assert config.num_attention_heads == TINY.hidden_size // TINY.head_dim
    assert config.num_key_value_heads == TINY.num_key_value_heads
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, 2)


def test_windows_are_the_joined_documents_each_token_once() -> None:
    spec = FEW_STEPS
    tokenizer = pretrain.make_tokenizer(spec)
    windows = pretrain.training_windows(spec, tokenizer)
    stream = token_stream(tokenizer, "train", 10)[: windows.numel()]
    expected = sorted(stream.reshape(-1, spec.seqlen).tolist())
    assert windows.shape == (spec.steps * spec.batch_size, spec.seqlen)
    assert sorted(windows.tolist()) == expected
    assert windows.flatten().tolist() != stream.tolist()


def test_the_report_counts_parameters_and_tokens(tmp_path: Path) -> None:
    report = pretrain.run(FEW_STEPS, {}, tmp_path)
    hidden, middle = FEW_STEPS.hidden_size, FEW_STEPS.intermediate_size
    keys = FEW_STEPS.num_key_value_heads * FEW_STEPS.head_dim
    layer = 2 * hidden * hidden + 2 * keys * hidden + 3 * hidden * middle + 2 * hidden
    embeddings = 2 * FEW_STEPS.vocab_size * hidden
    assert report["parameters"] == FEW_STEPS.num_layers * layer + embeddings + hidden
    assert report["tokens"] == 3 * 4 * 32
    history = pq.read_table(tmp_path / "training.parquet")
    assert report["final_loss"] == pytest.approx(history["loss"][2].as_py())


def test_an_unknown_domain_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="poetry"):
        pretrain.run(PretrainSpec(world=WorldSpec(), mixture={"poetry": 1.0}), {}, tmp_path)
