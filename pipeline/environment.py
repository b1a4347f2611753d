"""Environment variables: those that change numbers but are in no key, and a worker's scratch."""

import os

from pipeline.errors import InputError

CHANGES_NUMBERS = (
    "NVIDIA_TF32_OVERRIDE",  # cuBLAS rounds float32 products to ten bits
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",  # torch asks for the same
)


def scratch_folder() -> str | None:
    """Return the folder for large temporary files; None is the system's.

    A cluster gives each worker a folder that is removed even if the worker is killed.
    """
    return os.environ.get("CALPRUNE_SCRATCH")


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
