"""The command line from a model to its pruned checkpoint."""

import json
import re
import runpy
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers

from cluster.run import Outcome
from cluster.store import Store
from jobs.plan import Plan
from pipeline.data.corpora import read_documents
from pipeline.data.presets import CORPUS_PRESETS
from tests.e2e.conftest import Finished
from tests.made import make_here

ROOT = Path(__file__).parents[2]


def texts(corpus: str) -> list[str]:
    documents = read_documents(CORPUS_PRESETS[f"testbed-{corpus}"])
    return [document.text for document in islice(documents, 1000)]


def run_here(plan: Plan, store: Store, address: str | None, workers: int | None) -> Outcome:
    make_here(plan.graph, plan.targets, store)
    return Outcome()


@pytest.fixture
def words(tmp_path: Path, tiny_model_folder: Path) -> Sequence[str | Path]:
    for name in ("pretraining", "heldout"):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts(name)))
    return [
        *("prune", tiny_model_folder / "model", "--sparsity", "2:4", "--out", tmp_path / "pruned"),
        *("--prefixes", tmp_path / "pretraining.txt", "--probe", tmp_path / "heldout.txt"),
        *("--nsamples", "8", "--seqlen", "64", "--store", tmp_path / "store", "--json"),
    ]


def test_one_command_makes_a_pruned_checkpoint_that_says_what_it_lost(
    words: Sequence[str | Path],
    tmp_path: Path,
    calprune_inside: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.library.run_grid", run_here)
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


def test_the_notebooks_example_goes_from_a_model_to_an_answer_and_a_checkpoint(
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny_model_folder / "model", tmp_path / ".calprune-real/model")
    (tmp_path / ".calprune-real/text").mkdir()
    corpora = {"wikipedia": ("pretraining", "heldout"), "python": ("mismatched", "mismatched")}
    for kind, (train, heldout) in corpora.items():
        for part, corpus in {"train": train, "heldout": heldout}.items():
            lines = [json.dumps({"text": text}) for text in texts(corpus)]
            file = tmp_path / f".calprune-real/text/{kind}-{part}.jsonl"
            file.write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jobs.library.run_grid", run_here)
    runpy.run_path(str(ROOT / "examples/from_model_to_answer.py"))
    printed = capsys.readouterr().out
    rows = re.findall(r"wanda +(python|wikipedia) +(\d) +\d", printed)
    assert sorted(rows) == [(kind, seed) for kind in ("python", "wikipedia") for seed in "01"]
    assert "the lowest KL divergence from the dense model" in printed
    assert re.search(r"python-heldout kl .* 0\.\d+", printed)
    for folder in ("best", "pruned"):
        assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
