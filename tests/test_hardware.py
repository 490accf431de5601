"""Products by instructions: the same operands as the emulation, summed in float32."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from layers import products
from layers.packing.codes import decode_elements, decode_scales, unpack_codes
from layers.precision import LeafPrecision, QSpec, hardware
from layers.precision.coded import encode
from layers.precision.formats import resolve
from layers.precision.grids import E2M1
from layers.precision.quantize import quantize

CPU_SPECS = [
    "fp8_e4m3",
    "fp8_e5m2",
    {"format": "fp8_e4m3", "scope": "row", "scale_rule": "p2"},
    {"format": "fp8_e5m2", "scope": "row"},
    {"format": "fp8_e4m3", "scope": "static"},
    {"format": "fp8_e4m3", "hadamard": 16, "rounding": "stochastic"},
]
BLOCK_SPECS = [
    "mxfp8_e4m3",
    {"format": "mxfp8_e5m2", "scale_rule": "rceil", "rounding": "stochastic"},
    "mxfp4",
    {"format": "mxfp4", "hadamard": 32, "signs": "step"},
    "nvfp4",
    {"format": "nvfp4", "scope": "row"},
    {"format": "nvfp4", "hadamard": 16, "rounding": "stochastic"},
]
ids = {"ids": lambda spec: spec if isinstance(spec, str) else "-".join(map(str, spec.values()))}
KEY = torch.tensor(0x1234_5678_9ABC)
COUNTS = torch.tensor([5, 0, 33, 2])
M, K, N, E = 40, 72, 56, 4  # nothing a multiple of 32


def operands(experts):
    """x, w, dy, with an outlier; and the experts' counts."""
    shape = (E, N, K) if experts else (N, K)
    x, w, dy = torch.randn(M, K), torch.randn(shape), torch.randn(M, N)
    x[3, 7] = 50.0
    return x, w, dy, COUNTS.to(x.device) if experts else None


def both(spec, t, axis, counts, dtype, operand):
    """One operand for the instruction and for the emulation."""
    r = resolve(QSpec.of(spec))
    ends = None if counts is None or t.dim() == 3 else counts.cumsum(0)
    scale = None
    if r.given_scale:
        scale = torch.tensor(0.01) if counts is None else torch.linspace(0.01, 0.02, E)
        scale = scale.to(t.device)
    make = {"axis": axis, "dtype": dtype, "ends": ends, "key": KEY.to(t.device), "operand": operand,
            "scale": scale}  # fmt: skip
    return encode(t, spec, **make), quantize(t, spec, **make)


def decoded(coded):
    return coded.elements if coded.blocks is None else coded.elements * coded.blocks


@pytest.mark.parametrize("experts", [False, True], ids=["one", "experts"])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
    "spec", [*CPU_SPECS, *BLOCK_SPECS, {"format": "nvfp4", "tile": "2d"}], **ids
)
def test_operands_are_those_of_quantize(spec, axis, experts):
    """Elements times block scales, the scale above them, and where segments lie: bit for bit."""
    x, w, _, counts = operands(experts)
    for t in (x, w):
        coded, emulated = both(spec, t, axis, counts, torch.float32, 2)
        assert torch.equal(decoded(coded), emulated.values)
        for mine, theirs in ((coded.scale, emulated.scale), (coded.ends, emulated.ends)):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)


def three_products(spec_a, spec_b, experts, dtype):
    """(name, of the instruction, of the emulation in float32) of a layer's three products."""
    x, w, dy, counts = operands(experts)
    of = partial(both, counts=counts)
    for name, (a, b, axes) in {
        "fprop": (x, w, (-1, -1)), "dgrad": (dy, w, (-1, -2)), "wgrad": (dy, x, (-2, -2)),
    }.items():  # fmt: skip
        first = of(spec_a, a, axes[0], dtype=dtype, operand=0)
        second = of(spec_b, b, axes[1], dtype=dtype, operand=1)
        exact = of(spec_a, a, axes[0], dtype=torch.float32, operand=0)[1]
        exact_b = of(spec_b, b, axes[1], dtype=torch.float32, operand=1)[1]
        more = (counts,) if name != "wgrad" else (counts, dtype)
        more32 = (counts,) if name != "wgrad" else (counts, torch.float32)
        yield (
            name,
            getattr(hardware, name)(first[0], second[0], *more),
            getattr(products, name)(exact, exact_b, *more32),
        )


