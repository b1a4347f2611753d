import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.errors import InputError
from pipeline.evaluation.task_data import copy_tasks
from pipeline.evaluation.tasks import missing_tasks
from pipeline.specs import LocalTasks, TestbedTasksSpec

TASK = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: colours.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: !function wording.ask
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    (folder / "more").mkdir(parents=True)
    (folder / "colours.yaml").write_text(TASK)
    (folder / "colours.jsonl").write_text("{}\n")
    (folder / "wording.py").write_text("def ask(document):\n    return 'what'\n")
    (folder / "more" / "group.yaml").write_text("group: 'all-of-it'\ntask:\n  - colours\n")
    return folder


def test_names_are_found_in_the_folder_and_among_lm_evals_without_importing_it(
    folder: Path,
) -> None:
    program = f"""
import sys
from pipeline.specs import LocalTasks
from pipeline.evaluation.tasks import missing_tasks
local = LocalTasks(path={str(folder)!r})
assert missing_tasks(["colours", "all-of-it", "boolq", "mmlu", "arc_easy"], local) == []
assert missing_tasks(["boolq", "no-such-task"], None) == ["no-such-task"]
assert not {{"lm_eval", "torch"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_only_unknown_names_are_missing(folder: Path) -> None:
    (folder / "tagged.yaml").write_text("task: tagged\ntag:\n  - a-list-of-tags\n")
    local = LocalTasks(path=str(folder))
    names = ["colours", "hellaswag", "no-such-task", "a-list-of-tags"]
    assert missing_tasks(names, local) == ["no-such-task"]
    assert missing_tasks(["colours", "boolq"], None) == ["colours"]


def test_the_testbeds_tasks_are_known_before_they_are_written() -> None:
    from pipeline.testbed.tasks import TASK_NAMES

    assert missing_tasks(list(TASK_NAMES), TestbedTasksSpec()) == []
    assert len(TASK_NAMES) > 0


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        missing_tasks(["colours"], LocalTasks(path=str(tmp_path / "none")))


def test_a_copy_names_the_data_beside_a_task_absolutely_and_changes_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    copy_tasks(folder, tmp_path / "copy", tmp_path / "cache")
    copied = (tmp_path / "copy" / "colours.yaml").read_text()
    assert "!function 'wording.ask'" in copied or "!function wording.ask" in copied
    plain = yaml.safe_load(copied.replace("!function", ""))
    expected = yaml.safe_load(TASK.replace("!function", ""))
    expected["dataset_kwargs"] = {
        "data_files": {"test": str(folder / "colours.jsonl")},
        "cache_dir": str(tmp_path / "cache"),
    }
    assert plain == expected
    assert (tmp_path / "copy" / "colours.jsonl").samefile(folder / "colours.jsonl")
    assert not (tmp_path / "copy" / "wording.py").samefile(folder / "wording.py")
    group = Path("more", "group.yaml")
    assert (tmp_path / "copy" / group).read_bytes() == (folder / group).read_bytes()
    assert (folder / "colours.yaml").read_text() == TASK


def test_a_task_file_that_does_not_parse_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.yaml").write_text("task: [\n")
    with pytest.raises(InputError, match=r"broken\.yaml"):
        copy_tasks(folder, tmp_path / "copy", tmp_path / "cache")


@pytest.mark.parametrize("named", ["/data/a.jsonl", "hf://datasets/a.jsonl", "en/on-the-hub.json"])
def test_a_copy_leaves_data_alone_that_does_not_stand_beside_the_task(
    folder: Path, tmp_path: Path, named: str
) -> None:
    content = TASK.replace("colours.jsonl", named)
    (folder / "colours.yaml").write_text(content)
    copy_tasks(folder, tmp_path / "copy", tmp_path / "cache")
    assert (tmp_path / "copy" / "colours.yaml").read_text() == content


def test_data_files_may_be_a_name_a_list_or_a_glob(folder: Path, tmp_path: Path) -> None:
    (folder / "b.jsonl").write_text("{}\n")
    for number, (given, found) in enumerate(
        [
            ("colours.jsonl", "colours.jsonl"),
            (["colours.jsonl", "b.jsonl"], ["colours.jsonl", "b.jsonl"]),
            ({"test": ["*.jsonl"]}, {"test": ["*.jsonl"]}),
        ]
    ):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        content = {"task": f"t{number}", "dataset_kwargs": {"data_files": given}}
        (folder / "colours.yaml").write_text(yaml.safe_dump(content))
        copy_tasks(folder, tmp_path / "copy", tmp_path / "cache")
        copied = (tmp_path / "copy" / "colours.yaml").read_text()
        options = yaml.safe_load(copied)["dataset_kwargs"]
        assert options["cache_dir"] == str(tmp_path / "cache")
        assert str(options["data_files"]).replace(f"{folder}/", "") == str(found)
