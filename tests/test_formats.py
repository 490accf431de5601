"""What each number format does, to the bit, in worked examples; and the table of formats.

What must hold for all of them is in test_format_invariants.py and test_rounding.py.
"""

import math
import threading

import pytest
import torch
from format_toys import assert_same_bits, every_spec, hard, kernels, some_specs
from torch.testing import assert_close

from layers.native import Source
from layers.precision import formats, native
from layers.precision.formats import FORMATS, every_format, format_of, register_format, resolve
from layers.precision.grids import E2M1, GRIDS, to_grid
from layers.precision.mx import MX_RULES
from layers.precision.quantize import fake_quantize, quantize
from layers.precision.row import Format
from layers.precision.spec import QSpec

every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
every_rule = pytest.mark.parametrize("rule", MX_RULES)
needs_compiler = pytest.mark.skipif(native.KERNELS.library() is None, reason="no C++ compiler")
INF, NAN = math.inf, math.nan


# --- grids ---------------------------------------------------------------------------------------


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


def test_nvfp4_has_one_tensor_scale_for_all_of_a_tensor():
    x = torch.randn(3, 5, 32)
    whole = fake_quantize(x, "nvfp4")
    assert_same_bits(whole, fake_quantize(x.reshape(15, 32), "nvfp4").reshape(3, 5, 32))
    tiled = fake_quantize(x, "nvfp4", tile="2d")  # 5 rows: each matrix has short tiles of its own
    padded = torch.nn.functional.pad(x, (0, 0, 0, 11)).reshape(48, 32)
    expected = fake_quantize(padded, "nvfp4", tile="2d").reshape(3, 16, 32)[:, :5]
    assert_same_bits(tiled, expected)


# --- HiF4 and others -----------------------------------------------------------------------------


def test_hif4_worked_example():
    x = torch.zeros(64)
    x[:6] = torch.tensor([6.9, -3.6, 0.9, -0.0, 1.9, 1.3])  # a four at the top, and its neighbour
    x[8:10] = torch.tensor([0.12, -0.13])
    q = fake_quantize(x, "hif4")  # 6.9 / 7 rounds to 1: the scale
    assert q[:6].tolist() == [7.0, -4.0, 1.0, -0.0, 2.0, 1.5]  # steps of 1, then of 0.5
    assert q[3].signbit()
    assert q[8:10].tolist() == [0.0, -0.25]  # steps of 0.25; half of one goes up
    assert not q[10:].any()


def test_hif4_corner_cases():
    x = torch.zeros(6, 64)
    x[1, 3], x[2, 3] = INF, NAN
    x[3, :2] = torch.tensor([1e38, 1.0])
    x[4, :3] = torch.tensor([2.0**-51, 2.0**-52, -(2.0**-50)])  # the smallest scale is 2^-48
    x[5, :2] = torch.tensor([3.4e38, -0.0])
    q = fake_quantize(x, "hif4")
    assert not q[0].any()
    assert q[1:3].isnan().all()  # the whole unit
    assert q[3, :2].tolist() == [344064.0, 0.0]  # 1.3125 * 2^18
    assert q[4, :3].tolist() == [2.0**-50, 0.0, -(2.0**-50)]  # half a step goes up
    assert q[5, :2].tolist() == [344064.0, 0.0]
    assert q[5, 1].signbit()


def test_quest_takes_equal_numbers_by_their_size():
    x = torch.full((1, 32), 5.0)
    assert fake_quantize(x, "mxfp4", scale_rule="quest").equal(torch.full((1, 32), 4.0))
    x = torch.randn(1, 32)
    x[0, 3] = 100.0  # far out: clipped, so that the others keep their digits
    q = fake_quantize(x, "mxfp4", scale_rule="quest")
    assert q[0, 3] < 60
    floor = fake_quantize(x, "mxfp4")
    assert (q[0, 4:] - x[0, 4:]).abs().mean() < (floor[0, 4:] - x[0, 4:]).abs().mean()


def test_three_quarters_by_hand():
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([7.9, 4.0, -1.0])  # times 3/4: 5.925, 3, -0.75
    q = fake_quantize(x, "mxfp4", scale_rule="three_quarters")
    assert_close(q[0, :3], torch.tensor([8.0, 4.0, -4 / 3]))


def test_tensor_scales_may_be_left_out():
    """NVFP4 alone ends at 448 * 6 and loses small blocks; UE5M3 reaches further both ways."""
    x = torch.ones(4, 16) * torch.tensor([1e5, 1.0, 1e-3, 1e-4])[:, None]
    plain = fake_quantize(x, "nvfp4", scope="none")
    assert plain[:, 0].tolist() == pytest.approx([2688.0, 1.0, 0.0, 0.0], rel=0.1)
    wide = fake_quantize(x, "nvfp4_ue5m3", scope="none")
    assert wide[:, 0].tolist() == pytest.approx(x[:, 0].tolist(), rel=0.1)
    top = torch.full((1, 16), 6e5)
    assert fake_quantize(top, "nvfp4_ue5m3", scope="none")[0, 0] == pytest.approx(6e5, rel=0.1)
    capped = fake_quantize(top, "nvfp4_ue5m3", scope="none", scale_rule="max61440")
    assert capped[0, 0] == 6 * 61440


# --- what holds for every format -----------------------------------------------------------------


@some_specs
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


@some_specs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_computed_in_float32(spec, dtype):
    x = hard(20, 37, 5, "gauss").to(dtype)
    q = fake_quantize(x, spec)
    assert q.dtype == dtype
    assert_same_bits(q, fake_quantize(x.float(), spec).to(dtype))


@every_spec
def test_a_short_last_block_sees_zeros(spec):
    x = torch.randn(5, 37)
    padded = torch.nn.functional.pad(x, (0, 91, 0, 123))
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


