"""The other formats against torchao 0.18, ml_dtypes, gfloat, en_dtypes, and loops from the text."""

import math

import numpy as np
import pytest
import torch
from format_toys import assert_same_bits, ordinary
from torch.testing import assert_close

from layers.precision.grids import GRIDS, UE5M3, to_grid
from layers.precision.quantize import fake_quantize, quantize
from layers.precision.spec import QSpec

pytestmark = [
    pytest.mark.parity,
    # torchao's own code, as it is imported and as it meets a newer torch
    pytest.mark.filterwarnings("ignore"),
]


def around(table):
    """Values, midpoints, and the float32 neighbours of both, with both signs."""
    points = torch.cat([table, (table[1:] + table[:-1]) / 2, torch.rand(2048) * table[-1]])
    points = torch.cat([points, *(points.nextafter(torch.tensor(to)) for to in (0.0, math.inf))])
    return torch.cat([points, -points]).clamp(-table[-1], table[-1])


# --- elements ----------------------------------------------------------------------------------

ML_DTYPES = {
    "e2m3": "float6_e2m3fn",
    "e3m2": "float6_e3m2fn",
    "e5m2": "float8_e5m2",
}
GFLOAT = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")


@pytest.mark.parametrize("name", ML_DTYPES)
def test_grids_against_ml_dtypes(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    points = around(torch.tensor(GRIDS[name].magnitudes()))
    theirs = points.numpy().astype(getattr(ml_dtypes, ML_DTYPES[name])).astype(np.float32)
    assert_same_bits(to_grid(points, GRIDS[name]), torch.from_numpy(theirs))


@pytest.mark.parametrize("name", GFLOAT)
def test_grids_against_gfloat(name):
    gfloat = pytest.importorskip("gfloat")
    formats = pytest.importorskip("gfloat.formats")
    info = getattr(formats, f"format_info_ocp_{name}")
    points = around(torch.tensor(GRIDS[name].magnitudes()))
    theirs = gfloat.round_ndarray(info, points.double().numpy(), sat=True)
    assert_same_bits(to_grid(points, GRIDS[name]), torch.from_numpy(theirs).float())


def test_scales_ue5m3_against_gfloat():
    """Built from its parameters, with one code for NaN."""
    gfloat = pytest.importorskip("gfloat")
    top = [gfloat.decode_float(_ue5m3(gfloat), code).fval for code in range(255)]
    assert tuple(top) == UE5M3.magnitudes()


def _ue5m3(gfloat):
    return gfloat.FormatInfo(
        "ue5m3", k=8, precision=4, bias=15, is_signed=False, domain=gfloat.Domain.Finite,
        has_nz=False, num_high_nans=1, has_subnormals=True, is_twos_complement=False,
    )  # fmt: skip


def test_hifloat8_against_en_dtypes():
    """Every positive code, every midpoint, their neighbours, infinity and NaN."""
    en_dtypes = pytest.importorskip("en_dtypes")
    codes = np.arange(256, dtype=np.uint8).view(en_dtypes.hifloat8).astype(np.float32)
    values = torch.from_numpy(codes)
    assert_same_bits(fake_quantize(values, "hifloat8"), values)
    table = values[values.isfinite() & (values >= 0)].sort().values
    points = around(table)
    points = torch.cat([points, torch.tensor([32769.0, 40959.0, 40961.0, 1e30, math.inf])])
    theirs = points.numpy().astype(en_dtypes.hifloat8).astype(np.float32)
    ours = fake_quantize(points, "hifloat8")
    differ = ours != torch.from_numpy(theirs)
    assert set(points[differ].abs().tolist()) <= {2.0**-23}, "a half of the smallest number"
    assert_same_bits(ours[~differ], torch.from_numpy(theirs)[~differ])


# --- blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["floor", "rceil", "ceil", "even"])
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2"])
def test_mx_against_torchao(name, rule):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    short = name.removeprefix("mxfp8_").removeprefix("mxfp6_")
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(short, f"fp6_{short}")
    for seed in range(2):
        x = ordinary(seed=seed)
        x[5, 40] = math.nan
        mode = mx.ScaleCalculationMode[rule.upper()]
        theirs = mx.MXTensor.to_mx(x, dtype, 32, mode).dequantize(torch.float32)
        ours = fake_quantize(x, name, scale_rule=rule)
        if name.startswith("mxfp6"):  # torchao's cast to six bits loses the NaN of an element
            usual = ~ours.isnan()
            assert_same_bits(ours[usual], theirs[usual])
        else:
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("mxfp4", "mxfp4_e2m1"), ("mxfp8_e4m3", "mxfp8_e4m3"), ("mxint8", "mxint8")],
)
def test_mx_against_gfloat(name, theirs):
    """Left out: gfloat takes exponents by floor(log2), which rounds 7.9999995 up to 3."""
    gfloat = pytest.importorskip("gfloat")
    formats = pytest.importorskip("gfloat.formats")
    info = getattr(formats, f"format_info_{theirs}")
    x = torch.randn(40, 32)
    got = [gfloat.quantize_block(info, b.double().numpy(), gfloat.compute_scale_amax) for b in x]
    wanted = torch.from_numpy(np.stack(got)).float()
    ours = fake_quantize(x, name)
    differ = ours != wanted
    if name != "mxint8":
        assert_same_bits(ours, wanted)
        return
    # two's complement has -128 / 64 = -2, which we leave unused
    assert (wanted[differ] < 0).all()
    assert (
        (wanted - ours)[differ] * 64 / x.abs().amax(1, keepdim=True).expand_as(x)[differ] < 0
    ).all()
    assert differ.double().mean() < 0.01


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("rule", ["max", "p2"])
def test_fp8_against_torchao(name, scope, rule):
    u = pytest.importorskip("torchao.float8.float8_utils")
    granularity = pytest.importorskip("torchao.float8.config").ScalingGranularity
    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]
    x = ordinary(seed=2) + 1e-3
    kind = granularity.TENSORWISE if scope == "tensor" else granularity.AXISWISE
    scale = u.tensor_to_scale(
        x, dtype, scaling_granularity=kind, axiswise_dim=None if scope == "tensor" else -1,
        round_scales_to_power_of_2=rule == "p2",
    )  # fmt: skip
    theirs = u.to_fp8_saturated(x * scale, dtype).float()
    values, ours, _ = quantize(
        x, QSpec(format=name, scope=scope, scale_rule=rule), axis=-1, dtype=torch.float32
    )
    assert_same_bits(values, theirs)
    assert_close(ours.reshape(scale.shape), 1 / scale, rtol=2e-7, atol=0)


