"""Invariants 1 to 6, 9 to 11 and 17 of number formats, for every row, rule and tile of the table.

They hold the definitions in torch ops; test_formats.py holds the native kernels to those.
"""

import itertools

import pytest
import torch
from format_toys import (
    EVERY,
    LOW,
    assert_same_bits,
    every_spec,
    hard,
    kernels,
    name_of,
    relative_error,
)

from layers.precision.define import define_parts
from layers.precision.encoding import block_sum
from layers.precision.formats import resolve
from layers.precision.grids import E1M2, E2M1, E4M3, GRIDS, UE5M3, round_bits, to_grid
from layers.precision.hif4 import LEAST, MOST, e6m2
from layers.precision.layout import Blocks
from layers.precision.mx import MX_RULES, power_of_two
from layers.precision.quantize import fake_quantize, quantize
from layers.precision.spec import QSpec

INF, NAN = torch.inf, torch.nan


@pytest.fixture(autouse=True)
def _definitions():
    with kernels("torch"):
        yield


def only(condition):
    specs = [spec for spec in EVERY if condition(resolve(spec))]
    assert specs
    return pytest.mark.parametrize("spec", specs, ids=name_of)


def by_scope(spec):
    """The spec with each scope whose scale comes from the tensor."""
    scopes = [s for s in resolve(spec).row.scopes if s not in ("static", "delayed")]
    if spec.tile == "2d":
        scopes.remove("row")
    return [spec.but(scope=scope) for scope in scopes or (None,)]


def parts(x, spec):
    """Elements, block scales and the float32 scale above, as float64 that broadcast to x."""
    r = resolve(spec)
    b = r.row.block
    shape = Blocks(b, b) if spec.tile == "2d" else Blocks(1, b)
    (elements, scale), above = define_parts(x, r, shape, -1, None, None, None)
    scale = torch.ones_like(x) if scale is None else scale
    return elements.double(), scale.double(), 1.0 if above is None else above.double()[0]


# --- 1: tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [*GRIDS.values(), UE5M3], ids=lambda grid: grid.name)
def test_invariant_01_every_code_of_a_grid_stays(grid):
    values = torch.tensor(grid.magnitudes())
    count = 2 ** (grid.exponent_bits + grid.mantissa_bits)
    reserved = {"e4m3": 1, "e5m2": 4, "ue5m3": 1}
    assert len(values.unique()) == count - reserved.get(grid.name, 0)
    assert_same_bits(to_grid(values, grid), values)
    assert_same_bits(to_grid(-values, grid), -values)


def test_invariant_01_tables_of_the_page():
    assert GRIDS["e3m0"].magnitudes() == (0, 0.25, 0.5, 1, 2, 4, 8, 16)
    assert E2M1.magnitudes() == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert E1M2.magnitudes() == tuple(k / 4 for k in range(8))
    assert GRIDS["e1m6"].magnitudes() == tuple(k / 64 for k in range(128))
    assert GRIDS["e2m3"].magnitudes()[-1] == 7.5
    assert GRIDS["e3m2"].magnitudes()[-1] == 28
    bytes_ = torch.arange(128, dtype=torch.uint8)
    e4m3 = bytes_.view(torch.float8_e4m3fn).float()
    e5m2 = bytes_.view(torch.float8_e5m2).float()
    assert GRIDS["e4m3"].magnitudes() == tuple(e4m3[:127].tolist())
    assert GRIDS["e5m2"].magnitudes() == tuple(e5m2[:124].tolist())
    assert UE5M3.magnitudes()[:2] == (0, 2.0**-17)
    assert 61440 in UE5M3.magnitudes()
    e8m0 = power_of_two(torch.arange(255, dtype=torch.int32)).double()
    assert e8m0.tolist() == [2.0 ** (c - 127) for c in range(255)]


def test_invariant_01_codes_of_the_scale_of_hif4():
    codes = [2.0 ** ((c >> 2) - 48) * (1 + (c & 3) / 4) for c in range(255)]
    assert (codes[0], codes[-1]) == (LEAST, MOST)
    scales = torch.tensor(codes)
    assert_same_bits(round_bits(scales.view(torch.int32), 21).view(torch.float32), scales)
    assert set(e6m2(torch.rand(4096) * 4e5).tolist()) <= set(codes)
    inverse = [1.0, 0.80078125, 0.66796875, 0.5703125]  # the table of the page
    got = [float((1 / torch.tensor(m)).bfloat16()) for m in (1.0, 1.25, 1.5, 1.75)]
    assert got == inverse


