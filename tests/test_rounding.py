"""Invariants 7 and 8: rotation, and rounding by chance; and MS-EDEN, which is both."""

import math

import pytest
import torch
from format_toys import EVERY, assert_same_bits, kernels, name_of, relative_error
from torch.testing import assert_close

from layers.precision.formats import resolve
from layers.precision.grids import E1M2, E2M1, E4M3, GRIDS, to_grid
from layers.precision.hadamard import NVIDIA_SIGNS, rotate, signs_of, unrotate
from layers.precision.quantize import fake_quantize, quantize
from layers.precision.random import uniform
from layers.precision.spec import QSpec

KEY = torch.tensor(77)
DRAWS = 2000
INF = math.inf
widths = pytest.mark.parametrize("d", [2, 16, 32, 128])


@pytest.fixture(autouse=True)
def _definitions():
    with kernels("torch"):
        yield


def in_full(x, spec, key=KEY, axis=-1, operand=0):
    """Values times their scale."""
    values, scale, _ = quantize(x, spec, axis=axis, dtype=torch.float32, key=key, operand=operand)
    return values if scale is None else values * scale


# --- 7: rotation -------------------------------------------------------------------------------


@widths
@pytest.mark.parametrize("kind", ["fixed", "step", "none"])
def test_invariant_07_a_rotation_is_orthogonal(d, kind):
    signs = signs_of(d, kind, KEY, 1, KEY.device)
    assert set(signs.tolist()) <= {1.0, -1.0}
    r = rotate(torch.eye(d), d, signs, -1)
    assert_close(r @ r.T, torch.eye(d), rtol=0, atol=1e-6)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < d:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    assert_close(r, signs.diag() @ hadamard / math.sqrt(d), rtol=0, atol=1e-6)
    x = torch.randn(5, 3 * d - 1)
    there = rotate(x, d, signs, -1)
    assert there.shape == (5, 3 * d)
    assert_close(unrotate(there, d, signs, 3 * d - 1), x)
    assert_close(rotate(x.T.contiguous(), d, signs, -2), there.T)


def test_invariant_07_signs():
    assert signs_of(16, "fixed", None, 0, KEY.device).tolist() == list(NVIDIA_SIGNS)
    steps = [signs_of(64, "step", torch.tensor(k), g, KEY.device) for k in (1, 2) for g in (0, 1)]
    assert len({tuple(s.tolist()) for s in steps}) == 4
    assert_same_bits(steps[0], signs_of(64, "step", torch.tensor(1), 0, KEY.device))


