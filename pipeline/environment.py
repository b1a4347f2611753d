"""Environment variables that change numbers but are in no key."""

import os

from pipeline.errors import InputError

CHANGES_NUMBERS = (
    "NVIDIA_TF32_OVERRIDE",  # cuBLAS rounds float32 products to ten bits
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",  # torch asks for the same
)


def check_environment() -> None:
    """Check that no variable makes products coarser than a spec's dtype.

    Variables that only select kernels of one precision (`MKL_CBWR`, `ATEN_CPU_CAPABILITY`) change
    last bits, as other hardware does.

    Raises:
        InputError: if one does; it names the variable.
    """
    for name in CHANGES_NUMBERS:
        value = os.environ.get(name, "")
        if value not in ("", "0"):
            remedy = "makes float32 products coarser, and no key says so: unset it on every node"
            raise InputError(f"environment.{name}", value, remedy)