def hifloat8_table():
    """Positive numbers from the text: dot field, exponent field, mantissa."""
    found = [2.0 ** (k - 23) for k in range(1, 8)]
    for exponent in range(-15, 16):
        bits = 3 if abs(exponent) <= 3 else 2 if abs(exponent) <= 7 else 1
        found += [2.0**exponent * (1 + m / 2**bits) for m in range(2**bits)]
    return sorted(found)[:-1]  # the last code is infinity


def test_invariant_01_hifloat8_is_its_table():
    table = torch.tensor(hifloat8_table())
    assert 2 * len(table) + 4 == 256  # zero, NaN, two infinities
    assert_same_bits(fake_quantize(table, "hifloat8"), table)
    every = torch.rand(1 << 16) * 2.0 ** torch.randint(-26, 16, (1 << 16,)).float()
    assert set(fake_quantize(every, "hifloat8").tolist()) <= {0.0, INF, *table.tolist()}


@only(lambda r: r.row.grid is not None)
def test_invariant_01_no_block_has_more_magnitudes_than_the_format(spec):
    x = hard(64, 64, 3, "gauss") * torch.exp2(torch.randint(-9, 1, (64, 64)).float())
    r = resolve(spec)
    elements, _, _ = parts(x, spec)
    together = 4 if spec.format == "hif4" else 16  # numbers under the same scales
    most = len(r.row.grid.magnitudes())
    assert max(len(some.unique()) for some in elements.abs().reshape(-1, together)) <= most
    if r.row.block >= 128 or r.row.grid.mantissa_bits > 3:
        return
    ramp = torch.linspace(0, 1, r.row.block).expand(r.row.block, r.row.block).contiguous()
    assert len(fake_quantize(ramp, spec).unique()) > 4


# --- 2 and 5: nearest --------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_invariant_02_rounding_is_nearest_ties_to_even_code(grid):
    """By brute force: all values, all midpoints, their float32 neighbours, both signs."""
    table = torch.tensor(grid.magnitudes(), dtype=torch.float64)
    points = torch.cat([table, (table[1:] + table[:-1]) / 2, table[-1:] * 1.5]).float()
    points = torch.cat([points, *(points.nextafter(torch.tensor(to)) for to in (-INF, INF))])
    points = torch.cat([points, -points])
    distance = (points.double().abs()[:, None] - table).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    index = torch.arange(len(table))
    even = nearest & (index % 2 == 0)
    if grid.mantissa_bits == 0:  # to the even number of steps: 2 of the lower binade, or 0
        even = nearest & ((index != 1) & (nearest.cumsum(1) == 2) | (index == 0))
    code = torch.where(nearest.sum(1) > 1, even.int().argmax(1), nearest.int().argmax(1))
    assert_same_bits(to_grid(points, grid), table[code].float().copysign(points))


def test_invariant_02_hifloat8_is_nearest_ties_away():
    table = torch.tensor([0.0, *hifloat8_table()], dtype=torch.float64)
    middle = (table[1:] + table[:-1]) / 2
    points = torch.cat([table, middle[1:]]).float()  # 2^-23 belongs to zero, see the docstring
    points = torch.cat([points, *(points.nextafter(torch.tensor(to)) for to in (0.0, INF))])
    points = points[points < 40960]
    wanted = table[torch.bucketize(points.double(), middle, right=True)].float()
    wanted[points.double() <= middle[0]] = 0
    assert_same_bits(fake_quantize(points, "hifloat8"), wanted)
    assert_same_bits(fake_quantize(-points[wanted > 0], "hifloat8"), -wanted[wanted > 0])
    ends = torch.tensor([2.0**-23, 40959.9, 40960.0, -INF, NAN, -0.0, -1e-30])
    wanted = torch.tensor([0.0, 32768.0, INF, -INF, NAN, 0.0, 0.0])
    assert_same_bits(fake_quantize(ends, "hifloat8"), wanted)


