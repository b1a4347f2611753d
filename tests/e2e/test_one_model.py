"""The command line from a model to its pruned checkpoint."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers

from pipeline.data.corpora import documents_for
from pipeline.data.presets import CORPUS_PRESETS
from tests.e2e.conftest import Finished


@pytest.fixture
def words(tmp_path: Path, tiny_model_folder: Path) -> Sequence[str | Path]:
    for name in ("pretraining", "heldout"):
        texts = documents_for(CORPUS_PRESETS[f"testbed-{name}"], 200, None)
        (tmp_path / f"{name}.txt").write_text("\n".join(document.text for document in texts))
    return [
        *("prune", tiny_model_folder / "model", "--sparsity", "2:4", "--out", tmp_path / "pruned"),
        *("--prefixes", tmp_path / "pretraining.txt", "--probe", tmp_path / "heldout.txt"),
        *("--nsamples", "8", "--seqlen", "64", "--store", tmp_path / "store", "--json"),
    ]


@pytest.mark.usefixtures("ray_of_its_own")
def test_one_command_makes_a_pruned_checkpoint_that_says_what_it_lost(
    words: Sequence[str | Path], tmp_path: Path, calprune_inside: Callable[..., Finished]
) -> None:
    done = calprune_inside(*words)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    measured = {each["metric"]: each for each in answer["measured"]}
    assert 1 < measured["perplexity"]["dense"] < measured["perplexity"]["pruned"]
    assert 0.01 < measured["kl"]["pruned"] < 5
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert answer["prune_key"] in card
    assert "pruned to 2:4 by wanda" in card
    assert f"{measured['kl']['pruned']:.3g} nats a token" in card
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    for layer in model.model.layers:
        zeros = (layer.mlp.up_proj.weight.unflatten(1, (-1, 4)) == 0).sum(dim=-1)
        assert torch.equal(zeros, torch.full_like(zeros, 2))

    again = calprune_inside(*words)
    assert again.returncode == 2
    assert "exists already; name a new or an empty folder" in again.stderr
