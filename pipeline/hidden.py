"""Where hidden states live: on the device, in host memory or in files, as two budgets say."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor


class Kept:
    """A tensor that is kept in one place, read on the device and overwritten in place."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._tensor = tensor
        self._device = device

    def read(self) -> Tensor:
        """The tensor on the device; the kept one itself if that is where it lives."""
        return self._tensor.to(self._device, non_blocking=True)

    def write(self, value: Tensor) -> None:
        """Put a tensor of the same shape and dtype in its place."""
        self._tensor.copy_(value, non_blocking=True)


class Shelf:
    """Keeps tensors on the device up to a budget, then in host memory up to another, then in files.

    Host memory is pinned where the device is a GPU, so that copies do not block. Files are mapped
    to memory and lie in a folder of the system's temporary one, which leaving the context removes.
    On the CPU device and host are one, and the budgets add up.
    """

    def __init__(self, device: torch.device, device_bytes: int, host_bytes: int) -> None:
        self.device = device
        self._left_on_device = device_bytes
        self._left_on_host = host_bytes
        self._exit = ExitStack()
        self._folder: Path | None = None
        self._files = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def keep(self, value: Tensor) -> Kept:
        """A copy of a tensor, contiguous wherever it lives: strides can move the last bit of what
        is computed from it."""
        kept = Kept(self._empty(value.shape, value.dtype), self.device)
        kept.write(value)
        return kept

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = shape.numel() * dtype.itemsize
        if size <= self._left_on_device:
            self._left_on_device -= size
            return torch.empty(shape, dtype=dtype, device=self.device)
        if size <= self._left_on_host:
            self._left_on_host -= size
            return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        return torch.from_file(
            str(self._new_file(size)), shared=True, size=shape.numel(), dtype=dtype
        ).view(shape)

    def _new_file(self, size: int) -> Path:
        if self._folder is None:
            folder = tempfile.TemporaryDirectory(prefix="calprune-")
            self._folder = Path(self._exit.enter_context(folder))
        path = self._folder / str(self._files)
        self._files += 1
        with path.open("wb") as file:  # a full disk is an error here, and a crash when mapped
            os.posix_fallocate(file.fileno(), 0, size)
        return path
