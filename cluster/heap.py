"""How glibc treats the memory that CPU tensors have freed."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

LARGEST_BLOCK = 32 << 20
"""Bytes; glibc's upper bound. Larger blocks still come from the system one by one."""

KEPT_BYTES = 256 << 20
"""Free memory at the top of the heap above which a process returns some to the system."""


def keep_freed_memory() -> None:
    """Have this process keep freed blocks and reuse them.

    By default glibc returns large blocks at once. Each batch's activations then get fresh pages,
    which the system must zero: a fifth of the time of pruning a small model. No effect with other
    C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
