import platform
import subprocess
import sys

import pytest

BLOCKS = 20

PROGRAM = """
import ctypes
import sys
import torch
from cluster.heap import keep_freed_memory

class Heap(ctypes.Structure):  # struct mallinfo of malloc.h, which every glibc has
    _fields_ = [(name, ctypes.c_int) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]

if sys.argv[1] == "kept":
    keep_freed_memory()
blocks = [torch.ones(1 << 20) for _ in range(int(sys.argv[2]))]  # of 4 MiB each
del blocks
libc = ctypes.CDLL(None)
libc.mallinfo.restype = Heap
print(libc.mallinfo().fordblks >> 22)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_blocks_stay_in_the_process() -> None:
    free = {
        how: int(
            subprocess.check_output([sys.executable, "-c", PROGRAM, how, str(BLOCKS)], text=True)
        )
        for how in ("kept", "as it is")
    }
    assert free["as it is"] < BLOCKS / 2 < BLOCKS <= free["kept"]
