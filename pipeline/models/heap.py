"""How glibc treats the memory that CPU tensors have freed. No effect with other C libraries."""

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

LARGEST_BLOCK = 32 << 20
"""Bytes; glibc's upper bound. Larger blocks still come from the system one by one."""

SMALL_BLOCK = 2 << 20
"""Bytes of the smallest block that comes from the system alone where memory is short."""

KEPT_BYTES = 256 << 20
"""Free memory at the top of the heap above which a process returns some to the system."""


def keep_freed_memory() -> None:
    """Have this process keep freed blocks and reuse them.

    By default glibc returns large blocks at once. Each batch's activations then get fresh pages,
    which the system must zero: a fifth of the time of pruning a small model.
    """
    _set(_M_MMAP_THRESHOLD, LARGEST_BLOCK)
    _set(_M_TRIM_THRESHOLD, KEPT_BYTES)


@contextlib.contextmanager
def each_block_returned() -> Iterator[None]:
    """Return every block that is not small to the system when it is freed.

    Kept blocks of many sizes leave room between them that nothing else fits: a quarter of what a
    small model takes that is read by layer, and never the same twice. Freed memory is kept again
    afterwards.
    """
    _set(_M_MMAP_THRESHOLD, SMALL_BLOCK)
    _set(_M_TRIM_THRESHOLD, SMALL_BLOCK)
    return_freed_memory()
    try:
        yield
    finally:
        keep_freed_memory()


def return_freed_memory() -> None:
    """Give free pages between the heap's blocks back to the system.

    Without this call a pruning grows by more than the weights of a layer with every layer. A call
    takes milliseconds.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _set(parameter: int, value: int) -> None:
    libc = _glibc()
    if libc is not None:
        libc.mallopt(parameter, value)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
