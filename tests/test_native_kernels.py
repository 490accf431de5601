"""The native kernels give the bits of the definitions in torch ops, whatever is asked of them."""

import math
import os
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from layers.precision import native
from layers.precision.formats import every_format, resolve
from layers.precision.quantize import Quantized, fake_quantize, quantize
from layers.precision.spec import QSpec

needs_compiler = pytest.mark.skipif(native.KERNELS.library() is None, reason="no C++ compiler")
KEY = torch.tensor(0x1234567890ABCDEF)
INF, NAN = math.inf, math.nan


def cells():
    """Every format, rule, tile, scope and rounding that kernels.cpp has."""
    for row in every_format():
        for rule in row.scale_rules or (None,):
            for tile in row.tiles:
                for scope in row.scopes or (None,):
                    for rounding in row.roundings:
                        if row.dtype or (scope == "row" and tile == "2d") or rounding == "eden":
                            continue
                        options = {"scale_rule": rule, "tile": tile, "rounding": rounding}
                        try:
                            spec = QSpec(format=row.name, scope=scope, **options)
                            if native.has(resolve(spec)):
                                yield spec
                        except ValueError:  # options that exclude one another
                            continue


CELLS = list(cells())


def label(spec):
    said = (spec.format, spec.scale_rule, spec.tile, spec.scope, spec.rounding)
    return "-".join(word for word in said if word)


every_cell = pytest.mark.parametrize("spec", CELLS, ids=label)


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
    if isinstance(a, (Quantized, tuple)):
        for one, other in zip(a, b, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_same_bits(one, other)
        return
    assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert_close(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


def both(function):
    """The result of the torch ops and of the native kernel."""
    results = []
    for mode in ("torch", "native"):
        with kernels(mode):
            results.append(function())
    return results


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
        for index, value in enumerate((0.0, -0.0, 1e-45, -1e-40, 3e38, INF, -INF, NAN)):
            x[which == index] = value
    return x


def given_scale(spec, n):
    """A decoding scale for each of n segments, where the scope takes one."""
    return (0.01 * 2.0 ** torch.arange(n)) if resolve(spec).given_scale else None


@needs_compiler
@every_cell
@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 90),
    kind=st.sampled_from(["gauss", "binades", "bits", "ties", "special"]),
    seed=st.integers(0, 2**20),
    axis=st.sampled_from([-1, -2]),
    types=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float64])] * 2),
    cuts=st.lists(st.integers(0, 70), max_size=4),
    hadamard=st.sampled_from([0, 0, 2, 8, 16, 32, 64, 256]),
    signs=st.sampled_from(["fixed", "step", "none"]),
)
def test_every_cell_equals_its_definition(
    spec, rows, cols, kind, seed, axis, types, cuts, hadamard, signs
):
    x = hard(rows, cols, seed, kind).to(types[0])
    ends = torch.tensor(sorted(min(cut, rows) for cut in cuts)) if cuts else None
    rotated = spec.but(hadamard=hadamard, signs=signs)
    options = {"axis": axis, "dtype": types[1], "key": KEY, "operand": seed % 6}
    scale = given_scale(spec, len(cuts) or 1)
    assert_same_bits(*both(lambda: quantize(x, rotated, ends=ends, scale=scale, **options)))
    if scale is None:
        assert_same_bits(*both(lambda: fake_quantize(x, spec, key=KEY)))
