"""What must be settled before torch is loaded. Imports nothing heavy."""

import os

# Matmul kernels that torch keeps for shapes it has met (oneDNN). Experts meet new row counts in
# every batch and a kernel takes 0.6 MB, so the default of 1,024 grows to 0.7 GB of kernels that are
# hardly used again; a dense model needs a few dozen.
KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
KERNELS_KEPT = 512


def prepare() -> None:
    """Keep fewer kernels, unless the user says how many."""
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))
