"""How the C library treats memory that tensors on a CPU have freed."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

LARGEST_BLOCK = 32 << 20
"""Bytes; glibc takes no more. Larger blocks are still fetched from the system one by one."""

KEPT_BYTES = 256 << 20
"""Freed memory beyond which a process gives some back."""


def keep_freed_memory() -> None:
    """Have this process keep freed blocks for the next ones of their size.

    glibc gives large blocks back at once, so that each batch's activations come in fresh pages,
    which the system must zero: a fifth of the time of pruning a small model. Of no effect with
    other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
