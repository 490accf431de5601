"""What every test stands on: a seed, and no silent non-determinism."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    """Seeded; and `torch.empty` is filled with NaN, so a weight nobody initialised is found."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