@pytest.mark.parametrize("m", range(3, 8))
def test_invariant_02_simulated_formats(m):
    x = hard(64, 64, 1, "special")
    mantissa, exponent = torch.frexp(x.double())
    steps = torch.ldexp(mantissa, torch.tensor(m + 1))  # 2^m to 2^(m + 1) of them
    wanted = torch.ldexp(steps.round(), exponent - (m + 1)).float()  # round: half to even
    usual = ~(x.abs() < 2.0**-126)  # below, the step stays
    assert_same_bits(fake_quantize(x, f"e8m{m}")[usual], wanted[usual])
    half = x.bfloat16().float()
    mantissa, exponent = torch.frexp(half.double())
    cut = torch.ldexp(torch.ldexp(mantissa, torch.tensor(m + 1)).trunc(), exponent - (m + 1))
    wanted = torch.where(half.isfinite(), cut.float(), half)
    got = fake_quantize(x, f"e8m{m}", scale_rule="mask")
    assert_same_bits(got[usual], wanted[usual])
    assert (got.abs() <= half.abs())[~half.isnan()].all()
    tiny = torch.tensor([2.0**-126, 3 * 2.0**-129, 1e-45, -1e-45])
    step = 2.0 ** (-126 - m)
    assert fake_quantize(tiny, f"e8m{m}").tolist() == ((tiny / step).round() * step).tolist()
    if m == 7:
        assert_same_bits(fake_quantize(x, "e8m7"), half)


@only(lambda r: r.row.grid is not None and r.row.name not in ("hif4", "if4"))
def test_invariant_05_error_is_half_a_step_where_nothing_clips(spec):
    x = hard(128, 128, 2, "gauss") * torch.exp2(torch.randint(-3, 4, (128, 1)).float())
    grid = resolve(spec).row.grid
    elements, scale, above = parts(x, spec)
    y = x.double().abs() / (scale * above)
    exponent = (torch.frexp(y).exponent - 1).clamp(min=grid.min_exponent)
    step = torch.exp2((exponent - grid.mantissa_bits).double())
    clipped = y > grid.largest
    assert ((elements.abs() - y).abs() <= step / 2 * (1 + 1e-5))[~clipped & (scale > 0)].all()
    assert (elements.abs() == grid.largest)[clipped].all()


def test_invariant_05_error_of_hif4():
    """Half of a quarter, times two for each exponent that is set; the last quarter may be whole."""
    x = hard(128, 128, 2, "gauss")
    elements, scale, _ = parts(x, QSpec(format="hif4"))
    y = x.double().abs() / scale
    fours = y.unflatten(-1, (-1, 4)).amax(-1, keepdim=True).expand(-1, -1, 4).flatten(-2)
    power = 1 + (fours > 1.8) + 2.0 * (fours > 3.6)  # at least what it was written with
    inside = y < 7.25
    assert ((elements.abs() - y).abs() <= power * 0.27)[inside].all()
    assert (elements.abs() == 7)[y > 8].all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxint8"])
@pytest.mark.parametrize("rule", MX_RULES)
def test_invariant_05_who_clips(name, rule):
    x = torch.randn(512, 32) * torch.exp2(torch.randint(-9, 9, (512, 1)).float())
    spec = QSpec(format=name, scale_rule=rule)
    grid = resolve(spec).row.grid
    _, scale, _ = parts(x, spec)
    peak = x.double().abs().amax(1)
    clips = peak / scale[:, 0] > grid.largest * (1 + 2.0**-23)
    if rule in ("rceil", "ceil"):
        assert not clips.any()
    if rule == "floor":
        mantissa = torch.frexp(peak).mantissa * 2
        assert clips.equal(mantissa > grid.largest / 2.0**grid.max_exponent)
        assert clips.any()


@only(lambda r: r.rule in ("unbiased", "three_quarters", "p2"))
def test_invariant_05_rules_that_never_clip(spec):
    x = torch.randn(128, 128)
    _, scale, above = parts(x, spec)
    assert (x.double().abs() / (scale * above)).max() <= resolve(spec).row.top * (1 + 1e-6)


def test_invariant_05_a_share_of_gaussian_blocks_clips_under_the_rule_of_the_text():
    x = torch.randn(1 << 15, 32)
    _, scale, _ = parts(x, QSpec(format="mxfp4"))
    assert (x.abs().amax(1) > 6 * scale[:, 0]).double().mean() == pytest.approx(0.297, abs=0.01)


# --- 3, 4 and 6: symmetries --------------------------------------------------------------------

MOVES = {  # what a second pass moves, by format and rule; the rest stays to the bit
    "hif4-None": (0.03, 0.07),  # the page measured 4%
    "int4-max": (0.01, 0.1),  # by the last bit of float32 scales
    "mxfp4-quest": (0.001, 0.02),
    "mxfp4-three_quarters": (0.03, 0.1),
    **{f"{n}-unbiased": (0.5, 1) for n in ("nvfp4", "nvfp4_ue5m3", "nvint4")},
    "nvfp4-eden": (0.5, 1),
}