def assert_same_sums(found, expected, dtype):
    """Equal but for the order of float32 sums and one rounding to dtype."""
    assert found.dtype == dtype
    assert found.shape == expected.shape
    scale = expected.abs().max()
    step = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found.float(), expected, rtol=step + 1e-5, atol=1e-6 * float(scale))


@pytest.mark.parametrize("experts", [False, True], ids=["one", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spec", CPU_SPECS, **ids)
def test_fp8_products_on_a_cpu(spec, dtype, experts):
    for _, found, expected in three_products(spec, spec, experts, dtype):
        assert_same_sums(found, expected, dtype)


@pytest.mark.parametrize("experts", [False, True], ids=["one", "experts"])
def test_scales_by_tensor_and_by_row_meet(experts):
    row = {"format": "fp8_e4m3", "scope": "row"}
    for pair in (("fp8_e5m2", row), (row, "fp8_e4m3")):
        for _, found, expected in three_products(*pair, experts, torch.float32):
            assert_same_sums(found, expected, torch.float32)


def test_products_of_nothing_are_zeros():
    of = partial(encode, spec="fp8_e4m3", dtype=torch.float32)
    x, dy = of(torch.ones(0, K), axis=-2), of(torch.ones(0, N), axis=-2)
    assert torch.equal(hardware.wgrad(dy, x, None, torch.float32), torch.zeros(N, K))
    empty = hardware.fprop(of(torch.ones(0, K), axis=-1), of(torch.ones(N, K), axis=-1), None)
    assert empty.shape == (0, N)
    zero = hardware.fprop(of(torch.zeros(3, K), axis=-1), of(torch.ones(N, K), axis=-1), None)
    assert torch.equal(zero, torch.zeros(3, N))


# Block scales: no CPU multiplies by them, so a plain reading of what an instruction is given does


def read_block_scaled(mat, scales, recipe, swizzle):
    """[R, K] float32 from codes and from scales laid out in tiles, byte by byte."""
    assert swizzle == F.SwizzleType.SWIZZLE_32_4_4
    assert mat.is_contiguous()
    rows, k = mat.shape
    if mat.dtype == torch.float4_e2m1fn_x2:
        k *= 2
        elements = decode_elements(unpack_codes(mat.view(torch.uint8), 4, k), E2M1)
    else:
        elements = mat.float()
    assert rows % 32 == k % 32 == 0
    block = {F.ScalingType.BlockWise1x32: 32, F.ScalingType.BlockWise1x16: 16}[recipe]
    kind = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "ue4m3"}[scales.dtype]
    columns = -(-(k // block) // 4) * 4
    assert scales.shape == (-(-rows // 128) * 128 * columns,)
    values = decode_scales(scales.view(torch.uint8), kind)
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(k // block), indexing="ij")
    tile = (i // 128) * (columns // 4) + j // 4
    at = tile * 512 + (i % 32) * 16 + (i % 128) // 32 * 4 + j % 4
    return elements * values[at].repeat_interleave(block, 1)


def plain_scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b,
                    output_dtype):  # fmt: skip
    x = read_block_scaled(a, scale_a, recipe_a, swizzle_a)
    return (x @ read_block_scaled(b.t(), scale_b, recipe_b, swizzle_b).T).to(output_dtype)


@pytest.mark.parametrize("experts", [False, True], ids=["one", "experts"])
@pytest.mark.parametrize("spec", BLOCK_SPECS, **ids)
def test_what_a_block_scaled_instruction_is_given(spec, experts, monkeypatch):
    monkeypatch.setattr(hardware.F, "scaled_mm", plain_scaled_mm)
    monkeypatch.setattr(hardware.Instruction, "is_on", lambda *_: True)
    for name, found, expected in three_products(spec, spec, experts, torch.float32):
        if hardware.instruction_of(QSpec.of(spec)).only_bf16:
            torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-3, msg=name)
        else:
            assert_same_sums(found, expected, torch.float32)


def test_nan_reaches_the_product(monkeypatch):
    monkeypatch.setattr(hardware.F, "scaled_mm", plain_scaled_mm)
    monkeypatch.setattr(hardware.Instruction, "is_on", lambda *_: True)
    x = torch.randn(4, 64)
    x[1, 3] = torch.nan
    for spec in ("mxfp8_e4m3", "mxfp4"):
        a, b = (encode(t, spec, axis=-1, dtype=torch.float32) for t in (x, torch.randn(8, 64)))
        y = hardware.fprop(a, b, None)
        assert y[1].isnan().all()
        assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (200, 9), (256, 8)], ids=str)
def test_scales_lie_as_torchao_lays_them(shape):
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    codes = torch.randint(0, 255, shape, dtype=torch.uint8)
    expected = utils.to_blocked(codes, use_triton_kernel=False).flatten()
    assert torch.equal(hardware.tiled_scales(codes), expected)


# What is refused


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("mxfp8_e4m3", "no instruction for fprop_x mxfp8_e4m3; cpu has: FP8 by tensor or row"),
        ("hif4", "no instruction for fprop_x hif4"),
        ({"all": {"format": "fp8_e4m3", "scope": "block"}}, r"fprop_x fp8_e4m3 \(scope block\);"),
        ({"all": "fp8_e4m3", "wgrad_x": "bf16"}, "no instruction for wgrad_x bf16"),
        ({"all": "fp8_e4m3", "dgrad_w": "nvfp4"}, r"for dgrad_w nvfp4 \(scope tensor\); cpu has"),
        ({"all": "fp8_e4m3", "saved": "quantized"}, "needs saved 'original', got 'quantized'"),
    ],
    ids=str,
)
def test_what_a_device_lacks_is_refused_by_operand(precision, message):
    with pytest.raises(ValueError, match=message) as error:
        hardware.check_hardware(LeafPrecision.of(precision), "cpu")
    assert "\n" not in str(error.value)


def test_two_formats_of_two_instructions_are_refused(monkeypatch):
    monkeypatch.setattr(hardware.Instruction, "is_on", lambda *_: True)
    mixed = LeafPrecision.of({"all": "mxfp8_e4m3", "dgrad_dy": "mxfp4"})
    with pytest.raises(ValueError, match="for dgrad, dgrad_dy mxfp4 by dgrad_w mxfp8_e4m3; "):
        hardware.check_hardware(mixed, "cpu")
    ranges = LeafPrecision.of({"all": "fp8_e5m2"})
    with pytest.raises(ValueError, match="of which one must be E4M3"):
        hardware.check_hardware(ranges, "cuda")
    hardware.check_hardware(ranges, "cpu")
    a, b = (encode(torch.ones(4, 32), f, axis=-1, dtype=torch.float32)
            for f in ("mxfp8_e4m3", "nvfp4"))  # fmt: skip
    with pytest.raises(ValueError, match=r"multiplies mxfp8_e4m3 by nvfp4 \(scope tensor\)"):
        hardware.fprop(a, b, None)


def test_an_operand_on_a_device_without_the_instruction_is_refused():
    """A model that moved after its precision was set."""
    a = encode(torch.ones(4, 32), "mxfp4", axis=-1, dtype=torch.float32)
    with pytest.raises(ValueError, match="cpu has no instruction MXFP4: set the precision again"):
        hardware.fprop(a, a, None)


def test_what_passes():
    """High products stay ordinary ones; FP8's presets run on a CPU."""
    hardware.check_hardware(LeafPrecision.of("bf16"), "meta")
    forward = {"all": "fp8_e4m3", "fprop_x": "bf16", "fprop_w": "bf16"}
    hardware.check_hardware(LeafPrecision.of(forward), "cpu")
    assert hardware.instructions_on("cpu") == ("FP8 by tensor or row",)
    assert hardware.instructions_on("meta") == ()


# On a GPU. Written without one: these have not been run


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("experts", [False, True], ids=["one", "experts"])
@pytest.mark.parametrize("spec", [*CPU_SPECS, *BLOCK_SPECS], **ids)
def test_products_on_a_gpu(spec, experts):
    instruction = hardware.instruction_of(QSpec.of(spec))
    assert instruction is not None
    if not instruction.is_on(torch.device("cuda")):
        pytest.skip(f"this GPU has no {instruction.name}")
    if "e5m2" in str(spec):
        pytest.skip("two E5M2 operands have no instruction on a GPU")
    with torch.device("cuda"):
        for _, found, expected in three_products(spec, spec, experts, torch.bfloat16):
            assert_same_sums(found, expected, torch.bfloat16)