@widths
def test_invariant_07_products_stay(d):
    """With a format that only casts there is nothing left but rounding to float32."""
    a, b = torch.randn(6, 200), torch.randn(7, 200)
    signs = signs_of(d, "step", KEY, 0, KEY.device)
    assert_close(rotate(a, d, signs, -1) @ rotate(b, d, signs, -1).T, a @ b.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axis", [-1, -2])
def test_invariant_07_scales_come_after_the_rotation(axis):
    x = torch.randn(64, 64)
    x[3, 5] = 100.0  # an outlier, which rotation spreads
    spec = QSpec(format="nvfp4", hadamard=16)
    got = quantize(x, spec, axis=axis, dtype=torch.float32)
    turned = rotate(x, 16, signs_of(16, "fixed", None, 0, KEY.device), axis)
    assert_same_bits(got, quantize(turned, "nvfp4", axis=axis, dtype=torch.float32))
    assert got.scale < 0.5 * quantize(x, "nvfp4", axis=axis, dtype=torch.float32).scale


# --- 8: stochastic rounding --------------------------------------------------------------------


@pytest.mark.parametrize("grid", [*GRIDS.values()], ids=GRIDS)
def test_invariant_08_draws_are_neighbours_with_the_right_mean(grid):
    table = torch.tensor(grid.magnitudes(), dtype=torch.float64)
    y = torch.rand(64) * grid.largest
    y[:16] *= torch.exp2(torch.linspace(-6.0, 0.0, 16))
    draws = to_grid(
        y.expand(DRAWS, -1).contiguous(), grid, uniform(KEY, 0, torch.Size((DRAWS, 64)))
    ).double()
    above = torch.bucketize(y.double(), table)  # table[above - 1] < y <= table[above]
    low, high = table[(above - 1).clamp(min=0)], table[above]
    assert ((draws == low) | (draws == high)).all()
    variance = (high - y) * (y - low)
    assert ((draws.mean(0) - y).abs() <= 4 * (variance / DRAWS).sqrt() + 1e-4 * (high - low)).all()
    assert (draws.std(0) > 0)[variance > 0.01 * (high - low) ** 2].all()
    points = table.float().expand(50, -1).contiguous()
    noise = uniform(KEY, 1, points.shape)
    assert_same_bits(to_grid(points, grid, noise), points)
    assert_same_bits(to_grid(-points, grid, noise), -points)


NO_CLIP = {"rceil", "ceil", "three_quarters", "unbiased", "p2", "nearest"}
UNBIASED = [
    spec.but(rounding="stochastic")
    for spec in EVERY
    if spec.scale_rule in NO_CLIP and spec.tile == "1d"
]


def four_deviations(draws):
    """Of a mean of draws from two neighbours; and of one that was never drawn."""
    step = draws.amax(0) - draws.amin(0)
    return 4 * step / 2 / math.sqrt(DRAWS) + 8 / DRAWS * step.max()


@pytest.mark.parametrize("spec", UNBIASED, ids=name_of)
def test_invariant_08_the_mean_is_the_number_where_scales_cannot_clip(spec):
    x = torch.randn(1, 128).expand(DRAWS, -1).contiguous()
    draws = in_full(x, spec).double()
    assert ((draws.mean(0) - x[0]).abs() <= four_deviations(draws)).all()
    assert max(len(column.unique()) for column in draws.T) == 2


def test_invariant_08_the_mean_of_hifloat8():
    x = torch.randn(1, 128).expand(DRAWS, -1).contiguous()
    draws = in_full(x, QSpec(format="hifloat8", rounding="stochastic")).double()
    assert ((draws.mean(0) - x[0]).abs() <= four_deviations(draws)).all()


def test_invariant_08_hif4_is_unbiased_but_at_the_end_of_each_four():
    """A four that is not doubled ends at 7 quarters, though numbers up to 8 of them are in it."""
    x = torch.randn(1, 128)
    x[0, ::64] = 4.375  # the largest of its unit: seven times the scale, which is exact
    x = x.expand(DRAWS, -1).contiguous()
    draws = in_full(x, QSpec(format="hif4", rounding="stochastic")).double()
    off = (draws.mean(0) - x[0]).abs()
    inverse = 0.002 * x[0].abs()  # that of a scale has eight bits
    wrong = off > four_deviations(draws) + inverse
    size = (x[0].abs() / 0.625).double()
    assert (((size > 1.75) & (size < 2)) | ((size > 3.5) & (size < 4)))[wrong].all()
    assert (draws.mean(0).abs() < x[0].abs())[wrong].all()
    assert 1 <= wrong.sum() <= 12


def test_invariant_08_a_scale_that_clips_is_biased():
    x = torch.full((DRAWS, 32), 7.0)
    floor = in_full(x, QSpec(format="mxfp4", rounding="stochastic"))
    assert (floor == 6).all()
    never = in_full(x, QSpec(format="mxfp4", scale_rule="rceil", rounding="stochastic"))
    assert never.double().mean() == pytest.approx(7.0, abs=0.02)


@pytest.mark.parametrize("axis", [-1, -2])
def test_invariant_08_streams(axis):
    x = torch.randn(64, 64)
    for name in ("mxfp4", "nvfp4", "hif4", "fp8_e4m3", "e8m3", "hifloat8"):
        spec = QSpec(format=name, rounding="stochastic")
        first = in_full(x, spec, axis=axis)
        assert_same_bits(in_full(x, spec, axis=axis), first)
        assert not in_full(x, spec, axis=axis, operand=1).equal(first)
        assert not in_full(x, spec, axis=axis, key=torch.tensor(78)).equal(first)
        state = torch.get_rng_state()
        in_full(x, spec, axis=axis)
        assert torch.get_rng_state().equal(state)
        with pytest.raises(ValueError, match="needs a key"):
            quantize(x, spec, axis=axis, dtype=torch.float32)


def test_invariant_08_error_is_below_one_step():
    x = torch.randn(256, 64)
    spec = QSpec(format="nvint4", scale_rule="unbiased", rounding="stochastic")
    values, scale, _ = quantize(x, spec, axis=-1, dtype=torch.float32, key=KEY)
    peak = x.view(256, 4, 16).abs().amax(-1, keepdim=True)
    block = to_grid(peak / (1.75 * 16 / 17) / scale, E4M3)
    error = (values * scale - x).view(256, 4, 16).abs() / (block * scale * 0.25)
    assert error.max() <= 1 + 1e-4
    assert error.max() > 0.9


# --- MS-EDEN -----------------------------------------------------------------------------------

EDEN = QSpec(format="nvfp4", rounding="eden", hadamard=128, signs="step")


def turned_back(x, spec, seed):
    """What one draw makes of the rows of x, in their own coordinates."""
    key = torch.tensor(seed)
    signs = signs_of(spec.hadamard, "step", key, 0, x.device)
    return unrotate(in_full(x, spec, key=key), spec.hadamard, signs, x.shape[1])


def test_eden_is_unbiased_over_rotations_and_plain_rounding_is_not():
    x = torch.randn(64, 128) * torch.exp2(torch.arange(64.0) % 3)[:, None]
    n, along = 60, {}
    for name, spec in {
        "eden": EDEN,
        "nearest": EDEN.but(rounding="nearest", scale_rule="eden"),
    }.items():
        mean = sum(turned_back(x, spec, seed) for seed in range(n)) / n
        along[name] = ((mean * x).sum(1) / (x * x).sum(1) - 1).double()  # share kept of each row
        spread = along[name].std() / 8
    assert along["eden"].mean().abs() < 4 * spread
    assert along["nearest"].mean().abs() > 0.004
    assert along["nearest"].mean().abs() > 8 * along["eden"].mean().abs()


def test_eden_by_hand():
    """From the text: nearest elements, one correction a tile, scales drawn between neighbours."""
    x = torch.randn(64, 256)
    spec = EDEN.but(signs="none")
    values, scale, _ = quantize(x, spec, axis=-1, dtype=torch.float32, key=KEY)
    y = rotate(x, 128, torch.ones(128), -1).double()
    top = 6 / (17 / 16 * 0.93)
    above = y.abs().max() / 255.99 / top
    assert scale.item() == pytest.approx(above.item(), rel=1e-6)
    blocks = y.view(64, 16, 16)
    first = to_grid((blocks.abs().amax(-1, keepdim=True) / top / above).float(), E4M3)
    scaled = blocks / (first * above)
    elements = to_grid(scaled.float(), E2M1)
    tiles, kept = scaled.view(64, 2, 128), elements.view(64, 2, 128)
    correction = (tiles * tiles).sum(-1) / (tiles * kept).sum(-1)  # [64, 2]
    wanted = first * correction.view(64, 2, 1, 1).expand(-1, -1, 8, -1).reshape(64, 16, 1)
    got = torch.where(elements == 0, torch.nan, values.view(64, 16, 16) / elements)
    for drawn in (got.nan_to_num(nan=INF).amin(-1), got.nan_to_num(nan=-INF).amax(-1)):
        table = torch.tensor(E4M3.magnitudes(), dtype=torch.float64)
        above_it = torch.bucketize(wanted[..., 0], table)
        assert ((drawn == table[above_it]) | (drawn == table[above_it - 1])).all()
    assert correction.mean() > 1.0
    assert relative_error(values * scale, y) < 0.0105


def test_eden_along_rows_with_segments_and_zeros():
    """Tiles of a rotation lie along rows of segments here; each by itself gives the same bits."""
    spec = EDEN.but(hadamard=32)
    x = torch.randn(200, 24)
    x[64:128] = 0
    counts = [64, 64, 0, 72]
    got = quantize(
        x, spec, axis=-2, dtype=torch.float32, key=KEY, ends=torch.tensor(counts).cumsum(0)
    )
    assert got.ends.tolist() == [64, 128, 128, 224]
    assert not got.values[64:128].any()
    assert got.values.isfinite().all()
    alone = quantize(x[:64], spec, axis=-2, dtype=torch.float32, key=KEY)
    assert_same_bits(got.values[:64], alone.values)  # its random numbers are the first ones
    flat = quantize(x[:64].T.contiguous(), spec, axis=-1, dtype=torch.float32, key=KEY)
    assert_close(flat.scale, alone.scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "hadamard must be at least 16, got 0"),
        ({"hadamard": 8}, "hadamard must be at least 16, got 8"),
        ({"hadamard": 32, "scale_rule": "max"}, "say scale_rule eden, not max"),
        ({"hadamard": 32, "tile": "2d"}, "say tile 1d"),
    ],
)
def test_eden_errors(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(QSpec(format="nvfp4", rounding="eden", **options))
    with pytest.raises(ValueError, match="rounding of mxfp4"):
        resolve(QSpec(format="mxfp4", rounding="eden", hadamard=32))


def test_what_cuts_digits_off_is_not_random():
    with pytest.raises(ValueError, match="takes no stochastic"):
        fake_quantize(torch.ones(4), "e8m3", scale_rule="mask", rounding="stochastic", key=KEY)
    assert resolve(QSpec(format="nvint4")).row.grid is E1M2
