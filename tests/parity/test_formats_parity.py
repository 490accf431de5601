"""Number formats against torchao 0.18, ml_dtypes, and a loop written from the text alone."""

import math

import numpy as np
import pytest
import torch
from format_toys import assert_same_bits, ordinary

from layers.precision.grids import E2M1, E4M3, to_grid
from layers.precision.mx import MX_RULES, power_of_two
from layers.precision.quantize import fake_quantize, quantize
from layers.precision.spec import QSpec

pytestmark = [
    pytest.mark.parity,
    # torchao's own code, as it is imported and as it meets a newer torch
    pytest.mark.filterwarnings("ignore"),
]
every_rule = pytest.mark.parametrize("rule", MX_RULES)
TEXT_GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize(("name", "grid"), [("float4_e2m1fn", E2M1), ("float8_e4m3fn", E4M3)])
def test_grid_against_ml_dtypes(name, grid):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    table = torch.tensor(grid.magnitudes())
    points = torch.cat([table, (table[1:] + table[:-1]) / 2, torch.rand(4096) * grid.largest])
    points = torch.cat([points, *(points.nextafter(torch.tensor(to)) for to in (0.0, math.inf))])
    points = torch.cat([points, -points]).clamp(-grid.largest, grid.largest)
    theirs = points.numpy().astype(getattr(ml_dtypes, name)).astype(np.float32)
    assert_same_bits(to_grid(points, grid), torch.from_numpy(theirs))


def test_power_of_two_scale_against_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = np.arange(255, dtype=np.uint8)
    theirs = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    ours = power_of_two(torch.arange(255, dtype=torch.int32)).double()
    assert ours.tolist() == theirs.tolist()


def torchao_mx(x, rule):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    mode = mx.ScaleCalculationMode[rule.upper()]
    return mx.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, mode).dequantize(x.dtype)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_against_torchao(rule, dtype):
    for seed in range(3):
        x = ordinary(seed=seed).to(dtype)
        assert_same_bits(fake_quantize(x, "mxfp4", scale_rule=rule), torchao_mx(x, rule))


@every_rule
def test_mxfp4_against_torchao_in_every_binade_and_with_nan(rule):
    """Left out: torchao divides a block of scale 2^-127 by 2^-126, so that it decodes to half;
    and blocks so large that values round up to 2^128.
    """
    g = torch.Generator().manual_seed(3)
    x = torch.randn(240, 32, generator=g) * torch.exp2(torch.arange(-118.0, 122.0))[:, None]
    x[::7, 5] = math.nan
    x[3] = -0.0  # a zero block has scale 2^-127 too, and no value to halve
    assert_same_bits(fake_quantize(x, "mxfp4", scale_rule=rule), torchao_mx(x, rule))


def test_nvfp4_against_torchao():
    """On ordinary numbers. Left out: torchao lets no block scale fall below 2^-6, gives NaN for a
    tensor of zeros, keeps the sign of -0, and parts on exact ties (amax / 6 and amax * fl(1/6)).
    """
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(256, 256, generator=g)
        peak = x.abs().amax()
        codes, packed = nv.nvfp4_quantize(x, 16, nv.per_tensor_amax_to_scale(peak))
        grid = torch.tensor(TEXT_GRID)
        grid = torch.cat([grid, -grid])
        nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        theirs = grid[nibbles.long()].view(256, 16, 16) * codes.float().view(256, 16, 1)
        values, scale, _ = quantize(x, "nvfp4", axis=-1, dtype=torch.float32)
        assert_same_bits(values, theirs.view(256, 256))
        assert scale is not None
        assert scale.item() == nv.per_tensor_amax_to_scale(peak).item()


def nearest(y):
    """Index into TEXT_GRID of |y|, ties to the even index, by search."""
    size = min(abs(y), 6.0)
    return min(range(8), key=lambda i: (abs(size - TEXT_GRID[i]), i % 2))


def loop_mxfp4(x, rule):
    """One block after another, in exact Python floats."""
    out = x.clone().double()
    for block in out.view(-1, 32):
        amax = block.abs().max().item()
        mantissa, exponent = math.frexp(amax)
        floor = exponent - 1
        ratio, up = math.frexp(float(np.float32(amax) * np.float32(1 / 6)))
        e = {
            "floor": floor - 2,
            "ceil": floor - 2 + (mantissa > 0.5),
            "even": floor - 2 + (mantissa >= 0.875),
            "rceil": up - 1 + (ratio > 0.5),
        }[rule]
        scale = 2.0 ** max(e, -127) if amax else 2.0**-127
        for i, value in enumerate(block.tolist()):
            block[i] = math.copysign(TEXT_GRID[nearest(value / scale)] * scale, value)
    return out.float()


@every_rule
def test_mxfp4_against_a_loop(rule):
    x = ordinary(8, 128)
    x[3] *= 2.0**-126
    assert_same_bits(fake_quantize(x, "mxfp4", scale_rule=rule), loop_mxfp4(x, rule))


def loop_nvfp4(x, tile):
    """One block after another, in numpy float32 scalars, TransformerEngine's order."""
    f = np.float32
    amax = f(x.abs().max().item())
    s_enc = min(f(2688) / amax, np.finfo(f).max) if amax else f(1)
    s_dec = f(1) / s_enc
    values, scale = torch.zeros_like(x), amax / f(2688)
    step = 16 if tile == "2d" else 1
    for r in range(0, x.shape[0], step):
        for c in range(0, x.shape[1], 16):
            block = x[r : r + step, c : c + 16]
            raw = f(block.abs().max().item()) * (s_enc * f(1 / 6))
            stored = torch.tensor(min(raw, f(448))).to(torch.float8_e4m3fn).float().item()
            with np.errstate(divide="ignore"):
                t = min(f(1) / (f(stored) * s_dec), np.finfo(f).max)
            for i, value in enumerate(block.flatten().tolist()):
                y = float(np.clip(f(value) * t, f(-6), f(6)))
                q = math.copysign(TEXT_GRID[nearest(y)], y) * stored
                values[r + i // block.shape[1], c + i % block.shape[1]] = q
    return values, float(scale)


@pytest.mark.parametrize("tile", ["1d", "2d"])
def test_nvfp4_against_a_loop(tile):
    """Ties, tiny blocks with subnormal scales and blocks whose scale is zero included."""
    x = ordinary(40, 72, seed=5)
    x[8:12] = torch.randint(-12, 13, (4, 72)) / 4
    x[16:32] *= 2.0**-16
    x[32:36] *= 2.0**-24
    values, scale, _ = quantize(x, QSpec(format="nvfp4", tile=tile), axis=-1, dtype=torch.float32)
    expected, expected_scale = loop_nvfp4(x, tile)
    assert_same_bits(values + 0.0, expected + 0.0)
    assert scale is not None
    assert scale.item() == expected_scale
