from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cluster.store import Store
from jobs import dtypes
from jobs.grid import Grid, load_grid, read_grid
from jobs.grid_files import GRIDS, grid_file
from jobs.plan import make_plan, print_plan
from pipeline.data.presets import CORPUS_PRESETS
from pipeline.errors import InputError
from pipeline.specs import FileCorpus, HubCorpus, HubModel, TestbedCorpus

Content = dict[str, Any]
Load = Callable[[Content], Grid]


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_grid_of_the_project_is_valid_under_its_files_name(path: Path) -> None:
    assert read_grid(path).name == path.stem  # the demo's files are not there before it is prepared


def test_missing_files_of_the_demo_are_an_error_that_names_the_command_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = Path("jobs/grids/demo.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="python -m jobs prepare"):
        load_grid(demo)


def test_a_preset_expands_to_its_spec_and_fields_beside_it_override_it(
    content: Content, load: Load
) -> None:
    content["corpora"] |= {"c4": "c4", "web": {"preset": "c4", "data_files": "mine.json"}}
    corpora = load(content).corpora
    assert isinstance(corpora["other"], TestbedCorpus)
    assert isinstance(corpora["c4"], HubCorpus)
    assert corpora["c4"].path == "allenai/c4"
    assert corpora["web"] == corpora["c4"].model_copy(update={"data_files": "mine.json"})


def test_compressor_is_another_name_of_pruner(content: Content, load: Load) -> None:
    several = ["wanda", {"name": "gptq", "bits": 3}]
    content["cells"] |= {"pruner": several, "sparsity": 0.5}
    content["include"] = [{"pruner": "magnitude", "calibration": "none"}]
    content["exclude"] = [{"pruner": "wanda", "seed": 1}]
    expected = make_plan(load(content))
    for block in (content["cells"], *content["include"], *content["exclude"]):
        block["compressor"] = block.pop("pruner")
    assert make_plan(load(content)).graph == expected.graph
    content["cells"]["pruner"] = "wanda"
    with pytest.raises(InputError, match=r"compressor: .* is another name of pruner"):
        load(content)


def test_other_text_under_the_same_path_is_another_corpus(content: Content, load: Load) -> None:
    before = load(content).corpora["notes"]
    assert load(content).corpora["notes"] == before
    assert isinstance(before, FileCorpus)
    Path(before.path).write_text("something else")
    after = load(content).corpora["notes"]
    assert isinstance(after, FileCorpus)
    assert (after.path, after.fingerprint) != (before.path, before.fingerprint)


def test_the_key_of_a_perplexity_on_a_preset_of_files_holds_their_content(
    content: Content, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "held-out.txt"
    monkeypatch.setitem(CORPUS_PRESETS, "held-out", FileCorpus(path=str(text)))
    content["evaluate"]["perplexity"] = [{"corpus": "held-out", "seqlen": 64}]
    text.write_text("a text\n" * 90)
    before = make_plan(load(content)).cells
    assert make_plan(load(content)).cells == before
    text.write_text("another\n" * 90)
    assert not make_plan(load(content)).cells.keys() & before.keys()


def test_a_relative_path_without_a_file_is_named_with_the_folder_of_the_command(
    content: Content, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content["corpora"]["notes"] = {"kind": "file-corpus", "path": "texts/*.txt"}
    with pytest.raises(InputError, match=f"looked up from {tmp_path}: check the path"):
        load(content)
    content["corpora"]["notes"]["path"] = f"{tmp_path}/texts/*.txt"
    with pytest.raises(InputError, match="no file is there: check the path"):
        load(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modles": {}}, r"modles: .*there is no such field"),
        ({"name": "a/b"}, r"name: 'a/b'"),
        ({"models": {}}, r"models: \{\}"),
        ({"models": {"m": "testbed-huge"}}, r"models\.m: 'testbed-huge': there is no preset"),
        ({"models": {"m": {"kind": "hub-model"}}}, r"models\.m.*name: None: is missing; add it"),
        ({"corpora": {"c": "wikpedia"}}, r"corpora\.c: 'wikpedia'.*did you mean 'wikipedia'"),
        ({"corpora": {"c": {"kind": "file-corpus", "path": "none*.txt"}}}, r"none\*\.txt"),
        ({"calibrations": {"c": {"corpsu": "x"}}}, r"calibrations\.c: .*give corpus"),
        ({"calibrations": {"c": {"prefixes": "x", "topk": 1}}}, r"calibrations\.c\.topk: 1: there"),
        ({"calibrations": {"c": {"prefixes": {"x": 1}}}}, r"c\.prefixes: .*at least 2 entries"),
        (
            {"calibrations": {"c": {"prefixes": {"x": 1, "y": 0}}}},
            r"c\.prefixes\.y: 0: .*more than 0",
        ),
        ({"calibrations": {"c": {"prefixes": ["x"]}}}, r"c\.prefixes: .*must be a mapping"),
        (
            {"calibrations": {"c": {"prefixes": "x", "banned_words": "no-list.txt"}}},
            r"no-list\.txt.*no file is there",
        ),
        (
            {"calibrations": {"c": {"prefixes": "x", "near_duplicate_similarity": 80}}},
            r"c\.near_duplicate_similarity: 80: .*at most 1; write 0\.8",
        ),
        ({"evaluate": {"tasks": ["a", "b", "a"]}}, r"evaluate: .*'a' is measured twice"),
        ({"evaluate": {}}, r"evaluate: .*measures nothing"),
        (
            {"evaluate": {"tasks": ["a"], "perplexity": [{"corpus": 3}]}},
            r"perplexity\.0\.corpus: 3",
        ),
        ({"resources": {"prun": {"cpus": 1}}}, r"resources\.prun"),
        ({"resources": {"prune": {"cpus": 0}}}, r"resources\.prune\.cpus: 0"),
        (
            {"resources": {"evaluate": {"gpus": 1.5}}},
            r"resources\.evaluate\.gpus: 1\.5: .*round it",
        ),
        (
            {"resources": {"generate": {"host_hidden_bytes": 1}}},
            r"generate\.host_hidden_bytes: 1: only score, describe, prune, evaluate hold hidden",
        ),
        ({"cost": {"parameters": {"tesbed": 1}}}, r"cost\.parameters: 'tesbed'.*did you mean"),
    ],
)
def test_a_wrong_grid_is_named_with_its_field_and_value(
    content: Content, load: Load, change: Content, message: str
) -> None:
    content |= change
    with pytest.raises(InputError, match=message) as caught:
        load(content)
    assert len(str(caught.value)) < 300


def test_other_banned_words_under_the_same_path_are_another_calibration(
    content: Content, load: Load, tmp_path: Path
) -> None:
    words = tmp_path / "words.txt"
    content["calibrations"]["own"]["banned_words"] = str(words)
    found = []
    for text in ("bad", "worse", "bad"):
        words.write_text(text)
        found.append(load(content).calibrations["own"])
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not a YAML file"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_a_file_that_is_not_a_grid_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_grid(path)
    with pytest.raises(InputError, match="no such file"):
        load_grid(tmp_path / "other.yaml")


def test_a_grid_saved_by_windows_is_read_and_other_encodings_are_refused(
    content: Content, tmp_path: Path
) -> None:
    path = tmp_path / "grid.yaml"
    text = yaml.safe_dump(content)
    path.write_bytes(f"\ufeff{text}".replace("\n", "\r\n").encode())
    assert load_grid(path).name == "small"
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(InputError, match=r"^grid: .*grid\.yaml': is UTF-16 text: save it as UTF-8"):
        load_grid(path)
    path.write_bytes(f"{text}note: café\n".encode("latin-1"))
    with pytest.raises(InputError, match=rf"line {text.count(chr(10)) + 1}, byte 10'.*not UTF-8"):
        load_grid(path)


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "/etc/x", "..", "a\\b", "name\n"])
def test_a_name_that_could_lead_out_of_the_store_is_refused(
    content: Content, load: Load, name: str
) -> None:
    with pytest.raises(InputError, match="name"):
        load({**content, "name": name})