def loop_hif4(x):
    """One unit after another, in exact Python floats: algorithm 1 of arXiv:2602.11287."""
    out = x.double().clone()
    for unit in out.view(-1, 64):
        v = [abs(value) for value in unit.tolist()]
        scale = min(max(_rounded(max(v) * 0.142578125, 8), 2.0**-48), 49152.0)
        scale = _rounded(scale, 3)
        inverse = _rounded(1 / scale, 8)
        for eight in range(0, 64, 8):
            coarse = max(v[eight : eight + 8]) * inverse >= 4
            for four in range(eight, eight + 8, 4):
                fine = max(v[four : four + 4]) * inverse / 2**coarse >= 2
                power = 2.0 ** (coarse + fine)
                for i in range(four, four + 4):
                    k = min(math.floor(4 * v[i] * inverse / power + 0.5), 7)
                    unit[i] = math.copysign(k / 4 * power * scale, unit[i].item())
    return out.float()


def _rounded(value, digits):
    """To so many significant bits, half to even."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, digits)), exponent - digits)


@pytest.mark.parametrize("size", [1e-16, 0.01, 1.0, 3e4])
def test_hif4_against_a_loop(size):
    """On bfloat16 numbers, as the paper has them; the authors' numpy code gives the same bits."""
    x = (torch.randn(24, 128) * torch.exp2(torch.randn(24, 1) * 3) * size).bfloat16().float()
    x[3] = 0
    x[4, ::2] = -0.0
    assert_same_bits(fake_quantize(x, "hif4"), loop_hif4(x))
    by_column = quantize(x.T.contiguous(), "hif4", axis=-2, dtype=torch.float32).values
    assert_same_bits(by_column.T.contiguous(), loop_hif4(x))


MEASURES = {"4over6": lambda d: (d * d).sum(), "4over6_mae": lambda d: d.abs().sum()}
MEASURES["4over6_max"] = lambda d: d.abs().max()


@pytest.mark.parametrize("rule", MEASURES)
def test_four_over_six_against_a_loop(rule):
    """arXiv:2512.02010 with errors of the numbers themselves in float64: the same choices."""
    x = torch.randn(64, 64)
    x[5] *= 2.0**-9
    values, above, _ = quantize(
        x, QSpec(format="nvfp4", scale_rule=rule), axis=-1, dtype=torch.float32
    )
    fours = 0
    for block, ours in zip(x.double().view(-1, 16), values.double().view(-1, 16), strict=True):
        found = []
        for factor in (1.0, 1.5):
            raw = float(block.abs().max()) / 6 * factor / above.item()
            scale = to_grid(torch.tensor([raw]), GRIDS["e4m3"]).double()
            y = (block / (scale * above.item())).clamp(-6, 6)
            q = to_grid(y.float(), GRIDS["e2m1"]).double() * scale
            found.append((MEASURES[rule](q * above.item() - block).item(), q))
        (six, q6), (four, q4) = found
        assert_close(ours, q4 if four < six else q6, rtol=0, atol=0)
        fours += four < six
    assert 0.3 < fours / 256 < 0.7  # the page: 45% of the blocks, by squares


