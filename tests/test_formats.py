"""What each number format does, to the bit; and that the native kernels do the same."""

import logging
import math
import os
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from layers.native import _load
from layers.precision import native
from layers.precision.formats import FORMATS, format_of
from layers.precision.grids import E2M1, E4M3, GRIDS, to_grid
from layers.precision.mx import MX_RULES
from layers.precision.quantize import Quantized, fake_quantize, quantize
from layers.precision.spec import QSpec

LOW = [row for row in FORMATS if row.dtype is None]
SPECS = [
    QSpec(format=row.name, scale_rule=rule, tile=tile)
    for row in LOW
    for rule in row.scale_rules
    for tile in row.tiles
]
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
every_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.format}-{spec.scale_rule}-{spec.tile}"
)
every_rule = pytest.mark.parametrize("rule", MX_RULES)
needs_compiler = pytest.mark.skipif(native.KERNELS.library() is None, reason="no C++ compiler")
INF, NAN = math.inf, math.nan


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
    """Equal down to the sign of zero; any NaN equals any NaN."""
    if isinstance(a, Quantized):
        assert_same_bits(a.values, b.values)
        assert (a.scale is None) == (b.scale is None)
        if a.scale is not None:
            assert_same_bits(a.scale, b.scale)
        return
    assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert_close(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


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


# --- grids ---------------------------------------------------------------------------------------


def test_grids_decode_to_their_tables():
    assert E2M1.magnitudes() == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert E4M3.magnitudes() == tuple(e4m3.tolist())
    assert (E2M1.max_exponent, E4M3.max_exponent) == (2, 8)


@every_grid
def test_rounding_is_nearest_ties_to_even_code(grid):
    """By brute force: all values, all midpoints, their float32 neighbours, both signs."""
    table = torch.tensor(grid.magnitudes(), dtype=torch.float64)
    points = torch.cat([table, (table[1:] + table[:-1]) / 2, table[-1:] * 1.5]).float()
    points = torch.cat([points, *(points.nextafter(torch.tensor(to)) for to in (-INF, INF))])
    points = torch.cat([points, -points])
    distance = (points.double().abs()[:, None] - table).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    even = nearest & (torch.arange(len(table)) % 2 == 0)
    if grid.mantissa_bits == 0:  # to the even number of steps: 2 of the lower binade, or 0
        index = torch.arange(len(table))
        even = nearest & ((index != 1) & (nearest.cumsum(1) == 2) | (index == 0))
    code = torch.where(nearest.sum(1) > 1, even.int().argmax(1), nearest.int().argmax(1))
    expected = table[code].float().copysign(points)
    assert_same_bits(to_grid(points, grid), expected)


@every_grid
def test_grid_clamps_infinity_and_keeps_the_sign_of_zero(grid):
    x = torch.tensor([INF, -INF, 0.0, -0.0])
    top = grid.largest
    assert_same_bits(to_grid(x, grid), torch.tensor([top, -top, 0.0, -0.0]))


# --- microscaling --------------------------------------------------------------------------------


def mx_exponent(amax, rule):
    """The scale exponent from the text, in exact arithmetic: amax a float32 above zero."""
    mantissa, exponent = math.frexp(amax)  # amax = mantissa * 2^exponent, 0.5 <= mantissa < 1
    floor = exponent - 1
    if rule == "floor":
        e = floor - 2
    elif rule == "ceil":
        e = floor + (mantissa > 0.5) - 2
    elif rule == "even":
        e = floor + (mantissa >= 0.875) - 2
    else:
        mantissa, exponent = math.frexp(float(torch.tensor(amax) * torch.tensor(1 / 6)))
        e = exponent - 1 + (mantissa > 0.5)
    return max(-127, min(127, e))


@every_rule
@pytest.mark.parametrize("mode", ["torch", "native"])
def test_mx_scale_of_every_binade(rule, mode):
    if mode == "native" and native.KERNELS.library() is None:
        pytest.skip("no C++ compiler")
    tops = [1.0, 1.25, 1.5, 1.75, 2 - 2**-23, 1 + 2**-23, 1.75 - 2**-23, 1.5 + 2**-23]
    amax = torch.tensor([top * 2.0**e for e in range(-126, 128) for top in tops])
    x = torch.zeros(len(amax), 32)
    x[:, :5] = amax[:, None] * torch.tensor([1.0, -0.3, 0.17, 0.07, 0.03])  # tell scales apart
    with kernels(mode):
        got = fake_quantize(x, "mxfp4", scale_rule=rule)
    scale = torch.tensor([mx_exponent(a, rule) for a in amax.tolist()]).double().exp2()
    y = (x.double() / scale[:, None]).float()  # exact, or far below the grid
    assert_same_bits(got, (to_grid(y, E2M1).double() * scale[:, None]).float())


def test_mx_worked_example():
    x = torch.tensor([7.9999995, -0.25, 0.26, 5.0, -0.0, 1.25])
    got = fake_quantize(x, "mxfp4")  # the exponent of 7.9999995 is 2, whatever log2 rounds to
    assert_same_bits(got, torch.tensor([6.0, -0.0, 0.5, 4.0, -0.0, 1.0]))


@every_rule
def test_mx_is_idempotent(rule):
    q = fake_quantize(hard(64, 96, 1, "binades"), "mxfp4", scale_rule=rule)
    assert_same_bits(fake_quantize(q, "mxfp4", scale_rule=rule), q)


@pytest.mark.parametrize("rule", ["rceil", "ceil"])
def test_mx_rules_that_round_up_never_clip(rule):
    x = torch.randn(4096, 32)
    error = (fake_quantize(x, "mxfp4", scale_rule=rule) - x).abs().amax(1)
    step = torch.tensor([2.0 ** mx_exponent(a, rule) for a in x.abs().amax(1).tolist()])
    assert (error <= step).all()  # half the widest step, which is 2


def test_mx_corner_cases():
    x = torch.zeros(6, 64)
    x[0, :32] = -0.0
    x[1, 3] = NAN
    x[2, 3], x[2, 4] = -INF, 1.0
    x[3, 3], x[3, 4] = 1e-45, -3e-39  # below 2^-127: the scale stops there
    x[4, 3], x[4, 40] = 1.0, 2.0
    q = fake_quantize(x, "mxfp4")
    assert_same_bits(q[0], x[0])
    assert q[1, :32].isnan().all()
    assert not q[1, 32:].any()
    assert q[2, 3] == -INF
    assert q[2, 4] == 0
    assert q[3, 3] == 0
    assert q[3, 4] == -(2.0**-128)
    assert (q[4, 3], q[4, 40]) == (1.0, 2.0)


# --- NVFP4 ---------------------------------------------------------------------------------------


def test_nvfp4_worked_example():
    x = torch.zeros(2, 32)
    x[0, 0], x[0, 1], x[0, 16], x[1, 0], x[1, 16] = 6.0, -1.26, 0.75, -0.0, 6 * 2.0**-19
    values, scale, _ = quantize(x, "nvfp4", axis=-1, dtype=torch.float32)
    assert scale is not None
    assert scale.item() == torch.tensor(6.0).div(2688).item()
    assert (values[0, 0], values[0, 1], values[0, 16]) == (448 * 6, -448 * 1.5, 56 * 6)
    assert not values[1, 0].signbit()  # -0 becomes +0
    assert values[1, 16] == 0  # the block's scale, 2^-19 of the largest, rounds to zero


def test_nvfp4_corner_cases():
    x = torch.zeros(3, 16, 16)
    x[1, 3, 4] = INF
    x[2, 3, 4] = NAN
    values, scale, _ = quantize(x, "nvfp4", axis=-1, dtype=torch.float32)
    assert scale is not None
    assert not values[0].any()
    assert scale[0] == 0
    assert scale[1] == INF
    assert scale[2].isnan()
    assert values[1].isfinite().all()
    assert values[2, 3].isnan().all()
    assert fake_quantize(torch.zeros(4, 32), "nvfp4").equal(torch.zeros(4, 32))


@pytest.mark.parametrize("amax", [1e-45, 1e-38, 1e-30, 1e30, 3.4028234663852886e38])
def test_nvfp4_at_the_ends_of_float32(amax):
    x = torch.randn(32, 64).clamp(-1, 1) * amax
    x[0, 0] = amax
    q = fake_quantize(x, "nvfp4")
    assert q.isfinite().all()
    assert q.abs().amax() <= 1.07 * amax if amax > 1e-40 else True


def test_nvfp4_tile_is_the_same_both_ways():
    w = hard(48, 80, 2, "gauss") * torch.exp2(torch.randint(-4, 4, (48, 1)).float())
    spec = QSpec(format="nvfp4", tile="2d")
    by_k = quantize(w, spec, axis=-1, dtype=torch.float32)
    by_n = quantize(w, spec, axis=-2, dtype=torch.float32)
    flipped = quantize(w.T.contiguous(), spec, axis=-1, dtype=torch.float32)
    assert_same_bits(by_k, by_n)
    assert_same_bits(by_k.values, flipped.values.T.contiguous())
    assert not by_k.values.equal(quantize(w, "nvfp4", axis=-1, dtype=torch.float32).values)


def test_nvfp4_has_one_tensor_scale_for_all_of_a_tensor():
    x = torch.randn(3, 5, 32)
    whole = fake_quantize(x, "nvfp4")
    assert_same_bits(whole, fake_quantize(x.reshape(15, 32), "nvfp4").reshape(3, 5, 32))
    tiled = fake_quantize(x, "nvfp4", tile="2d")  # 5 rows: each matrix has short tiles of its own
    padded = torch.nn.functional.pad(x, (0, 0, 0, 11)).reshape(48, 32)
    expected = fake_quantize(padded, "nvfp4", tile="2d").reshape(3, 16, 32)[:, :5]
    assert_same_bits(tiled, expected)


# --- what holds for every format -----------------------------------------------------------------


@every_spec
@pytest.mark.parametrize("axis", [-1, -2])
def test_equivariance(spec, axis):
    """Under the sign, powers of two, and permutations inside a block."""
    x = torch.randn(64, 64)

    def q(x):
        return quantize(x, spec, axis=axis, dtype=torch.float32)

    base = q(x)
    assert_same_bits(q(-x).values + 0.0, -base.values + 0.0)
    scaled = q(x * 2.0**9)
    in_full = base.values * (1.0 if base.scale is None else base.scale)
    scaled_in_full = scaled.values * (1.0 if scaled.scale is None else scaled.scale)
    assert_same_bits(scaled_in_full, in_full * 2.0**9)
    order = torch.arange(64).reshape(-1, 16).flip(1).flatten()
    assert_same_bits(q(x.index_select(axis, order)).values, base.values.index_select(axis, order))


@every_spec
def test_values_are_exact_in_bfloat16_and_few(spec):
    x = hard(64, 96, 3, "binades")
    if spec.format == "nvfp4":
        x = hard(64, 96, 3, "gauss") * torch.exp2(torch.randint(-9, 1, (64, 96)).float())
    wide = quantize(x, spec, axis=-1, dtype=torch.float32).values
    narrow = quantize(x, spec, axis=-1, dtype=torch.bfloat16).values
    assert narrow.dtype == torch.bfloat16
    assert_same_bits(narrow.float(), wide)
    block = 16 if spec.format == "nvfp4" else 32
    levels = [len(row.unique()) for row in wide.reshape(-1, block)]
    assert max(levels) <= 15
    one_block = fake_quantize(torch.linspace(-1, 1, block).expand(block, block), spec)
    assert len(one_block.unique()) > 8


@pytest.mark.parametrize(
    ("name", "rule", "tile", "expected"),
    [
        ("mxfp4", "floor", "1d", 0.01320),
        ("mxfp4", "rceil", "1d", 0.01334),
        ("mxfp4", "ceil", "1d", 0.02079),
        ("mxfp4", "even", "1d", 0.01252),
        ("nvfp4", "max", "1d", 0.00906),
        ("nvfp4", "max", "2d", 0.01240),
    ],
)
def test_relative_error_on_gaussian_numbers(name, rule, tile, expected):
    x = torch.randn(1024, 1024)
    q = fake_quantize(x, name, scale_rule=rule, tile=tile)
    error = ((q - x).double().square().mean() / x.double().square().mean()).item()
    assert error == pytest.approx(expected, rel=0.02)


@every_spec
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("mode", ["torch", "native"])
def test_segments_equal_a_loop(spec, axis, mode):
    """Short, empty, first and last ones; then as leading indices."""
    if mode == "native" and native.KERNELS.library() is None:
        pytest.skip("no C++ compiler")
    x = hard(83, 40, 4, "gauss") * torch.exp2(torch.arange(83.0) % 7)[:, None]
    counts = [0, 1, 33, 0, 16, 31, 2, 0]
    ends = torch.tensor(counts).cumsum(0)
    with kernels(mode):
        got = quantize(x, spec, axis=axis, dtype=torch.float32, ends=ends)
        parts = [quantize(p, spec, axis=axis, dtype=torch.float32) for p in x.split(counts)]
        stacked = quantize(x[:80].view(5, 16, 40), spec, axis=axis, dtype=torch.float32)
        slices = [quantize(p, spec, axis=axis, dtype=torch.float32) for p in x[:80].view(5, 16, 40)]
    assert_same_bits(got.values, torch.cat([part.values for part in parts]))
    assert_same_bits(stacked.values, torch.stack([part.values for part in slices]))
    if got.scale is not None:
        assert_same_bits(got.scale, torch.stack([part.scale for part in parts]))
        assert_same_bits(stacked.scale, torch.stack([part.scale for part in slices]))


@pytest.mark.parametrize("mode", ["torch", "native"])
def test_rows_past_the_last_end_disturb_nobody(mode):
    if mode == "native" and native.KERNELS.library() is None:
        pytest.skip("no C++ compiler")
    x = torch.randn(40, 32)
    x[33:] = NAN
    with kernels(mode):
        for axis in (-1, -2):
            for name in ("mxfp4", "nvfp4"):
                ends = torch.tensor([10, 33], dtype=torch.int32)
                got = quantize(x, name, axis=axis, dtype=torch.float32, ends=ends)
                alone = quantize(x[:33], name, axis=axis, dtype=torch.float32, ends=ends)
                assert_same_bits(got.values[:33], alone.values)
                assert got.values[33:].isnan().all()
                if got.scale is not None:
                    assert_same_bits(got.scale, alone.scale)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_computed_in_float32(spec, dtype):
    x = hard(20, 37, 5, "gauss").to(dtype)
    q = fake_quantize(x, spec)
    assert q.dtype == dtype
    assert_same_bits(q, fake_quantize(x.float(), spec).to(dtype))


@every_spec
def test_a_short_last_block_sees_zeros(spec):
    x = torch.randn(5, 37)
    padded = torch.nn.functional.pad(x, (0, 27, 0, 11))
    assert_same_bits(fake_quantize(x, spec), fake_quantize(padded, spec)[:5, :37])
    if spec.tile == "1d":
        assert_same_bits(fake_quantize(x[0, 0], spec), fake_quantize(x[0, :1], spec)[0])


@every_spec
def test_empty_tensors(spec):
    for shape in ((0, 8), (8, 0), (2, 0, 8)):
        values, scale, _ = quantize(torch.empty(shape), spec, axis=-1, dtype=torch.bfloat16)
        assert values.shape == shape
        assert scale is None or not scale.any()
        assert fake_quantize(torch.empty(shape), spec).shape == shape
    values, scale, _ = quantize(
        torch.empty(0, 8), spec, axis=-2, dtype=torch.float32, ends=torch.tensor([0, 0])
    )
    assert values.shape == (0, 8)
    assert scale is None or scale.tolist() == [0, 0]


def test_gradient_goes_straight_through():
    for row in FORMATS:
        x = (torch.randn(4, 40) * 100).requires_grad_()
        probe = torch.randn(4, 40)
        q = fake_quantize(x, row.name)
        assert_same_bits(q.detach(), fake_quantize(x.detach(), row.name))
        q.backward(probe)
        assert x.grad is not None
        if row.dtype is None:
            assert x.grad.equal(probe)
        assert not quantize(x, row.name, axis=-1, dtype=torch.bfloat16).values.requires_grad


def test_high_formats_only_cast():
    x = torch.randn(3, 5)
    assert quantize(x, "fp32", axis=-1, dtype=torch.float32).values.equal(x)
    assert quantize(x, "bf16", axis=-2, dtype=torch.float32).values.equal(x.bfloat16().float())
    assert quantize(x, "fp32", axis=-1, dtype=torch.bfloat16).values.equal(x.bfloat16())
    assert quantize(x, "bf16", axis=-1, dtype=torch.bfloat16).scale is None
    assert fake_quantize(x, "bf16").equal(x.bfloat16().float())


def test_table():
    names = [row.name for row in FORMATS]
    assert len(set(names)) == len(names) >= 4
    for row in FORMATS:
        assert format_of(row.name) is row
        assert (row.dtype is None) == (row.encode is not None) == (row.grid is not None)
        assert row.summary
        assert row.paper
    assert [format_of(n).bits for n in ("fp32", "bf16", "mxfp4", "nvfp4")] == [32, 16, 4.25, 4.5]
    assert format_of("mxfp4").scale_rules[0] == "floor"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fake_quantize(x, "mxfp"), "unknown format 'mxfp'. Did you mean 'mxfp4'?"),
        (lambda x: fake_quantize(x, "mxfp4", scale_rule="flor"), "Did you mean 'floor'?"),
        (lambda x: fake_quantize(x, "bf16", scale_rule="floor"), "scale rule of bf16"),
        (lambda x: fake_quantize(x, "mxfp4", tile="2d"), "unknown tile of mxfp4 '2d'"),
        (lambda x: fake_quantize(x[0], "nvfp4", tile="2d"), "at least two axes"),
        (lambda x: fake_quantize(x.int(), "nvfp4"), "floating point"),
        (lambda x: quantize(x, "nvfp4", axis=0, dtype=torch.float32), "axis must be -1 or -2"),
        (lambda x: quantize(x[0], "nvfp4", axis=-1, dtype=torch.float32), r"x must be \[R, C\]"),
        (
            lambda x: quantize(
                x[None], "nvfp4", axis=-1, dtype=torch.float32, ends=torch.tensor([1])
            ),
            r"x must be \[R, C\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 32))


# --- native kernels and compiled graphs ----------------------------------------------------------


def both(function):
    """The result of the torch ops and of the native kernel."""
    results = []
    for mode in ("torch", "native"):
        with kernels(mode):
            results.append(function())
    return results


@needs_compiler
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    spec=st.sampled_from(SPECS),
    rows=st.integers(1, 70),
    cols=st.integers(1, 90),
    kind=st.sampled_from(["gauss", "binades", "bits", "ties", "special"]),
    seed=st.integers(0, 2**20),
    axis=st.sampled_from([-1, -2]),
    types=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float64])] * 2),
    cuts=st.lists(st.integers(0, 70), max_size=4),
)
def test_native_equals_torch(spec, rows, cols, kind, seed, axis, types, cuts):
    x = hard(rows, cols, seed, kind).to(types[0])
    ends = torch.tensor(sorted(min(cut, rows) for cut in cuts)) if cuts else None
    assert_same_bits(*both(lambda: quantize(x, spec, axis=axis, dtype=types[1], ends=ends)))
    assert_same_bits(*both(lambda: fake_quantize(x, spec)))


