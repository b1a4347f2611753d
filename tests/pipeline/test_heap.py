import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
import torch
from pipeline.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def work():
    for _ in range(50):
        (torch.ones(1 << 20) + 1) * 2  # three blocks of 4 MiB
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_blocks_that_were_freed_come_back_without_fresh_pages() -> None:
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", PROGRAM, how], text=True))
        for how in ("kept", "as it is")
    }
    assert faults["kept"] < 100 < faults["as it is"]
