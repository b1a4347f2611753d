import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.credentials import CREDENTIALS_FILE, enclose_credentials
from jobs.grid import read_grid
from jobs.submit import GRID_FILE, pack, pinned_extra, submit_grid
from pipeline.errors import InputError

Content = dict[str, Any]
Packed = Callable[[Content], Path]


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packed:
    """Pack a grid from outside the folder in which it is submitted."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def pack_content(content: Content) -> Path:
        path = tmp_path / "elsewhere.yaml"
        path.write_text(yaml.safe_dump(content))
        folder = tmp_path / "job"
        folder.mkdir()
        pack(read_grid(path), path, folder)
        return folder

    return pack_content


def test_a_jobs_folder_has_everything_that_a_run_needs_and_its_version(
    packed: Packed, content: Content
) -> None:
    folder = packed(content)
    program = (
        "import jobs, importlib.metadata as m; from pathlib import Path;"
        f"from jobs.grid import read_grid; print(read_grid(Path('{GRID_FILE}')).name,"
        "m.version('calprune'), Path(jobs.__file__).parents[1].samefile('.'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True
    )
    assert run.stdout.split() == ["small", metadata.version("calprune"), "True"], run.stderr


def test_files_with_relative_paths_are_packed(packed: Packed, content: Content) -> None:
    Path("texts").mkdir()
    for name in ("a.txt", "b.txt"):
        Path("texts", name).write_text(name)
    content["corpora"]["notes"] = {"kind": "file-corpus", "path": "texts/*.txt"}
    content["corpora"]["c4"] = {
        "kind": "hub-corpus", "path": "allenai/c4", "data_files": "en/c4.json.gz"
    }  # fmt: skip
    folder = packed(content)
    assert {path.name for path in (folder / "texts").iterdir()} == {"a.txt", "b.txt"}
    assert not (folder / "en").exists()


def test_every_kind_of_file_with_a_relative_path_is_packed(
    packed: Packed, content: Content
) -> None:
    """Files that only a calibration, a mixture or the evaluation names are packed too."""
    for name in ("words.txt", "part.txt", "built/a.jsonl", "built/b.jsonl", "set/x.parquet"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    for name in ("sets/acme/questions", "tasks", "model"):
        Path(name).mkdir(parents=True)
        Path(name, "file").write_text(name)
    content["corpora"] |= {
        "part": {"kind": "file-corpus", "path": "./part.txt"},
        "built": {"kind": "hub-corpus", "path": "json", "data_files": ["built/*.jsonl"]},
        "folder": {"kind": "hub-corpus", "path": "set"},
    }
    content["models"]["mine"] = {"kind": "local-model", "path": "model"}
    content["calibrations"]["own"] |= {
        "prefixes": {"part": 1, "other": 1},
        "banned_words": "words.txt",
    }
    content["calibrations"]["nested"] = {
        "prefixes": "other",
        "generator": {"pruner": "wanda", "sparsity": 0.5, "calibration": "own"},
    }
    content["cells"]["calibration"] = ["nested"]
    content["evaluate"] |= {
        "datasets": {"kind": "local-datasets", "path": "sets"},
        "task_folder": {"kind": "local-tasks", "path": "tasks"},
    }
    named = {*Path().rglob("*")}
    folder = packed(content)
    assert {path for path in named if not (folder / path).exists()} == set()


@pytest.mark.parametrize("name", ["built/none.jsonl", "../outside.jsonl"])
def test_a_builders_files_that_cannot_be_packed_are_refused(
    packed: Packed, content: Content, name: str
) -> None:
    Path("../outside.jsonl").write_text("{}")
    content["corpora"]["built"] = {"kind": "hub-corpus", "path": "json", "data_files": name}
    with pytest.raises(
        InputError, match=r"corpora\.built\.data_files: .*(does not exist here|leads out)"
    ):
        packed(content)


@pytest.mark.parametrize(
    ("path", "remedy"),
    [("no-such.txt", "does not exist here"), ("../*.yaml", "leads out of this folder")],
)
def test_a_relative_path_that_cannot_be_packed_is_refused(
    packed: Packed, content: Content, path: str, remedy: str
) -> None:
    content["corpora"]["notes"] = {"kind": "file-corpus", "path": path}
    with pytest.raises(InputError, match=f"corpora.notes.path.*{remedy}"):
        packed(content)


def test_a_file_that_exists_only_on_the_nodes_is_accepted(packed: Packed, content: Content) -> None:
    content["corpora"]["notes"] = {"kind": "file-corpus", "path": "/on/the/nodes/*.jsonl"}
    assert (packed(content) / GRID_FILE).is_file()


def test_an_extra_is_pinned_to_the_versions_that_are_installed_here() -> None:
    assert pinned_extra("s3") == [f"s3fs=={metadata.version('s3fs')}"]
    with pytest.raises(InputError, match=r"known are .*s3"):
        pinned_extra("s4")


def test_an_unset_variable_is_an_error_before_anything_is_sent(
    tmp_path: Path, content: Content
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="env: 'NOT_SET_HERE': is not set here"):
        submit_grid(None, path, "s3://b/s", variables=["NOT_SET_HERE"])


def test_a_dtype_that_depends_on_this_machines_cpu_is_refused(
    tmp_path: Path, content: Content
) -> None:
    """With GPUs the dtype depends on the grid alone, and the check goes on to the next mistake."""
    content["models"] = {"testbed": {"kind": "hub-model", "name": "a/b", "dtype": "auto"}}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"models\.testbed\.dtype: 'auto': .*write bfloat16"):
        submit_grid(None, path, "s3://b/s", variables=["NOT_SET_HERE"])
    path.write_text(yaml.safe_dump({**content, "resources": {"prune": {"gpus": 1}}}))
    with pytest.raises(InputError, match="NOT_SET_HERE"):
        submit_grid(None, path, "s3://b/s", variables=["NOT_SET_HERE"])


def test_credentials_are_packed_with_the_code_and_readable_by_its_owner_only(
    packed: Packed, content: Content
) -> None:
    folder = packed(content)
    enclose_credentials(folder, {"TOKEN": "a 'secret'"})
    assert (folder / CREDENTIALS_FILE).stat().st_mode & 0o077 == 0
    program = (
        "import os; from cluster.credentials import set_credentials; set_credentials(); "
        "print(os.environ['TOKEN'])"
    )
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=kept, capture_output=True, text=True
    )
    assert run.stdout == "a 'secret'\n", run.stderr
