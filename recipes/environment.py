"""What must be settled before torch is loaded. Imports nothing heavy."""

import os

# Matmul kernels that torch keeps for the shapes it has met (oneDNN), 0.6 MB each. Experts round
# their numbers of rows, so a mixture needs some hundreds and a dense model a few dozen; the default
# of 1,024 would keep many that are hardly used again.
KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
KERNELS_KEPT = 512


def prepare() -> None:
    """Keep fewer kernels, unless the user says how many."""
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))
