"""Specs of every number format and numbers to try them on, for tests."""

import os
from contextlib import contextmanager

import pytest
import torch
from torch.testing import assert_close

from layers.precision.formats import FORMATS
from layers.precision.spec import QSpec

LOW = [row for row in FORMATS if row.dtype is None]
EVERY = [  # each format with each of its rules and tiles
    QSpec(format=row.name, scale_rule=rule, tile=tile)
    for row in LOW
    for rule in row.scale_rules or (None,)
    for tile in row.tiles
]
SPECS = [  # one of each format, and the tiles of two
    *(QSpec(format=row.name) for row in LOW),
    QSpec(format="nvfp4", tile="2d"),
    QSpec(format="fp8_e4m3", scope="block", tile="2d"),
]


def name_of(spec):
    options = (spec.format, spec.scale_rule, spec.tile, spec.scope)
    return "-".join(str(option) for option in options if option is not None)


every_spec = pytest.mark.parametrize("spec", EVERY, ids=name_of)
some_specs = pytest.mark.parametrize("spec", SPECS, ids=name_of)


@contextmanager
def kernels(mode):
    """MOE_ZOO_KERNELS=mode inside."""
    before = os.environ.get("MOE_ZOO_KERNELS")
    os.environ["MOE_ZOO_KERNELS"] = mode
    try:
        yield
    finally:
        os.environ.pop("MOE_ZOO_KERNELS")
        if before is not None:
            os.environ["MOE_ZOO_KERNELS"] = before


def assert_same_bits(a, b):
    """Equal in shape and down to the sign of zero; any NaN equals any NaN."""
    if isinstance(a, tuple):  # a Quantized is one
        for one, other in zip(a, b, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_same_bits(one, other)
        return
    assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert_close(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


def relative_error(got, wanted):
    """Mean square of the error over that of the numbers."""
    return ((got - wanted).double().square().mean() / wanted.double().square().mean()).item()


def hard(rows, cols, seed, kind):
    """Numbers of every size: Gaussian, all binades, any bits at all, or with special values."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=g)
    if kind == "binades":
        x = x * torch.exp2(torch.randint(-149, 127, (rows, cols), generator=g).float())
    if kind == "bits":
        x = torch.randint(-(2**31), 2**31, (rows, cols), generator=g).int().view(torch.float32)
    if kind == "ties":  # few distinct sizes: midpoints of the grids are hit all the time
        x = torch.randint(-64, 65, (rows, cols), generator=g) / 8 * 2.0 ** float(seed % 40 - 20)
    if kind == "special":
        which = torch.randint(0, 40, (rows, cols), generator=g)
        inf, nan = torch.inf, torch.nan
        for index, value in enumerate((0.0, -0.0, 1e-45, -1e-40, 3e38, inf, -inf, nan)):
            x[which == index] = value
    return x


def ordinary(rows=256, cols=256, seed=0):
    """Gaussian numbers, each row of a size of its own, some zero blocks."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=g)
    x = x * torch.exp2(torch.randint(-6, 7, (rows, 1), generator=g).float())
    x[::17, 64:96] = 0
    return x
