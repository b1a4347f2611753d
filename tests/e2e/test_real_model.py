"""The command line on the real model: two cells, from the registry's archives to a sentence."""

import re
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from tests.e2e.conftest import Finished, calprune

GRID = """
name: real
note: One small model whose weights were 4-bit.
models: {{smollm2: {{kind: local-model, path: {folder}/model, dtype: float32}}}}
corpora:
  python: {{kind: file-corpus, path: {folder}/text/python-train.jsonl}}
  wikipedia: {{kind: file-corpus, path: {folder}/text/wikipedia-train.jsonl}}
  heldout: {{kind: file-corpus, path: {folder}/text/wikipedia-heldout.jsonl}}
calibrations:
  mix: {{corpus: {{python: 1, wikipedia: 1}}}}
cells:
  model: smollm2
  calibration: mix
  pruner: wanda
  sparsity: 0.5
  seed: 0
  nsamples: 4
  seqlen: 64
evaluate:
  perplexity: [{{corpus: heldout, seqlen: 64, max_windows: 4}}]
  tasks: [{{name: real_lastword_wikipedia, limit: 8}}]
  task_folder: {{kind: local-tasks, path: {folder}/tasks}}
"""


@pytest.fixture(scope="module")
def grid(real_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "real.yaml"
    path.write_text(GRID.format(folder=real_folder))
    return path


@pytest.fixture(scope="module")
def finished(grid: Path) -> tuple[Path, Finished]:
    store = grid.parent / "store"
    words = [
        "run",
        grid,
        "--workers",
        "1",
        "--store",
        store,
        "--prompt",
        "The capital of France is",
    ]
    return store, calprune(*words)


def test_the_dense_and_the_pruned_model_are_measured(finished: tuple[Path, Finished]) -> None:
    _, run = finished
    assert run.returncode == 0, run.stderr
    numbers = re.findall(r"(dense|wanda)\D.*?│ +([\d.]+) │ +([\d.]+) │", run.stdout)
    assert [name for name, *_ in numbers] == ["dense", "wanda"]
    dense, pruned = (float(perplexity) for _, _, perplexity in numbers)
    assert 5 < dense < pruned < 50 * dense
    assert "note: One small model whose weights were 4-bit." in run.stdout


def test_both_go_on_from_a_prompt(finished: tuple[Path, Finished]) -> None:
    _, run = finished
    lines = [line for line in run.stdout.splitlines() if ": The capital of France is" in line]
    assert [line.partition(":")[0] for line in lines] == ["dense", "wanda 50% mix seed 0"]
    assert "Paris" in lines[0]


def test_the_report_tells_the_note(finished: tuple[Path, Finished]) -> None:
    store, _ = finished
    done = CliRunner().invoke(app, ["report", str(store)])
    assert done.exit_code == 0, done.output
    page = (store / "report" / "real" / "index.html").read_text()
    assert "One small model whose weights were 4-bit." in done.stdout
    assert "One small model whose weights were 4-bit." in page
    assert "<h3>dense</h3><blockquote>The capital of France is" in page
    assert "smollm2_overview" in " ".join(str(path) for path in store.rglob("*.svg"))


def test_the_example_prunes_it_without_a_grid(
    real_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / ".calprune-real").symlink_to(real_folder)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "prune_one_model.py"))
    printed = capsys.readouterr().out
    found = re.fullmatch(r"\{'perplexity': ([\d.]+), 'bits_per_byte': ([\d.]+)\}\n", printed)
    assert found is not None, printed
    assert 20 < float(found[1]) < 500
    assert 1 < float(found[2]) < 2
