import platform
import subprocess
import sys

import pytest

BLOCKS = 20

PROGRAM = """
import ctypes
import sys
import torch
from pipeline.models.heap import each_block_returned, keep_freed_memory, return_freed_memory

class Heap(ctypes.Structure):  # struct mallinfo of malloc.h, which every glibc has
    _fields_ = [(name, ctypes.c_int) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]

libc = ctypes.CDLL(None)
libc.mallinfo.restype = Heap

def free_after(count):
    blocks = [torch.ones(1 << 20) for _ in range(count)]  # of 4 MiB each
    del blocks
    return libc.mallinfo().fordblks >> 22

print(free_after(int(sys.argv[1])))
keep_freed_memory()
with each_block_returned():
    print(free_after(int(sys.argv[1])))
print(free_after(int(sys.argv[1])))
with open("/proc/self/statm") as statm:
    before = int(statm.read().split()[1])
return_freed_memory()
with open("/proc/self/statm") as statm:
    print(before - int(statm.read().split()[1]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_blocks_stay_in_the_process_but_where_memory_is_short() -> None:
    printed = subprocess.check_output([sys.executable, "-c", PROGRAM, str(BLOCKS)], text=True)
    as_it_is, returned, kept, returned_pages = map(int, printed.split())
    assert as_it_is < BLOCKS / 2
    assert returned < BLOCKS / 2
    assert kept >= BLOCKS
    assert returned_pages * 4096 > BLOCKS / 2 * 2**22
