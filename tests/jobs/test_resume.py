"""A killed pruning continues with the first unfinished decoder layer."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

import pipeline.pruning.prune
import pipeline.pruning.window_groups
from cluster.graph import Stage
from cluster.helpers import Helpers
from cluster.run import run_graph
from cluster.store import Manifest, Partial, Store
from jobs.stages import StageWork, execute
from pipeline.models.hidden_states import TensorStore
from pipeline.models.layer_files import layer_file
from pipeline.specs import (
    FileCorpus,
    LocalModel,
    Magnitude,
    Pruner,
    PruneSpec,
    SparseGPT,
    Wanda,
    WindowsSpec,
)

LAYERS = 4
LAST_KEPT = 1
"""The layer after which the process is killed; 0 and 1 are finished by then."""

CONFIG = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
FACTS: dict[str, Any] = {
    "kind": "prune",
    "spec": {},
    "seconds": 1.0,
    "peak_memory_bytes": None,
    "versions": {},
    "host": "here",
}


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """Restore threads and determinism, which a stage sets for its whole process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(folder)
    return LocalModel(path=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    ids = torch.randint(1, 96, (8, 24), generator=torch.Generator().manual_seed(3))
    table = pa.table({"token_ids": pa.array(ids.tolist(), pa.list_(pa.int32()))})
    pq.write_table(table, folder / "windows.parquet")
    return folder


def pruning(dense: LocalModel, pruner: Pruner) -> PruneSpec:
    windows = WindowsSpec(source=FileCorpus(path="unread"), model=dense, nsamples=8, seqlen=24)
    return PruneSpec(
        model=dense,
        pruner=pruner,
        sparsity=0.5,
        calibration=windows if pruner.calibrated else None,
    )


def prune(
    spec: PruneSpec,
    calibration: Path,
    store: Store,
    settings: Mapping[str, int] = MappingProxyType({}),
) -> Manifest:
    """Make the stage as a worker does."""
    artifacts = {} if spec.calibration is None else {spec.calibration.key: calibration}
    with store.attempt(spec.key) as attempt:
        payload = StageWork(spec=spec, settings=dict(settings)).model_dump_json()
        report = execute(payload, artifacts, attempt.folder, 1, attempt.partial)
        return attempt.commit(report=report, **FACTS)


def test_memory_budgets_reach_the_pruning_and_change_no_byte(
    dense: LocalModel, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = pruning(dense, Wanda())
    store = Store(str(tmp_path / "store"))
    usual = prune(spec, calibration, store)
    asked: list[tuple[int, int]] = []

    class NotingStore(TensorStore):
        def __init__(self, device: torch.device, device_bytes: int, host_bytes: int) -> None:
            asked.append((device_bytes, host_bytes))
            super().__init__(device, device_bytes, host_bytes)

    monkeypatch.setattr(pipeline.pruning.window_groups, "TensorStore", NotingStore)
    settings = {"device_hidden_bytes": 0, "host_hidden_bytes": 7}
    manifest = prune(spec, calibration, Store(str(tmp_path / "other")), settings)
    assert asked == [(0, 7)]
    assert manifest.files == usual.files


def die_after(number: int, partial: Partial, die: Any) -> None:
    """End the process as soon as that layer is kept."""
    keep = partial.keep

    def keep_and_die(path: Path) -> None:
        keep(path)
        if path.name == layer_file(number):
            die()

    partial.keep = keep_and_die  # type: ignore[method-assign]


KILLED = """
import os, signal, sys
from pathlib import Path
from cluster.store import Store
from jobs.stages import StageWork
from tests.jobs.test_resume import LAST_KEPT, die_after, execute

url, calibration, payload = sys.argv[1:]
spec = StageWork.model_validate_json(payload).spec
artifacts = {} if spec.calibration is None else {spec.calibration.key: Path(calibration)}
with Store(url).attempt(spec.key) as attempt:
    die_after(LAST_KEPT, attempt.partial, lambda: os.kill(os.getpid(), signal.SIGKILL))
    execute(payload, artifacts, attempt.folder, 1, attempt.partial)
"""


@pytest.mark.parametrize("pruner", [Magnitude(), SparseGPT()], ids=lambda pruner: pruner.name)
def test_a_killed_pruning_continues_with_the_bytes_of_an_undisturbed_one(
    dense: LocalModel,
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pruner: Pruner,
) -> None:
    spec = pruning(dense, pruner)
    whole = prune(spec, calibration, Store(str(tmp_path / "whole")))
    url = str(tmp_path / "killed")
    words = [url, str(calibration), StageWork(spec=spec).model_dump_json()]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *words], capture_output=True, text=True, cwd=Path.cwd()
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    store = Store(url)
    assert store.keys() == set()
    kept = [path.name.split("-", 2)[2] for path in (tmp_path / "killed/partial").rglob("*-layer-*")]
    assert sorted(kept) == [layer_file(0), layer_file(1)]

    pruned: list[str] = []
    original = pipeline.pruning.prune._prune_matrix
    monkeypatch.setattr(
        "pipeline.pruning.prune._prune_matrix",
        lambda matrix, *rest: pruned.append(matrix.name) or original(matrix, *rest),  # type: ignore[func-returns-value]
    )
    again = prune(spec, calibration, store)
    assert {int(name.split(".")[2]) for name in pruned} == {2, 3}
    assert again.files == whole.files
    assert again.report == {**whole.report, "resumed_layers": 2}
    assert whole.report["resumed_layers"] == 0
    assert [path for path in (tmp_path / "killed/partial").rglob("*") if path.is_file()] == []


def test_a_kept_layer_that_is_damaged_is_pruned_again(
    dense: LocalModel, calibration: Path, tmp_path: Path
) -> None:
    spec = pruning(dense, SparseGPT())
    whole = prune(spec, calibration, Store(str(tmp_path / "whole")))
    store = Store(str(tmp_path / "store"))
    break_off(spec, calibration, store)
    (first,) = (tmp_path / "store/partial").rglob(f"*-{layer_file(0)}")
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    again = prune(spec, calibration, store)
    assert again.report["resumed_layers"] == 1
    assert again.files == whole.files


def break_off(spec: PruneSpec, calibration: Path, store: Store) -> None:
    """Run an attempt that fails after some layers."""
    artifacts = {} if spec.calibration is None else {spec.calibration.key: calibration}

    def fail() -> None:
        raise ZeroDivisionError

    def attempt_it() -> None:
        with store.attempt(spec.key) as attempt:
            die_after(LAST_KEPT, attempt.partial, fail)
            execute(
                StageWork(spec=spec).model_dump_json(),
                artifacts,
                attempt.folder,
                1,
                attempt.partial,
            )

    with pytest.raises(ZeroDivisionError):
        attempt_it()


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda pruner: pruner.name)
def test_a_remote_store_keeps_finished_layers_too(
    dense: LocalModel, calibration: Path, tmp_path: Path, pruner: Pruner
) -> None:
    spec = pruning(dense, pruner)
    whole = prune(spec, calibration, Store(str(tmp_path / "whole")))
    store = Store(f"memory://{uuid.uuid4().hex}")
    break_off(spec, calibration, store)
    again = prune(spec, calibration, store)
    assert again.report["resumed_layers"] == 2
    assert again.files == whole.files