def test_a_grid_file_cannot_make_objects(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]")
    with pytest.raises(InputError, match="is not a YAML file"):
        load_grid(path)
    assert not (tmp_path / "made").exists()


def test_a_url_with_a_password_is_refused_and_not_repeated(content: Content, load: Load) -> None:
    content["corpora"]["notes"]["path"] = "https://user:planted-secret@host/notes.txt"
    with pytest.raises(InputError, match=r"corpora\.notes\.path.*credentials") as caught:
        load(content)
    assert "planted-secret" not in str(caught.value)


CPUS = {
    "amx": "flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n" * 2,
    "avx512": "flags\t\t: fpu avx512f avx512_bf16\n" * 2,
    "older": "flags\t\t: fpu avx2 avx512f\nbugs\t\t: amx_bf16\n",
    "uneven": "flags\t\t: fpu avx512_bf16\n\nflags\t\t: fpu\n",
    "arm": "Features\t: fp asimd bf16\n",
    "not Linux": None,
}


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Read the grid on a machine with another CPU."""

    def replace(name: str) -> None:
        path = tmp_path / "cpuinfo"
        path.unlink(missing_ok=True)
        text = CPUS[name]
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(dtypes, "CPU_INFO", path)

    return replace


def with_hub_model(content: Content, dtype: str) -> Content:
    model = {"kind": "hub-model", "name": "a/b", "dtype": dtype}
    return {**content, "models": {"m": model}, "cells": {**content["cells"], "model": "m"}}


@pytest.mark.parametrize(
    ("name", "gpus", "dtype", "reason"),
    [
        ("amx", 0, "bfloat16", "this CPU has amx_bf16"),
        ("avx512", 0, "bfloat16", "this CPU has avx512_bf16"),
        ("older", 0, "float32", "no amx_bf16 or avx512_bf16"),
        ("uneven", 0, "float32", "no amx_bf16"),
        ("arm", 0, "float32", "no amx_bf16"),
        ("not Linux", 0, "float32", "no amx_bf16"),
        ("older", 0.5, "bfloat16", "resources ask for GPUs"),
    ],
)
def test_dtype_auto_depends_on_the_stages_hardware_and_keys_hold_the_dtype(
    content: Content,
    load: Load,
    cpu: Callable[[str], None],
    name: str,
    gpus: float,
    dtype: str,
    reason: str,
    tmp_path: Path,
) -> None:
    cpu(name)
    content["resources"] = {"prune": {"gpus": gpus}, "evaluate": {"cpus": 1}}
    grid = load(with_hub_model(content, "auto"))
    model = grid.models["m"]
    assert isinstance(model, HubModel)
    assert model.dtype == dtype
    assert f"dtype auto is {dtype} (" in str(grid.auto_dtypes["m"])
    assert reason in str(grid.auto_dtypes["m"])
    console = Console(record=True, width=120)
    print_plan(make_plan(grid), Store(str(tmp_path)), console)
    assert f"models.m: {grid.auto_dtypes['m']}" in console.export_text()
    named = load(with_hub_model(content, dtype))
    assert not named.auto_dtypes
    assert set(make_plan(grid).specs) == set(make_plan(named).specs)


def test_dtype_auto_is_decided_only_for_models_that_have_it(content: Content, load: Load) -> None:
    with pytest.raises(InputError, match=r"models\.m\..*dtype: 'automatic'"):
        load(with_hub_model(content, "automatic"))
    content["models"] = {"testbed": {"preset": "testbed-tiny", "dtype": "auto"}}
    with pytest.raises(InputError, match=r"dtype: 'auto': there is no such field"):
        load(content)


def test_a_grid_that_calprune_brings_has_a_name_and_a_file_comes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert grid_file("paper-main") == GRIDS / "paper-main.yaml"
    Path("paper-main").write_text("name: mine")
    assert grid_file("paper-main") == Path("paper-main")
    assert grid_file("no-such.yaml") == Path("no-such.yaml")  # whoever reads it says so
    with pytest.raises(InputError, match=r"grid: 'dmo': there is no such file, .* demo, "):
        grid_file("dmo")