@needs_compiler
@every_spec
def test_native_equals_torch_on_wide_rows_threads_and_views(spec):
    """Wider than what the kernel holds at once, on two threads, with a row stride, transposed."""
    x = hard(70, 4300, 6, "binades")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for view in (x, x[:, 7:4290], x.T, x[:, :1], x[:64].view(2, 32, 4300)):
            for axis in (-1, -2):
                assert_same_bits(
                    *both(lambda v=view, a=axis: quantize(v, spec, axis=a, dtype=torch.float32))
                )
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("ends", [[3, 2], [0, 9], [-1, 4]])
def test_native_refuses_bad_ends(ends):
    with kernels("native"), pytest.raises(ValueError, match="ends must rise"):
        quantize(torch.randn(8, 32), "mxfp4", axis=-1, dtype=torch.float32, ends=torch.tensor(ends))


def everything(x, ends):
    """Each kind of graph once: rows, columns, tiles; with segments and without."""
    columns = quantize(x, "mxfp4", axis=-2, dtype=torch.bfloat16)
    segments = quantize(x, "nvfp4", axis=-2, dtype=torch.float32, ends=ends)
    tiles = fake_quantize(x, "nvfp4", tile="2d")
    rows = fake_quantize(x, "mxfp4", scale_rule="rceil")
    return columns.values, segments.values, segments.scale, tiles, rows