@every_spec
def test_invariant_03_a_second_pass_moves_nothing_but_where_documented(spec):
    once = fake_quantize(hard(256, 256, 8, "gauss"), spec)  # all block scales of NVFP4 are normal
    twice = fake_quantize(once, spec)
    low, high = MOVES.get(f"{spec.format}-{spec.scale_rule}", (0, 0))
    assert low <= (once != twice).double().mean().item() <= high
    if f"{spec.format}-{spec.scale_rule}" == "int4-max":
        torch.testing.assert_close(once, twice)


@every_spec
@pytest.mark.parametrize("axis", [-1, -2])
def test_invariant_04_equivariance(spec, axis):
    """Under the sign, powers of two, and permutations inside a block (HiF4: inside fours)."""
    x = torch.randn(64, 64)

    def q(x):
        values, scale, _ = quantize(x, spec, axis=axis, dtype=torch.float32)
        return values if scale is None else values * scale

    base = q(x)
    assert_same_bits(q(-x) + 0.0, -base + 0.0)
    if spec.format == "hifloat8":  # tapered: another exponent has other digits
        assert not q(x * 2.0**9).equal(base * 2.0**9)
    else:
        assert_same_bits(q(x * 2.0**9), base * 2.0**9)
        assert_same_bits(q(x * 2.0**-12), base * 2.0**-12)
    together = 4 if spec.format == "hif4" else 16
    order = torch.cat([torch.randperm(together) + i for i in range(0, 64, together)])
    assert_same_bits(q(x.index_select(axis, order)), base.index_select(axis, order))


def test_invariant_04_hif4_knows_the_order_of_fours():
    x = torch.randn(64, 64)
    order = torch.randperm(64)
    assert not fake_quantize(x[:, order], "hif4").equal(fake_quantize(x, "hif4")[:, order])


@only(lambda r: r.spec.tile == "2d")
def test_invariant_06_tiles_are_the_same_both_ways(spec):
    w = hard(128, 160, 2, "gauss") * torch.exp2(torch.randint(-4, 4, (128, 1)).float())
    for scope in {*resolve(spec).row.scopes} & {"tensor", "block", "none"}:
        s = spec.but(scope=scope)
        by_k = quantize(w, s, axis=-1, dtype=torch.float32)
        by_n = quantize(w, s, axis=-2, dtype=torch.float32)
        flipped = quantize(w.T.contiguous(), s, axis=-1, dtype=torch.float32)
        assert_same_bits(by_k, by_n)
        assert_same_bits(by_k.values, flipped.values.T.contiguous())


def test_invariant_06_a_sum_over_a_tile_is_that_of_its_transpose():
    """To the bit, so that choices by error are the same both ways."""
    x = torch.randn(9, 16, 7, 16)
    sums = block_sum(x, (-3, -1))
    assert_same_bits(sums, block_sum(x.transpose(-3, -1), (-3, -1)))
    torch.testing.assert_close(sums, x.sum((-3, -1), keepdim=True))
    torch.testing.assert_close(block_sum(x, (-1,)), x.sum(-1, keepdim=True))


@only(lambda r: r.spec.tile == "2d" and r.rule in ("max", "p2", "unbiased", "max61440", "eden"))
def test_invariant_06_a_tile_has_the_largest_scale_of_its_rows(spec):
    w = torch.randn(128, 128)
    r = resolve(spec)
    if "block" in r.row.scopes:
        spec = spec.but(scope="block")
    b = r.row.block
    _, tiled, _ = parts(w, spec)
    _, rows, _ = parts(w, spec.but(tile="1d"))
    rows = rows.unflatten(0, (-1, b)).amax(1, keepdim=True).expand(-1, b, -1).flatten(0, 1)
    assert_same_bits(tiled, rows)


# --- 9, 10, 11 and 17: values ------------------------------------------------------------------


@every_spec
def test_invariant_09_values_survive_bfloat16_where_the_row_says_so(spec):
    wide = hard(128, 128, 3, "gauss") * torch.exp2(torch.randint(-9, 1, (128, 128)).float())
    x = torch.cat([wide, torch.rand(128, 128) - 0.5])  # even numbers, where IF4 takes integers
    for s in by_scope(spec):
        wide = quantize(x, s, axis=-1, dtype=torch.float32).values
        narrow = quantize(x, s, axis=-1, dtype=torch.bfloat16).values
        assert narrow.dtype == torch.bfloat16
        assert narrow.float().equal(wide) == resolve(s).exact_in_bf16