def test_if4_and_nvint4_against_a_loop():
    x = torch.randn(64, 64)
    floats, above, _ = quantize(x, "nvfp4", axis=-1, dtype=torch.float32)
    got = quantize(x, "if4", axis=-1, dtype=torch.float32).values
    whole, scale, _ = quantize(x, "nvint4", axis=-1, dtype=torch.float32)
    for block, f, i, w in zip(
        *(t.double().view(-1, 16) for t in (x, floats, got, whole)), strict=True
    ):
        peak = block.abs().max()
        s = to_grid((peak / 6 / above).float().view(1), GRIDS["e4m3"]).double()
        n = (block / (s * above) * 7 / 6).clamp(-7, 7).round() * 6 / 7 * s
        integers = ((n * above - block) ** 2).sum() < ((f * above - block) ** 2).sum()
        assert_close(i, n if integers else f, rtol=1e-6, atol=0)
        s = to_grid((peak / 1.75 / scale).float().view(1), GRIDS["e4m3"]).double()
        assert_close(w, (block / (s * scale / 4)).clamp(-7, 7).round() * s / 4, rtol=0, atol=0)


def test_quest_against_its_formula():
    """arXiv:2505.14669, in float64 and with the logarithm."""
    x = ordinary(seed=4) + 0.1
    spread = x.double().view(-1, 32).std(1, correction=0, keepdim=True)
    scale = torch.where(spread > 0, (spread * 2.92247856 / 6).log2().floor().exp2(), 1.0)
    wanted = to_grid((x.double().view(-1, 32) / scale).float(), GRIDS["e2m1"]).double() * scale
    got = fake_quantize(x, "mxfp4", scale_rule="quest").view(-1, 32)
    varied = (spread > 1e-3 * x.view(-1, 32).abs().amax(1, keepdim=True))[:, 0]
    assert_same_bits(got[varied], wanted.float()[varied])
    assert 0 < (~varied).sum() < 100
    assert_close(got[~varied], x.view(-1, 32)[~varied], rtol=0.25, atol=0)  # "floor" takes over


def test_scale_constraint_m1_is_p2():
    """ZeroQuant-FP's M1, 2^ceil(log2 S), is what torchao calls rounding the factor down."""
    x = torch.randn(64, 128)
    s = x.double().view(-1, 16).abs().amax(1, keepdim=True) / 1.75
    m1 = s.log2().ceil().exp2()
    wanted = (x.double().view(-1, 16) / m1 * 4).round().clamp(-7, 7) / 4 * m1
    assert_same_bits(fake_quantize(x, "int4", scale_rule="p2").view(-1, 16), wanted.float())


# --- where others differ, and must not be followed ---------------------------------------------


def test_difference_torchao_halves_blocks_of_the_smallest_scale():
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([2.0**-125, -(2.0**-126)])
    theirs = mx.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    assert_close(fake_quantize(x, "mxfp4"), x, rtol=0, atol=0)
    assert_close(theirs, x / 2, rtol=0, atol=0)


def test_difference_torchao_nvfp4_has_no_subnormal_scales_and_no_zero_tensors():
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.ones(1, 32)
    x[0, 16:] = 2.0**-17  # its scale, 448 * 2^-17, is about 2^-8
    above = nv.per_tensor_amax_to_scale(x.abs().amax())
    scales, _ = nv.nvfp4_quantize(x, 16, above)
    assert scales.float()[0].tolist() == [448.0, 2.0**-6]
    ours = fake_quantize(x, "nvfp4")
    assert ours[0, 16] == pytest.approx(2.0**-17, rel=0.2)
    zeros = torch.zeros(1, 32)
    scales, _ = nv.nvfp4_quantize(zeros, 16, nv.per_tensor_amax_to_scale(zeros.amax()))
    assert scales.float().isnan().all()
    assert not fake_quantize(zeros, "nvfp4").any()


def test_difference_ml_dtypes_does_not_saturate_e4m3():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    big = np.float32([465.0, np.inf])
    assert np.isnan(big.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)).all()
    assert to_grid(torch.from_numpy(big), GRIDS["e4m3"]).tolist() == [448.0, 448.0]
