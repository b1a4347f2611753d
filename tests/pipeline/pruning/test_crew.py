"""A pruning that several processes share gives the same bytes, whatever their number."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.data.windows import CalibrationWindow, write_windows
from pipeline.models.matrices import decoder_layers, matrices
from pipeline.pruning import outliers, prune, shared_model
from pipeline.pruning.crew import _owners
from pipeline.pruning.groups import Share, merge, total
from pipeline.pruning.observed_inputs import InputSums
from pipeline.specs import (
    OWL,
    RIA,
    DSnoT,
    FileCorpus,
    FirstLayers,
    LocalModel,
    PruneSpec,
    SparseGPT,
    Wanda,
    WindowsSpec,
)
from tests.pipeline.models.test_layer_files import save_tokenizer
from tests.pipeline.models.test_streaming import CONFIGS, contents
from tests.pipeline.pruning.test_finished_layers import Kept, Stopped
from tests.pipeline.tiny_models import windows

GROUPS = 5


class Copies:
    """Helpers in this process, which are given copies of everything, as processes are."""

    def __init__(self, helpers: list[Any]) -> None:
        self.helpers = helpers
        self.count = len(helpers)
        self.calls: list[tuple[int, str]] = []
        self.models: list[Any] = []

    def call(self, helper: int, method: str, *arguments: Any, returns: int = 1) -> Any:
        self.calls.append((helper, method))
        made = getattr(self.helpers[helper], method)(*copied(arguments))
        assert returns == 1 or len(made) == returns
        return list(map(copied, made)) if returns > 1 else copied(made)

    def value(self, promise: Any) -> Any:
        return copied(promise)


def copied(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.fixture(params=["llama", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> LocalModel:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    made.save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    return LocalModel(path=str(tmp_path / "dense"), dtype="float32")


def spec_of(model: LocalModel, name: str, **fields: Any) -> PruneSpec:
    given: dict[str, Any] = {
        "wanda": {"pruner": Wanda()},
        "2:4": {"pruner": Wanda(), "pattern": "2:4"},
        "sparsegpt": {"pruner": SparseGPT()},
        "dsnot": {"pruner": DSnoT(scope="all")},
        "ria": {"pruner": RIA(permutation=True), "pattern": "2:4"},
        "first layers": {"pruner": Wanda(), "allocation": FirstLayers(share=0.4)},
        "owl": {"pruner": Wanda(), "allocation": OWL()},
    }[name]
    data = WindowsSpec(source=FileCorpus(path="unread"), model=model, nsamples=6, seqlen=24)
    groups = {"window_groups": GROUPS} | fields
    return PruneSpec(model=model, sparsity=0.5, calibration=data, **given, **groups)


def crew_of(helper: Any, spec: Any, artifacts: Any, members: int) -> Copies:
    """Return helpers, each with a model of its own."""
    made = []
    for member in range(1, members):
        made.append((helper(spec, artifacts, member, members), dict(shared_model._latest._held)))
        shared_model._latest.forget()
    crew = Copies([each for each, _ in made])
    crew.models = [model for _, model in made]
    return crew


def shared(spec: PruneSpec, folder: Path, members: int, keep: Any = None) -> dict[str, bytes]:
    """Prune with so many processes."""
    assert spec.calibration is not None
    artifacts = {spec.calibration.key: folder / "windows"}
    if not artifacts[spec.calibration.key].exists():
        artifacts[spec.calibration.key].mkdir(parents=True)
        rows = windows(6, 24).numpy()
        write_windows([CalibrationWindow("none", 0, row) for row in rows], folder / "windows")
    if spec.outliers is not None:
        artifacts[spec.outliers.key] = folder / f"outliers-{members}"
        artifacts[spec.outliers.key].mkdir()
        counting = crew_of(outliers.helper, spec.outliers, artifacts, members)
        outliers.run(spec.outliers, artifacts, artifacts[spec.outliers.key], counting)
    crew = crew_of(prune.helper, spec, artifacts, members)
    output = folder / f"{members} members"
    output.mkdir(exist_ok=True)
    report = prune.run(spec, artifacts, output, keep, crew)
    assert report.pop("resumed_layers") == (0 if keep is None else 1)
    files = contents(output)
    if spec.outliers is not None:
        files |= contents(artifacts[spec.outliers.key])
    assert {(helper, "advance") for helper in range(members - 1)} <= set(crew.calls)
    return {**files, "report": repr(report).encode()}


@pytest.mark.parametrize(
    "name", ["wanda", "2:4", "sparsegpt", "dsnot", "ria", "first layers", "owl"]
)
def test_any_number_of_processes_gives_the_same_bytes(
    name: str, model: LocalModel, tmp_path: Path
) -> None:
    spec = spec_of(model, name)
    alone = shared(spec, tmp_path, 1)
    for members in (2, 4):
        assert shared(spec, tmp_path, members) == alone, members


def test_a_second_attempt_with_other_processes_gives_the_same_bytes(
    model: LocalModel, tmp_path: Path
) -> None:
    spec = spec_of(model, "sparsegpt")
    alone = shared(spec, tmp_path / "alone", 1)
    kept = Kept(1)
    with pytest.raises(Stopped):
        shared(spec, tmp_path / "shared", 3, kept)
    kept.most = 99
    assert shared(spec, tmp_path / "shared", 2, kept) == alone


def test_groups_move_only_last_bits(model: LocalModel, tmp_path: Path) -> None:
    """The sums of one group and of several are of the same tokens."""
    one = shared(spec_of(model, "wanda", window_groups=1), tmp_path / "one", 1)
    several = shared(spec_of(model, "wanda"), tmp_path / "several", 1)
    assert one["sparsity.parquet"] == several["sparsity.parquet"]
    for name in one:
        if name.endswith(".safetensors"):
            bits = [
                torch.frombuffer(bytearray(each[name]), dtype=torch.uint8)
                for each in (one, several)
            ]
            assert float((bits[0] != bits[1]).float().mean()) < 0.01


@pytest.mark.parametrize("groups", [1, 2, 5, 8])
def test_every_window_is_in_one_group_and_every_group_with_one_process(groups: int) -> None:
    data = windows(11, 4)
    for members in range(1, groups + 1):
        shares = [Share(groups, member, members) for member in range(members)]
        owned = [group for share in shares for group in share.own]
        assert owned == list(range(groups))
        parts = [share.windows(data, group) for share in shares for group in share.own]
        assert torch.equal(torch.cat(parts), data)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("groups", [1, 2, 5, 8])
def test_sums_are_added_in_one_order_whoever_has_them(groups: int) -> None:
    """By numbers whose sum depends on the order."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(groups, 1, 7, 3, generator=generator) * 1e3
    reached = set()
    for members in range(1, groups + 1):
        parts = []
        for member in range(members):
            sums = {}
            for group in Share(groups, member, members).own:
                sums[group, group + 1] = InputSums(("squared_norms",), groups)
                sums[group, group + 1].add("matrix", inputs[group], "matrix")
                merge(sums, 0, groups)
            parts.append(copied(sums))
        for order in itertools.islice(itertools.permutations(parts), 6):
            whole = total(copied(list(order)), groups)
            reached.add(whole._sums["matrix"]["squared_norms"].value.numpy().tobytes())
    assert len(reached) == 1
    expected = inputs.double().square().sum(dim=(0, 1, 2)).float()
    found = torch.frombuffer(bytearray(reached.pop()), dtype=torch.float32)
    torch.testing.assert_close(found, expected)


def test_matrices_are_spread_so_that_no_process_has_much_more_work(model: LocalModel) -> None:
    made = transformers.AutoModelForCausalLM.from_pretrained(model.path)
    root, layers = decoder_layers(made)
    found = matrices(f"{root}.0", layers[0])
    for members, masks in itertools.product((1, 2, 3), (True, False)):
        owners = _owners(found, members, masks)
        assert sorted(itertools.chain(*owners)) == sorted(matrix.name for matrix in found)
        assert all(owners)


def test_more_groups_than_windows_are_refused(model: LocalModel) -> None:
    with pytest.raises(ValueError, match="window_groups 7 is more than the windows, 6: lower it"):
        spec_of(model, "wanda", window_groups=7)


def test_one_group_leaves_the_key_as_it_was(model: LocalModel) -> None:
    one, several = spec_of(model, "owl", window_groups=1), spec_of(model, "owl")
    assert "window_groups" not in one.lineage
    assert one.outliers is not None
    assert "window_groups" not in one.outliers.lineage
    assert several.lineage["window_groups"] == GROUPS
