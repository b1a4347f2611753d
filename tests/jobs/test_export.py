"""Pruned models of a store, exported as checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

from cluster.store import Store
from jobs.__main__ import app
from jobs.export import export
from pipeline.errors import InputError
from pipeline.files import fingerprint
from pipeline.models.loading import load_model
from pipeline.pruning.prune import run
from pipeline.specs import LocalModel, Magnitude, PretrainSpec, PruneSpec, StageSpec

FACTS: dict[str, Any] = {
    "report": {},
    "seconds": 1.0,
    "peak_memory_bytes": None,
    "versions": {},
    "host": "here",
}
DENSE = PretrainSpec(mixture={"facts": 1.0})
PRUNED = PruneSpec(model=DENSE, pruner=Magnitude(), sparsity=0.5)
AGAIN = PruneSpec(model=PRUNED, pruner=Magnitude(), sparsity=0.75)
WHOLE = PruneSpec(model=AGAIN, pruner=Magnitude(), sparsity=0.75, checkpoint=True)


def save_dense(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="</s>")
    tokenizer.save_pretrained(folder)


def put(store: Store, spec: StageSpec) -> None:
    """Make an artifact; the dense model is not trained."""
    report: dict[str, Any] = {}
    with store.attempt(spec.key) as attempt:
        if isinstance(spec, PruneSpec):
            artifacts = {part.key: store.fetch(part.key) for part in spec.inputs()}
            report = run(spec, artifacts, attempt.folder)
        else:
            save_dense(attempt.folder / "model")
        attempt.commit(kind=spec.kind, spec=spec.lineage, **{**FACTS, "report": report})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("store")))
    for spec in (DENSE, PRUNED, AGAIN, WHOLE):
        put(store, spec)
    return store


@pytest.mark.parametrize("spec", [PRUNED, AGAIN, WHOLE], ids=["masks", "masks of masks", "whole"])
def test_an_exported_model_is_the_pruned_one_with_its_tokenizer(
    store: Store, tmp_path: Path, spec: PruneSpec
) -> None:
    folder = tmp_path / "exported"
    export(store, spec.key, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    artifacts = {part.key: store.fetch(part.key) for part in (DENSE, PRUNED, AGAIN, WHOLE)}
    expected = load_model(spec, artifacts).to("cpu").state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name
    zeros = (expected["model.layers.1.mlp.up_proj.weight"] == 0).float().mean()
    assert float(zeros) == spec.sparsity
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 3


def test_the_command_line_prints_the_folder_of_the_checkpoint(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    done = CliRunner().invoke(app, ["export", WHOLE.key, str(folder), "--store", store.url])
    assert done.exit_code == 0, done.output
    assert str(folder) in done.stdout.replace("\n", "")
    assert (folder / "config.json").is_file()


def test_a_key_of_something_else_than_a_pruned_model_is_refused(
    store: Store, tmp_path: Path
) -> None:
    for key in (DENSE.key, "prune-0123"):
        with pytest.raises(InputError, match=f"key: '{key}'.*prune_key"):
            export(store, key, tmp_path / "out")


def test_a_folder_in_use_is_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match="name a new or an empty folder"):
        export(store, PRUNED.key, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_masks_without_their_dense_model_are_an_error_that_names_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    put(store, DENSE)
    put(store, PRUNED)
    store.discard(DENSE.key)
    with pytest.raises(InputError, match=rf"{DENSE.key} is damaged: it is not in the store; run"):
        export(store, PRUNED.key, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_for_a_local_model_that_has_changed_are_refused(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    save_dense(dense)
    digest = fingerprint(str(dense), whole_files=False)
    model = LocalModel(path=str(dense), dtype="float32", fingerprint=digest)
    spec = PruneSpec(model=model, pruner=Magnitude(), sparsity=0.5)
    store = Store(str(tmp_path / "store"))
    put(store, spec)
    export(store, spec.key, tmp_path / "unchanged")
    (dense / "config.json").write_text((dense / "config.json").read_text() + "\n")
    with pytest.raises(InputError, match="has changed since it was pruned"):
        export(store, spec.key, tmp_path / "out")


def test_an_artifact_of_another_release_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PruneSpec, "version", 99)
    with pytest.raises(InputError, match="another release"):
        export(store, PRUNED.key, tmp_path / "out")