def test_invariant_10_e1m2_is_int4_with_a_quarter_of_the_scale():
    x = torch.randn(64, 64)
    peak = x.view(64, 4, 16).abs().amax(-1, keepdim=True)
    scale = peak.double() / 7
    wanted = (x.view(64, 4, 16) / scale).round().clamp(-7, 7) * scale
    torch.testing.assert_close(fake_quantize(x, "int4").view(64, 4, 16), wanted.float())


@pytest.mark.parametrize("block", [32, 64])
def test_invariant_10_mxfp8_and_rows_scaled_by_powers_of_two(block):
    x = torch.randn(64, block)
    blocks = fake_quantize(x, "mxfp8_e4m3", scale_rule="rceil")
    by_row = QSpec(format="fp8_e4m3", scope="row", scale_rule="p2")
    _, _, scale = parts(x, by_row)
    normal = x.double().abs() / scale >= 2.0**E4M3.min_exponent
    assert normal.double().mean() > 0.9
    assert fake_quantize(x, by_row)[normal].equal(blocks[normal])


@every_spec
@pytest.mark.parametrize("axis", [-1, -2])
def test_invariant_11_zeros_stay_zeros(spec, axis):
    ends = torch.tensor([0, 3, 3, 40])
    for s, dtype in itertools.product(by_scope(spec), (torch.float32, torch.bfloat16)):
        x = torch.zeros(40, 48)
        assert not quantize(x, s, axis=axis, dtype=dtype).values.any()
        values, scale, _ = quantize(x, s, axis=axis, dtype=dtype, ends=ends)
        assert not values.any()
        assert scale is None or not scale.isnan().any()
        x[3:] = torch.randn(37, 48)
        x[20, :] = 0
        x[:, 5] = 0
        q = fake_quantize(x, s)
        assert q.isfinite().all()
        assert not q[:3].any()


@every_spec
def test_invariant_11_nan_infinity_and_the_ends_of_float32(spec):
    x = torch.ones(256, 128)
    x[0, 3], x[128, 3] = NAN, INF
    q = fake_quantize(x, spec)
    assert q[0, 3].isnan()
    assert not q[128, 3].isfinite()
    if spec.scale_rule == "mask" or not resolve(spec).row.scopes:  # nothing spans more than a block
        assert q[1:128].isfinite().all()
        assert q[129:].isfinite().all()
    wide = torch.tensor([1e-45, 1e-38, 1e-30, 1.0, 1e30])[:, None] * torch.randn(5, 128)
    assert fake_quantize(wide, spec).isfinite().all() or spec.format == "hifloat8"
    assert not fake_quantize(wide, spec).isnan().any()


SHARES = {  # relative mean square error on N(0, 1), precision.md section 3; rule, tile, scope
    ("mxfp4", "floor"): 0.01320,
    ("mxfp4", "rceil"): 0.01334,
    ("mxfp4", "ceil"): 0.02079,
    ("mxfp4", "even"): 0.01252,
    ("nvfp4", "max"): 0.00906,
    ("nvfp4", "4over6"): 0.00757,
    ("nvfp4", "max", "2d"): 0.01240,
    ("hif4", None): 0.00687,
    ("int4", "max"): 0.00725,
    ("fp8_e4m3", "max"): 0.00070,
    ("fp8_e5m2", "max"): 0.00277,
}


def test_invariant_17_errors_on_gaussian_numbers():
    x = torch.randn(1024, 1024)
    found = {}
    for key, wanted in SHARES.items():
        name, rule, tile = (*key, "1d")[:3]
        q = fake_quantize(x, name, scale_rule=rule, tile=tile)
        found[name, rule, tile] = relative_error(q, x)
        assert found[name, rule, tile] == pytest.approx(wanted, rel=0.02), key
    hif4 = found["hif4", None, "1d"]
    assert found["nvfp4", "max", "1d"] / hif4 == pytest.approx(1.3, abs=0.04)
    assert found["mxfp4", "floor", "1d"] / hif4 == pytest.approx(1.9, abs=0.05)
    assert {spec.format for spec in EVERY} == {row.name for row in LOW}
