from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.evaluation.task_needs import check_needs, task_files
from pipeline.evaluation.tasks import check_tasks, generative_tasks
from pipeline.specs import LocalTasks

FUNCTIONS = """\
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import no_such_package_for_types

try:
    import no_such_package_that_is_optional
except ImportError:
    no_such_package_that_is_optional = None

from . import beside


def ask(document):
    import no_such_package_in_a_function
    return json.dumps(document)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "common.yaml").write_text("doc_to_text: !function wording.ask\n")
    (tmp_path / "one.yaml").write_text("task: one\ninclude: common.yaml\ntag: few\n")
    (tmp_path / "all.yaml").write_text("group: all\ntask:\n- group: inner\n  task: [one]\n")
    (tmp_path / "wording.py").write_text(FUNCTIONS)
    (tmp_path / "beside.py").write_text("import numpy\n")
    return tmp_path


def test_a_package_that_a_task_imports_later_is_not_reported(folder: Path) -> None:
    check_needs(["one", "all", "few", "unknown"], task_files(folder))


@pytest.mark.parametrize("name", ["one", "all", "few"])
@pytest.mark.parametrize(
    "module",
    [
        "import no_such.package\n",
        "from no_such import package\n",
        "try:\n    import no_such\nexcept ImportError as error:\n    raise error\n",
    ],
)
def test_a_package_that_is_not_installed_is_named(folder: Path, name: str, module: str) -> None:
    (folder / "beside.py").write_text(module)
    called = "one" if name == "one" else f"{name}: one"
    with pytest.raises(InputError, match=f"'{called}': it needs .* pip install no-such, or drop"):
        check_needs([name], task_files(folder))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("unsafe_code: true", "it runs code that the model writes"),
        ("dataset_path: colours.py", "its data set is a script"),
    ],
)
def test_a_task_that_cannot_run_is_refused(folder: Path, line: str, reason: str) -> None:
    with (folder / "common.yaml").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=f"'all: one': {reason}"):
        check_tasks(["all"], LocalTasks(path=str(folder)))


def test_tasks_that_let_the_model_write_are_known(folder: Path) -> None:
    own = LocalTasks(path=str(folder))
    names = ["one", "all", "few"]
    assert generative_tasks(names, own) == names  # lm-eval's default
    with (folder / "common.yaml").open("a") as file:
        file.write("output_type: multiple_choice\n")
    assert generative_tasks(names, own) == []
    (folder / "two.yaml").write_text("task: two\noutput_type: generate_until\ntag: few\n")
    (folder / "code.yaml").write_text("task: code\nclass: !function wording.Task\n")
    assert generative_tasks([*names, "two", "code", "unknown"], own) == ["few", "two"]
    of_lm_eval = ["hellaswag", "wikitext", "gsm8k", "lambada_openai", "triviaqa"]
    assert generative_tasks(of_lm_eval, None) == ["gsm8k", "triviaqa"]


def test_lm_evals_own_tasks_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tasks(["hellaswag", "arc_easy", "mmlu", "wikitext", "gsm8k"], None)
    with pytest.raises(InputError, match=r"'humaneval': it runs code"):
        check_tasks(["humaneval"], None)
    monkeypatch.setattr("importlib.util.find_spec", _without("langdetect"))
    with pytest.raises(InputError, match=r'langdetect: pip install "lm-eval\[ifeval\]"'):
        check_tasks(["ifeval"], None)


def _without(missing: str) -> object:
    import importlib.util

    found = importlib.util.find_spec

    def find(name: str) -> object:
        if name == "immutabledict":  # maybe missing here, and not what this is about
            return object()
        return None if name == missing else found(name)

    return find