BITS = {
    "fp32": 32, "bf16": 16, "e8m7": 16, "e8m3": 12, "hifloat8": 8, "fp8_e4m3": 8, "fp8_e5m2": 8,
    "fp4_e3m0": 4, "fp4_e2m1": 4, "fp4_e1m2": 4, "int4": 4, "mxint8": 8.25, "mxfp8_e4m3": 8.25,
    "mxfp6_e2m3": 6.25, "mxfp4": 4.25, "mxint4": 4.25, "nvfp4": 4.5, "nvfp4_ue5m3": 4.5,
    "nvint4": 4.5, "if4": 4.5, "hif4": 4.5,
}  # fmt: skip


def test_table():
    names = [row.name for row in FORMATS]
    assert len(set(names)) == len(names)
    assert set(names) >= set(BITS)
    for row in FORMATS:
        assert format_of(row.name) is row
        assert row.summary
        assert row.paper
    assert {name: format_of(name).bits for name in BITS} == BITS
    first = {name: format_of(name).scale_rules[0] for name in ("mxfp4", "nvfp4", "e8m3", "if4")}
    assert first == {"mxfp4": "floor", "nvfp4": "max", "e8m3": "nearest", "if4": "mse"}
    inexact = {row.name for row in FORMATS if not row.exact_in_bf16}
    assert inexact == {"fp32", "if4"}
    assert not resolve(QSpec(format="int4")).exact_in_bf16  # its own scales are float32
    assert resolve(QSpec(format="int4", scope="tensor")).exact_in_bf16
    assert not resolve(QSpec(format="mxfp4", scale_rule="three_quarters")).exact_in_bf16


def ternary(name):
    """A row that another package might add: -1, 0, 1."""
    return Format(
        name=name, bits=2, cast=lambda x, rule, noise: x.round().clamp(-1, 1),
        roundings=("nearest",), summary="signs and zeros", paper="none",
    )  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    """The table of formats, to be added to for one test."""
    monkeypatch.setattr(formats, "_table", dict(formats._table))
    formats._read_entry_points.cache_clear()
    yield
    formats._read_entry_points.cache_clear()


@pytest.mark.usefixtures("table")
def test_another_package_registers_a_format():
    row = register_format(ternary("ternary"))
    assert every_format()[-1] is row
    assert fake_quantize(torch.tensor([0.2, -3.0, 0.7]), "ternary").tolist() == [0, -1, 1]
    with pytest.raises(ValueError, match="two formats are named 'ternary': rename one"):
        register_format(row)
    with pytest.raises(ValueError, match="needs dtype, or cast, or grid and encode"):
        Format(name="nothing", bits=1, summary="no way there", paper="none")


@pytest.mark.usefixtures("table")
def test_entry_points_may_hold_formats(monkeypatch):
    class Point:
        def load(self):
            return [ternary("theirs"), "an Entry, say"]

    monkeypatch.setattr(formats, "entry_points", lambda group: [Point()])
    assert format_of("theirs").bits == 2
    assert [row.name for row in every_format()].count("theirs") == 1
    with pytest.raises(ValueError, match="Did you mean 'theirs'"):
        format_of("their")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fake_quantize(x, "mxfp"), "unknown format 'mxfp'. Did you mean 'mxfp4'?"),
        (lambda x: fake_quantize(x, "mxfp4", scale_rule="flor"), "Did you mean 'floor'?"),
        (lambda x: fake_quantize(x, "bf16", scale_rule="floor"), "scale rule of bf16"),
        (lambda x: fake_quantize(x, "mxfp4", tile="2d"), "unknown tile of mxfp4 '2d'"),
        (lambda x: fake_quantize(x[0], "nvfp4", tile="2d"), "at least two axes"),
        (lambda x: fake_quantize(x, "hif4", tile="2d"), "unknown tile of hif4 '2d'"),
        (lambda x: fake_quantize(x, "nvfp4", scale_rule="4over5"), "Did you mean '4over6'"),
        (lambda x: fake_quantize(x, "hif4", scope="row"), "unknown scope of hif4"),
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


@needs_compiler
@pytest.mark.parametrize("ends", [[3, 2], [0, 9], [-1, 4]])
def test_native_refuses_bad_ends(ends):
    with kernels("native"), pytest.raises(ValueError, match="ends must rise"):
        quantize(torch.randn(8, 32), "mxfp4", axis=-1, dtype=torch.float32, ends=torch.tensor(ends))


ENCODERS = [  # each once, and each way through it
    *(QSpec(format=name) for name in ("e8m3", "hifloat8", "int4", "mxfp4", "nvfp4", "if4", "hif4")),
    QSpec(format="mxfp4", scale_rule="quest"),
    QSpec(format="nvfp4", scale_rule="4over6", tile="2d"),
    QSpec(format="nvfp4", rounding="eden", hadamard=32, signs="step"),
    QSpec(format="e8m3", rounding="stochastic"),
]


def test_every_encoder_is_one_graph():
    torch._dynamo.reset()

    def everything(x, key):
        return [
            quantize(x, spec, axis=-2, dtype=torch.float32, key=key).values for spec in ENCODERS
        ]

    x, key = hard(20, 70, 7, "special"), torch.tensor(5)
    with kernels("torch"):
        compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=False)
        for got, expected in zip(compiled(x, key), everything(x, key), strict=True):
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
    text = tmp_path / "small.cpp"
    text.write_text('extern "C" int moe_zoo_small() { return 1; }')
    source, found = Source(text, ()), []
    builders = [
        threading.Thread(target=lambda: found.append(source.build(tmp_path / "built")))
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(found) == 2
    assert set(found) == set((tmp_path / "built").iterdir())
    assert source.build(tmp_path / "built") == found[0]
