"""Hidden states on the device, in host memory or in files, as two budgets allow."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from pipeline.environment import scratch_folder


class StoredTensor:
    """A tensor that stays in one place, is read on the device and overwritten in place."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._tensor = tensor
        self._device = device

    def read(self) -> Tensor:
        """Return the tensor on the device; the stored one itself if it is there."""
        return self._tensor.to(self._device, non_blocking=True)

    def fits(self, value: Tensor) -> bool:
        """Return whether a tensor has the stored one's shape and dtype."""
        return (value.shape, value.dtype) == (self._tensor.shape, self._tensor.dtype)

    def follows(self, value: Tensor) -> bool:
        """Return whether a tensor has the stored one's texts and tokens, its first two sizes."""
        return value.shape[:2] == self._tensor.shape[:2] and value.is_floating_point()

    def write(self, value: Tensor) -> None:
        """Overwrite the stored tensor with one of the same shape and dtype."""
        self._tensor.copy_(value, non_blocking=True)


class TensorStore:
    """Stores tensors on the device up to a budget, then in host memory up to another, then in
    files.

    Host memory is pinned where the device is a GPU, so that copies do not block. Files are mapped
    to memory; they are in a temporary folder that is removed when the context is left. On a CPU,
    device and host are one, and the budgets add up.
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

    def store(self, value: Tensor, before: StoredTensor | None = None) -> StoredTensor:
        """Store a copy of a tensor, contiguous everywhere: strides can move the last bit of what is
        computed from it.

        Args:
            before: a stored tensor that is no longer needed, whose place is taken if it fits.

        Raises:
            OSError: if the disk is full.
        """
        if before is not None and before.fits(value):
            before.write(value)
            return before
        size = value.numel() * value.dtype.itemsize
        if size <= self._left_on_device:
            self._left_on_device -= size
            copied = torch.empty(value.shape, dtype=value.dtype, device=self.device)
            copied.copy_(value)
        elif size <= self._left_on_host:
            self._left_on_host -= size
            pinned = self.device.type == "cuda"
            copied = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
            copied.copy_(value)
        else:
            copied = self._mapped(value)
        return StoredTensor(copied, self.device)

    def _mapped(self, value: Tensor) -> Tensor:
        if self._folder is None:
            folder = tempfile.TemporaryDirectory(prefix="calprune-", dir=scratch_folder())
            self._folder = Path(self._exit.enter_context(folder))
        path = self._folder / str(self._files)
        self._files += 1
        flat = value.cpu().reshape(-1)
        flat.view(torch.uint8).numpy().tofile(path)
        mapped = torch.from_file(str(path), shared=True, size=len(flat), dtype=value.dtype)
        return mapped.view(value.shape)