def test_kept_layers_are_not_used_by_another_pruning(
    dense: LocalModel, calibration: Path, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "store"))
    break_off(pruning(dense, Wanda()), calibration, store)
    other = pruning(dense, Wanda()).model_copy(update={"sparsity": 0.6})
    assert prune(other, calibration, store).report["resumed_layers"] == 0


@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_is_killed_within_a_pruning_loses_only_one_layer(
    dense: LocalModel, calibration: Path, tmp_path: Path
) -> None:
    spec = pruning(dense, SparseGPT())
    store = Store(str(tmp_path / "store"))
    marker = tmp_path / "died"

    def windows_then_dying_prune(
        payload: str,
        artifacts: Mapping[str, Path],
        output: Path,
        cpus: int,
        partial: Partial,
        helpers: Helpers,
    ) -> dict[str, Any]:
        if payload == "windows":
            content = (calibration / "windows.parquet").read_bytes()
            (output / "windows.parquet").write_bytes(content)
            return {}
        if not marker.exists():
            marker.touch()
            die_after(LAST_KEPT, partial, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return execute(payload, artifacts, output, cpus, partial)

    assert spec.calibration is not None
    windows = stage(spec.calibration.key, "windows")
    pruned = stage(spec.key, StageWork(spec=spec).model_dump_json(), spec.calibration.key)
    outcome = run_graph(
        {windows.key: windows, pruned.key: pruned},
        [pruned.key],
        windows_then_dying_prune,
        store,
        {},
    )
    assert outcome.failed == {}
    assert marker.exists()
    manifest = store.manifest(spec.key)
    assert manifest is not None
    assert manifest.report["resumed_layers"] == 2


def stage(key: str, payload: str, *inputs: str) -> Stage:
    kind = key.split("-")[0]
    return Stage(key=key, kind=kind, label=kind, spec={}, payload=payload, inputs=inputs)