@pytest.mark.parametrize(("mode", "backend"), [("torch", "inductor"), ("native", "aot_eager")])
@needs_compiler
def test_compiled_equals_eager(mode, backend):
    x = torch.cat([hard(23, 70, 7, kind) for kind in ("gauss", "binades", "special")])
    ends = torch.tensor([0, 20, 20, 65])
    torch._dynamo.reset()
    with kernels(mode):
        compiled = torch.compile(everything, fullgraph=True, backend=backend, dynamic=False)
        for got, expected in zip(compiled(x, ends), everything(x, ends), strict=True):
            assert_same_bits(got, expected)


def test_compiled_gradient_and_changing_sizes():
    """As many rows as came: the graph must not be built again for each count."""
    torch._dynamo.reset()

    def loss(x):
        return fake_quantize(x, "nvfp4").sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n_rows in (5, 9, 40):
        x = torch.randn(n_rows, 32, requires_grad=True)
        compiled(x).backward()
        expected = fake_quantize(x.detach(), "nvfp4").cos()
        assert_close(x.grad, expected)


@needs_compiler
def test_two_builders_at_once_leave_one_library(tmp_path):
    found = []
    builders = [
        threading.Thread(target=lambda: found.append(native.KERNELS.build(tmp_path)))
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(found) == 2
    assert set(found) == set(tmp_path.iterdir())
    assert native.KERNELS.build(tmp_path) == found[0]


def test_without_a_compiler_torch_ops_do_the_same(monkeypatch, caplog):
    x = torch.randn(8, 64)
    expected = fake_quantize(x, "nvfp4")
    _load.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    try:
        with caplog.at_level(logging.WARNING), kernels("auto"):
            assert_same_bits(fake_quantize(x, "nvfp4"), expected)
            assert_same_bits(fake_quantize(x, "nvfp4"), expected)
        assert len(caplog.records) == 1
        assert "no-such-compiler" in caplog.text
        with kernels("native"), pytest.raises(RuntimeError, match="does not build"):
            fake_quantize(x, "nvfp4")
    finally:
        _load.cache_clear()
    with kernels("fastest"), pytest.raises(ValueError, match="MOE_ZOO_KERNELS"):
        fake_quantize(x, "nvfp4")
