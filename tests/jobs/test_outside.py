"""The list of everything that a grid takes from outside, and the fingerprints from it."""

from pathlib import Path

import pytest

from jobs.outside import hub_reads, outside, with_fingerprints
from pipeline.errors import InputError
from pipeline.files import fingerprint
from pipeline.specs import (
    Corpus,
    CorpusMixture,
    EvaluateSpec,
    FileCorpus,
    FilterSpec,
    GenerateSpec,
    HubCorpus,
    HubModel,
    LocalDatasets,
    LocalModel,
    PruneSpec,
    ScoreSpec,
    TaskSpec,
    Wanda,
    WeightedCorpus,
    WindowsSpec,
    WordList,
)

MODEL = HubModel(name="acme/model", revision="0" * 40)


def mixture(*corpora: Corpus) -> CorpusMixture:
    parts = enumerate(corpora)
    return CorpusMixture(
        parts={str(number): WeightedCorpus(corpus=corpus, weight=1.0) for number, corpus in parts}
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


@pytest.mark.usefixtures("here")
def test_a_stage_lists_only_its_own_reads_and_not_those_of_earlier_stages() -> None:
    samples = GenerateSpec(
        model=MODEL,
        prefixes=mixture(FileCorpus(path="notes.jsonl"), HubCorpus(path="acme/texts", name="en")),
    )
    assert [(taken.field, taken.paths) for taken in outside(samples)] == [
        ("model.name", ()),
        ("prefixes.parts.0.corpus.path", ("notes.jsonl",)),
        ("prefixes.parts.1.corpus.path", ()),
    ]
    assert [item.name for item in hub_reads(samples)] == ["acme/model", "acme/texts"]
    kept = FilterSpec(
        scores=ScoreSpec(samples=samples, model=MODEL), banned_words=WordList(path="words.txt")
    )
    assert [taken.field for taken in outside(kept)] == ["banned_words.path"]
    windows = WindowsSpec(source=kept, model=MODEL, nsamples=1, seqlen=8)
    pruned = PruneSpec(model=MODEL, pruner=Wanda(), sparsity=0.5, calibration=windows)
    measured = EvaluateSpec(model=pruned, tasks=(TaskSpec(name="arc_easy"),))
    assert [item.name for item in hub_reads(measured)] == ["acme/model", "allenai/ai2_arc"]


def test_data_sets_in_a_local_folder_are_not_read_from_the_hub(here: Path) -> None:
    (here / "sets" / "allenai" / "ai2_arc").mkdir(parents=True)
    measured = EvaluateSpec(
        model=LocalModel(path="model"),
        tasks=(TaskSpec(name="arc_easy"), TaskSpec(name="boolq")),
        datasets=LocalDatasets(path="sets"),
    )
    assert [item.name for item in hub_reads(measured)] == ["aps/super_glue"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("corpus", "files"),
    [
        (HubCorpus(path="json", data_files="notes.jsonl"), ("notes.jsonl",)),
        (HubCorpus(path="text", data_files=("a.txt", "b.txt")), ("a.txt", "b.txt")),
        (HubCorpus(path="csv", data_files=("hf://datasets/a/b.csv", "c.csv")), ("c.csv",)),
        (HubCorpus(path="parquet", data_files="https://a.org/b.parquet"), ()),
        (HubCorpus(path="folder"), ("folder",)),
        (HubCorpus(path="folder", data_files="train.jsonl"), ("folder",)),
    ],
)
def test_builders_and_folders_are_local_files(corpus: HubCorpus, files: tuple[str, ...]) -> None:
    (taken,) = outside(corpus)
    assert (taken.paths, taken.item) == (files, None)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["allenai/c4", "imdb", "none/folder"])
def test_any_other_path_is_a_data_set_on_the_hub(name: str) -> None:
    (taken,) = outside(HubCorpus(path=name, data_files="a.jsonl"))
    assert taken.item is not None
    assert (taken.item.name, taken.paths) == (name, ())


def test_a_builders_files_and_a_folder_have_fingerprints_of_their_content(here: Path) -> None:
    builder = HubCorpus(path="json", data_files="*.jsonl")
    folder = HubCorpus(path="folder")
    before = with_fingerprints((builder, folder))
    assert [corpus.fingerprint for corpus in before] == [
        fingerprint("notes.jsonl"),
        fingerprint("folder"),
    ]
    assert with_fingerprints((builder, folder)) == before
    (here / "notes.jsonl").write_text('{"text": "b"}\n')
    (here / "folder" / "train.jsonl").write_text('{"text": "b"}\n')
    for old, new in zip(before, with_fingerprints((builder, folder)), strict=True):
        keys = {
            WindowsSpec(source=corpus, model=MODEL, nsamples=1, seqlen=8).key
            for corpus in (old, new)
        }
        assert len(keys) == 2


@pytest.mark.usefixtures("here")
def test_files_have_fingerprints_everywhere_and_hub_items_have_none() -> None:
    hub = HubCorpus(path="acme/texts")
    mixed = with_fingerprints(mixture(FileCorpus(path="notes.jsonl"), hub))
    assert mixed.parts["0"].corpus.fingerprint == fingerprint("notes.jsonl")
    assert mixed.parts["1"].corpus == hub
    with pytest.raises(InputError, match=r"^a\.parts\.0\.corpus\.data_files: 'no\.jsonl': no file"):
        with_fingerprints(mixture(HubCorpus(path="json", data_files="no.jsonl"), hub), "a")
