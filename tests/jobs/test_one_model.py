"""A grid from what a user says about one model, and from nothing but names."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from jobs import library, one_model
from jobs.__main__ import app
from jobs.before_after import BeforeAfter
from jobs.grid import grid_of, load_grid
from jobs.new_grid import write_grid
from jobs.one_model import (
    OneModel,
    calibration_plan,
    grid_content,
    named_corpus,
    named_model,
    pruning_plan,
)
from pipeline.errors import InputError
from pipeline.specs import FilterSpec, GenerateSpec, PruneSpec
from tests.jobs.test_export import save_dense


@pytest.fixture
def model(tmp_path: Path) -> str:
    save_dense(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("a b a b " * 40 + "\n" + "b a a " * 90)
    return str(path)


@pytest.fixture
def probe(tmp_path: Path) -> str:
    path = tmp_path / "probe.txt"
    path.write_text("b b a " * 90)
    return str(path)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def asked(model: str, **options: Any) -> OneModel:
    return OneModel(model, **{"nsamples": 4, "seqlen": 32, **options})


def test_one_pruning_and_the_dense_model_are_measured(model: str, text: str, probe: str) -> None:
    plan, key = pruning_plan(asked(model, prefixes=(text,), probe=(probe,), sparsity="2:4"))
    cells = list(plan.cells.values())
    assert [cell.pruner and cell.pruner.name for cell in cells] == [None, "wanda"]
    spec = plan.specs[key]
    assert isinstance(spec, PruneSpec)
    assert (spec.pattern, spec.sparsity) == ("2:4", 0.5)
    assert spec.calibration is not None
    source = spec.calibration.source
    assert isinstance(source, FilterSpec)
    assert source.drop_fraction == 0
    samples = source.scores.samples
    assert isinstance(samples, GenerateSpec)
    assert (samples.prefix_tokens, samples.num_samples, samples.seqlen) == (2, 6, 32)
    assert plan.grid.name == "prune-tiny-wanda-2-4"


def test_windows_are_cut_from_several_files_alike(model: str, text: str, probe: str) -> None:
    other = Path(text).with_name("other.txt")
    other.write_text("a a a b " * 90)
    plan, key = pruning_plan(asked(model, calibration=(text, str(other)), probe=(probe,)))
    spec = plan.specs[key]
    assert isinstance(spec, PruneSpec)
    assert spec.calibration is not None
    assert not any(isinstance(each, GenerateSpec) for each in plan.specs.values())
    weights = spec.calibration.source.model_dump()["parts"]
    assert [part["weight"] for part in weights.values()] == [1, 1]


def test_a_calibration_set_needs_no_pruning_and_no_probe(model: str, text: str) -> None:
    plan, key = calibration_plan(asked(model, prefixes=(text,)))
    assert plan.targets == [key]
    kinds = {spec.kind for spec in plan.specs.values()}
    assert "generate" in kinds
    assert not kinds & {"prune", "evaluate", "windows"}


def test_the_same_words_give_the_same_keys(model: str, text: str, probe: str) -> None:
    words = asked(model, prefixes=(text,), probe=(probe,))
    assert pruning_plan(words)[1] == pruning_plan(words)[1]
    assert pruning_plan(words)[1] != pruning_plan(words._replace(seed=1))[1]


def test_kept_weights_are_fitted_where_that_is_asked_for(model: str, text: str) -> None:
    plain, fitted = (
        grid_content(asked(model, prefixes=(text,), reconstruct=reconstruct), (text,))
        for reconstruct in (False, True)
    )
    assert plain["cells"]["reconstruction"] is None
    assert fitted["cells"]["reconstruction"] == {}
    assert fitted["name"] == f"{plain['name']}-reconstructed"


def test_windows_are_as_long_as_the_model_takes(model: str, text: str, probe: str) -> None:
    content = grid_content(OneModel(model, prefixes=(text,)), (probe,))
    assert content["cells"]["seqlen"] == 2048  # that of its configuration is the same
    assert content["evaluate"]["perplexity"][0]["seqlen"] == 2048


def test_on_gpus_every_stage_that_runs_the_model_asks_for_one(model: str, text: str) -> None:
    content = grid_content(asked(model, gpus=1.0, prefixes=(text,)), (text,))
    grid = grid_of(content)
    assert {stage: asked.gpus for stage, asked in grid.resources.items()} == dict.fromkeys(
        ("generate", "score", "outliers", "prune", "evaluate"), 1.0
    )
    assert next(iter(grid.models.values())).model_dump()["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"calibration": ("self", "c4")}, "calibration: 'self': goes with no other text"),
        ({"calibration": ("c4",), "prefixes": ("c4",)}, "prefixes: 'c4': are for calibration self"),
        ({"calibration": ("c4",), "probe": ("c4",)}, "probe: 'c4': is what it is pruned with"),
        ({"prefixes": ("wikipdia",)}, "text: 'wikipdia': is no file here and no preset; did you"),
        ({"sparsity": "half"}, "cells.sparsity: 'half': pattern 'half' is not of the form N:M"),
        ({"sparsity": "1.5"}, "cells.sparsity: 1.5: "),
        ({"pruner": "wnda"}, "wnda"),
        ({"allocation": "olw"}, "olw"),
    ],
)
def test_a_mistake_is_named(
    model: str, text: str, probe: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as mistake:
        pruning_plan(asked(model, **{"prefixes": (text,), "probe": (probe,), **changed}))
    assert message in str(mistake.value)


def test_a_probe_that_is_the_calibration_data_is_found_by_any_path(model: str, text: str) -> None:
    other = str(Path(text).parent / "tiny" / ".." / "text.txt")
    with pytest.raises(InputError, match=r"probe: .*is what it is pruned with"):
        pruning_plan(asked(model, calibration=(text,), probe=(other,)))


@pytest.mark.usefixtures("no_hub")
def test_default_texts_out_of_reach_are_refused_before_any_work(
    model: str, text: str, probe: str
) -> None:
    with pytest.raises(InputError, match="probe: 'wikitext2': is the default, and its hub is out"):
        pruning_plan(asked(model, prefixes=(text,)))
    with pytest.raises(InputError, match=r"prefixes: 'wikipedia': is the default.*--prefixes FILE"):
        pruning_plan(asked(model, probe=(probe,)))
    pruning_plan(asked(model, probe=(probe,), pruner="magnitude"))  # reads no prefixes
    with pytest.raises(InputError, match="model: 'tyni': is no folder here, and the hub is out"):
        pruning_plan(OneModel("tyni", prefixes=(text,), probe=(probe,)))


def test_names_of_models() -> None:
    assert named_model("meta-llama/Llama-2-7b-hf@abc") == (
        "Llama-2-7b-hf",
        {
            "kind": "hub-model",
            "name": "meta-llama/Llama-2-7b-hf",
            "revision": "abc",
            "dtype": "auto",
        },
    )
    assert named_model("./no/such")[1]["kind"] == "local-model"
    assert named_model("s3://bucket/models/my model/") == (
        "my-model",
        {"kind": "local-model", "path": "s3://bucket/models/my model/", "dtype": "auto"},
    )


def test_texts_are_presets_or_files(text: str) -> None:
    assert named_corpus("c4") == "c4"
    assert named_corpus(text) == {"kind": "file-corpus", "path": text}
    assert named_corpus("s3://bucket/*.jsonl") == {
        "kind": "file-corpus",
        "path": "s3://bucket/*.jsonl",
    }


def test_without_a_gpu_a_stage_has_all_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cpus, gpus = one_model.this_machine()
    assert cpus >= 1
    assert gpus == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert one_model.this_machine() == (1, 1.0)


# ------------------------------------------------------------------------------------------- init


def test_a_new_grid_is_read_as_it_is(model: str, text: str, probe: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("a a a b " * 90)
    path = tmp_path / "mine.yaml"
    write_grid(path, [model], [text, str(other)], [probe])
    grid = load_grid(path)
    assert grid.name == "mine"
    assert list(grid.corpora) == ["text", "other", "probe"]
    assert list(grid.calibrations) == ["text", "other", "mixed", "self-generated"]
    assert grid.cells["seqlen"] == 2048
    assert [entry.kl for entry in grid.evaluate.perplexity] == [True]
    comments = [line for line in path.read_text().splitlines() if "#" in line]
    assert len(comments) > 10


def test_a_new_grid_with_gpus_asks_for_them(
    model: str, text: str, probe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.new_grid.this_machine", lambda: (1, 1.0))
    write_grid(tmp_path / "gpus.yaml", [model], [text], [probe])
    content = yaml.safe_load((tmp_path / "gpus.yaml").read_text())
    assert content["resources"]["prune"] == {"gpus": 1}
    assert "mixed" not in content["calibrations"]


def test_a_new_grid_overwrites_nothing_and_leaves_nothing_wrong(
    model: str, text: str, probe: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("kept")
    with pytest.raises(InputError, match="exists already"):
        write_grid(path, [model], [text], [probe])
    assert path.read_text() == "kept"
    path.unlink()
    with pytest.raises(InputError, match="is also to calibrate with"):
        write_grid(path, [model], [text], [text])
    with pytest.raises(InputError, match="two have one name"):
        write_grid(path, [model, model], [text], [probe])
    assert not path.exists()


def test_init_says_where_the_grid_is(model: str, text: str, probe: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    words = ["init", model, "--text", text, "--probe", probe, "--out", str(path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f"grid: {path}" in done.output.replace("\n", "")


@pytest.mark.parametrize(
    ("pruner", "sparsity", "title"),
    [("wanda", "2:4", "a-model, 2:4 by wanda"), ("gptq", "0", "a-model, 4 bit by gptq")],
)
def test_the_command_says_what_the_matrices_became(
    pruner: str, sparsity: str, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = [BeforeAfter("text", "perplexity", 2.0, 3.0, 0.1, 8)]
    monkeypatch.setattr(library, "prune", lambda *words, **options: ("prune-0", measured))
    words = ["prune", "a-model", "--out", "out", "--pruner", pruner, "--sparsity", sparsity]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert title in " ".join(done.stdout.split())
