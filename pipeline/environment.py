"""Environment variables that change numbers, and are no part of a key."""

import os

from pipeline.errors import InputError

CHANGES_NUMBERS = (
    "NVIDIA_TF32_OVERRIDE",  # cuBLAS rounds float32 products to ten bits
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",  # torch asks for the same
)


def check_environment() -> None:
    """Check that no variable is set that makes products coarser than a spec's dtype.

    Variables that only choose among kernels of one precision (`MKL_CBWR`, `ATEN_CPU_CAPABILITY`)
    are like other hardware: they move last bits.

    Raises:
        InputError: naming the variable.
    """
    for name in CHANGES_NUMBERS:
        value = os.environ.get(name, "")
        if value not in ("", "0"):
            remedy = "makes float32 products coarser, and no key says so: unset it on every node"
            raise InputError(f"environment.{name}", value, remedy)
