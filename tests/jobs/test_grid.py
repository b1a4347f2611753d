from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.grid import Grid, load_grid
from pipeline.errors import InputError
from pipeline.specs import FileCorpus, HubCorpus, TestbedCorpus

Content = dict[str, Any]
Load = Callable[[Content], Grid]
GRIDS = sorted(Path("jobs/grids").glob("*.yaml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_grid_of_the_project_loads_under_its_files_name(path: Path) -> None:
    assert load_grid(path).name == path.stem


def test_presets_stand_for_specs_and_fields_beside_them_win(content: Content, load: Load) -> None:
    content["corpora"] |= {"c4": "c4", "web": {"preset": "c4", "data_files": "mine.json"}}
    corpora = load(content).corpora
    assert isinstance(corpora["other"], TestbedCorpus)
    assert isinstance(corpora["c4"], HubCorpus)
    assert corpora["c4"].path == "allenai/c4"
    assert corpora["web"] == corpora["c4"].model_copy(update={"data_files": "mine.json"})


def test_other_text_under_the_same_path_is_another_corpus(content: Content, load: Load) -> None:
    before = load(content).corpora["notes"]
    assert load(content).corpora["notes"] == before
    assert isinstance(before, FileCorpus)
    Path(before.path).write_text("something else")
    after = load(content).corpora["notes"]
    assert isinstance(after, FileCorpus)
    assert (after.path, after.fingerprint) != (before.path, before.fingerprint)


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
        ({"calibrations": {"c": {"prefixes": {"x": 1}}}}, r"c\.prefixes: .*at least 2 items"),
        (
            {"calibrations": {"c": {"prefixes": {"x": 1, "y": 0}}}},
            r"c\.prefixes\.y: 0: .*greater than 0",
        ),
        ({"calibrations": {"c": {"prefixes": ["x"]}}}, r"c\.prefixes: .*valid dictionary"),
        (
            {"calibrations": {"c": {"prefixes": "x", "banned_words": "no-list.txt"}}},
            r"no-list\.txt.*no file is there",
        ),
        (
            {"calibrations": {"c": {"prefixes": "x", "near_duplicate_similarity": 80}}},
            r"c\.near_duplicate_similarity: 80: .*less than or equal to 1",
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
def test_what_is_no_grid_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_grid(path)
    with pytest.raises(InputError, match="no such file"):
        load_grid(tmp_path / "other.yaml")
