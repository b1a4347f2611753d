import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.models.hidden_states import TensorStore

CPU = torch.device("cpu")
BYTES = 4 * 6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CALPRUNE_SCRATCH", raising=False)
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("budgets", [(1000, 0), (0, 1000), (0, 0)])
def test_a_tensor_comes_back_as_it_was_put_there_and_keeps_its_place(
    budgets: tuple[int, int], dtype: torch.dtype, folder: Path
) -> None:
    first, second = torch.arange(6).view(2, 3).to(dtype), -torch.arange(6).view(2, 3).to(dtype)
    with TensorStore(CPU, *budgets) as store:
        stored = store.store(first.T)  # not contiguous
        place = stored.read().data_ptr()
        assert torch.equal(stored.read(), first.T)
        assert stored.read().is_contiguous()
        stored.write(second.T)
        assert torch.equal(stored.read(), second.T)
        assert torch.equal(first, torch.arange(6).view(2, 3).to(dtype))
        assert stored.read().data_ptr() == place
        assert len(files(folder)) == (budgets == (0, 0))


def test_files_begin_where_both_budgets_end(folder: Path) -> None:
    with TensorStore(CPU, 2 * BYTES, BYTES + BYTES // 2) as store:
        found = []
        for _ in range(5):
            store.store(torch.zeros(2, 3))
            found.append(len(files(folder)))
        assert found == [0, 0, 0, 1, 2]
        assert {path.stat().st_size for path in files(folder)} == {BYTES}


def test_the_files_are_gone_afterwards_even_after_an_error(folder: Path) -> None:
    def fail() -> None:
        with TensorStore(CPU, 0, 0) as store:
            store.store(torch.zeros(2, 3))
            assert len(files(folder)) == 1
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not list(folder.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_beyond_the_device_the_host_memory_is_pinned() -> None:
    device = torch.device("cuda")
    with TensorStore(device, BYTES, BYTES) as store:
        stored = [store.store(torch.ones(2, 3, device=device)) for _ in range(3)]
        assert stored[0]._tensor.is_cuda
        assert stored[1]._tensor.is_pinned()
        for each in stored:
            assert each.read().is_cuda
            each.write(torch.full((2, 3), 2.0, device=device))
            assert bool((each.read() == 2).all())
