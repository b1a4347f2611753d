"""No stage has an input that its key lacks: made twice in different environments, its bytes are
equal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.store import Partial, Store
from jobs.check import check_plan
from jobs.grid import load_grid
from jobs.plan import make_plan
from jobs.stages import STAGES, execute
from pipeline.environment import CHANGES_NUMBERS
from pipeline.errors import InputError

SCRIPT = Path(__file__).with_name("every_stage.py")
CODE = Path(__file__).parents[2]

GRID = """\
name: hidden
models:
  chat: {{kind: local-model, path: {folder}/model, dtype: float32}}
corpora:
  web: {{kind: file-corpus, path: "{folder}/web.jsonl"}}
  books: testbed-mismatched
calibrations:
  web: {{corpus: {{web: 2, books: 1}}}}
  pool: {{corpus: {{web: 2, books: 1}}, pool: 9, drop_fraction: 0.5}}
  raw: &own {{prefixes: {{web: 1, books: 1}}, num_samples: 12, shard_size: 8, redraws: 1,
             banned_words: "{folder}/words.txt", near_duplicate_similarity: 0.9,
             drop_fraction: 0.2}}
  chat: {{<<: *own, prompt: chat}}
cells: {{model: chat, calibration: chat, seed: 3, nsamples: 4, seqlen: 48,
        pruner: [sparsegpt, dsnot, alps], sparsity: 0.5}}
include:
  - {{pruner: ria, sparsity: "2:4"}}
  - {{calibration: [web, raw, pool], pruner: wanda, sparsity: 0.6, allocation: owl}}
  - {{calibration: raw, pruner: magnitude, allocation: owl, sparsity: 0.5,
     drop_by: [random, min-k-plus-plus, zipcal, cola, igsp], within: [source, cluster]}}
  - {{pruner: magnitude, sparsity: 0.5}}
evaluate:
  perplexity: [{{corpus: web, seqlen: 32, max_windows: 4}}]
  tasks: [{{name: testbed_facts, limit: 6, num_fewshot: 1}}]
  task_folder: {{kind: testbed-tasks}}
  chat_template: true
describe:
  reference: books
  reference_windows: 8
"""

TRAINED = """\
name: trained
models: {trained: {preset: testbed-tiny, steps: 3}}
corpora: {books: testbed-mismatched}
cells: {model: trained, pruner: magnitude, sparsity: 0.5}
evaluate: {perplexity: [{corpus: books, seqlen: 32, max_windows: 4}]}
"""

TEMPLATE = (
    "{{ strftime_now('%d %B %Y %H:%M') }} {{ bos_token }}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)
"""A template that begins with today's date, as Llama 3.1's does."""

PLACES: list[tuple[str, dict[str, str]]] = [
    (
        "2025-01-31 08:00",
        {"TZ": "UTC", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
    ),
    (
        "2031-12-31 23:59:30",
        {
            "TZ": "Pacific/Kiritimati",
            "LC_ALL": "POSIX",
            "PYTHONUTF8": "0",  # with the two, files are opened as ASCII unless the code says more
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONHASHSEED": "4242",
            "OMP_NUM_THREADS": "2",
            "HOME": "elsewhere",
            "TOKENIZERS_PARALLELISM": "true",
        },
    ),
]


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("hidden")
    shutil.copytree(tiny_model_folder / "model", folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    documents = [
        {"text": f"naïve – “text” № {n} 日本語 " + "and some more of it " * 12} for n in range(40)
    ]
    lines = [json.dumps(document, ensure_ascii=False) for document in documents]
    (folder / "web.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "words.txt").write_text("çirkin\n", encoding="utf-8")
    paths = [folder / "hidden.yaml", folder / "trained.yaml"]
    paths[0].write_text(GRID.format(folder=folder))
    paths[1].write_text(TRAINED)
    return paths


@pytest.fixture(scope="module")
def made(grids: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The files and reports of every stage, in each environment."""
    runs = []
    for date, variables in PLACES:
        here = tmp_path_factory.mktemp("place")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
        runs.append(
            subprocess.Popen(
                [sys.executable, SCRIPT, here / "out", date, *grids],
                env={**kept, **variables, "PYTHONPATH": str(CODE)},
                cwd=here,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    found = []
    for run in runs:
        out, err = run.communicate()
        assert run.returncode == 0, err[-3000:]
        found.append(json.loads(out.splitlines()[-1]))
    return found


def test_every_stage_is_made(made: list[dict[str, Any]]) -> None:
    assert {key.rpartition("-")[0] for key in made[0]} == {*STAGES, "shard"}


def test_date_place_locale_and_threads_change_no_byte(
    made: list[dict[str, Any]],
) -> None:
    one, other = made
    assert one.keys() == other.keys()  # the keys as well
    differ = [key for key in one if one[key] != other[key]]
    assert not differ, {key: (one[key], other[key]) for key in differ[:2]}


@pytest.mark.parametrize("name", CHANGES_NUMBERS)
def test_a_variable_that_changes_numbers_is_refused_here_and_on_workers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trained.yaml"
    path.write_text(TRAINED)
    plan = make_plan(load_grid(path))
    monkeypatch.setenv(name, "0")
    check_plan(plan)
    monkeypatch.setenv(name, "1")
    message = f"environment.{name}: '1': .*unset it"
    with pytest.raises(InputError, match=message):
        check_plan(plan)
    with pytest.raises(InputError, match=message):
        execute("{}", {}, tmp_path, 1, Partial(Store(str(tmp_path)), "some-key"))
