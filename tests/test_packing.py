"""Codes and packed weights: exact both ways, and the numbers that `quantize` gives."""

import pytest
import torch
from packed_toys import as_bits
from torch import nn

from layers.packing import PackedWeight, codes, pack
from layers.packing.storage import packable
from layers.packing.weight import native_view
from layers.precision.grids import E1M2, E2M1, E4M3, E5M2, GRIDS
from layers.precision.quantize import quantize
from layers.precision.spec import QSpec

SPECS = [
    *(QSpec(format=name) for name in packable()),
    QSpec(format="mxfp4", scale_rule="rceil"),
    QSpec(format="nvfp4", tile="2d"),
    QSpec(format="nvfp4", scope="row"),
    QSpec(format="mxfp4", hadamard=32),
    QSpec(format="fp8_e5m2", scope="row", scale_rule="p2"),
    QSpec(format="fp8_e4m3", scope="block"),
    QSpec(format="fp8_e4m3", scope="block", tile="2d"),
]
by_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: str(s.to_plain()))
by_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda g: g.name)


@by_grid
def test_invariant_12_every_code_comes_back(grid):
    table = codes.values_by_code(grid)
    numbers = ~table.isnan()
    assert numbers.sum() >= 2 * len(grid.magnitudes())
    code = torch.arange(len(table)).to(torch.uint8)
    assert torch.equal(codes.encode_elements(table[numbers], grid), code[numbers])
    assert torch.equal(codes.decode_elements(code[numbers], grid), table[numbers])


def test_codes_are_those_of_torch_and_of_the_definition():
    code = torch.arange(256).to(torch.uint8)
    for grid, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        theirs = code.view(dtype).float()
        torch.testing.assert_close(
            codes.values_by_code(grid), theirs, rtol=0, atol=0, equal_nan=True
        )
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert codes.values_by_code(E2M1).tolist() == e2m1 + [-v for v in e2m1]
    assert codes.values_by_code(E2M1)[8].signbit()
    assert codes.values_by_code(E1M2)[:8].tolist() == [k / 4 for k in range(8)]


@pytest.mark.parametrize("kind", codes.SCALES)
def test_invariant_12_every_scale_comes_back(kind):
    table = codes.scales_by_code(kind)
    numbers = ~table.isnan()
    code = torch.arange(256).to(torch.uint8)
    assert torch.equal(codes.encode_scales(table[numbers], kind), code[numbers])
    seven = code[:128] if kind == "ue4m3" else code
    decoded = codes.decode_scales(seven, kind)
    torch.testing.assert_close(decoded, table[: len(seven)], rtol=0, atol=0, equal_nan=True)
    nan = codes.encode_scales(torch.tensor(torch.nan), kind)
    assert codes.decode_scales(nan, kind).isnan()


def test_scales_have_the_values_of_their_table():
    assert codes.scales_by_code("e8m0")[[0, 127, 254]].tolist() == [2.0**-127, 1.0, 2.0**127]
    assert codes.scales_by_code("ue4m3")[[1, 8, 126]].tolist() == [2.0**-9, 2.0**-6, 448.0]
    assert codes.scales_by_code("ue5m3")[[1, 8, 254]].tolist() == [2.0**-17, 2.0**-14, 114688.0]
    assert codes.scales_by_code("e6m2")[[0, 254]].tolist() == [2.0**-48, 49152.0]
    theirs = torch.arange(255).to(torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(codes.scales_by_code("e8m0")[:255], theirs)


def test_invariant_12_every_pair_of_nibbles_comes_back_low_one_first():
    pair = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    packed = codes.pack_codes(pair, 4)
    assert packed.shape == (256, 1)
    assert torch.equal(packed[:, 0], pair[:, 0] + 16 * pair[:, 1])
    assert torch.equal(codes.unpack_codes(packed, 4, 2), pair)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 31, 64])
@pytest.mark.parametrize("code_bits", [4, 6, 8])
def test_invariant_12_an_odd_last_dimension_is_filled_with_zeros(code_bits, width):
    code = torch.randint(0, 2**code_bits, (3, 2, width)).to(torch.uint8)
    packed = codes.pack_codes(code, code_bits)
    assert packed.shape[-1] == codes.row_bytes(width, code_bits)
    assert torch.equal(codes.unpack_codes(packed, code_bits, width), code)
    if code_bits == 4 and width % 2:
        assert (packed[..., -1] < 16).all()
    if code_bits == 6:  # value i lies at bit 6 i, little-endian, whatever the shifts above say
        whole = int.from_bytes(bytes(packed[0, 0].tolist()), "little")
        assert [whole >> 6 * i & 63 for i in range(min(width, 4))] == code[0, 0, :4].tolist()


@by_spec
@pytest.mark.parametrize("shape", [(48, 64), (5, 33), (3, 20, 72), (130, 300), (1, 1)], ids=str)
def test_packed_numbers_are_the_quantised_ones_bit_for_bit(spec, shape):
    w = torch.randn(shape) * 0.02
    w[..., -1, -1] = -0.0
    w[..., 0, :16] = 0.0
    w[..., :1, 16:32] *= 1e-7
    packed = pack(w, spec)
    for dtype in (torch.bfloat16, torch.float32):
        values, scale, _ = quantize(w, spec, axis=-1, dtype=dtype)
        assert torch.equal(as_bits(packed.decode(dtype)), as_bits(values))
    if scale is None:
        assert packed.tensor_scale is None
    else:
        assert torch.equal(packed.tensor_scale, scale)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_what_is_no_number_and_what_is_all_zero_packs(name):
    w = torch.randn(8, 64)
    w[2, 3] = torch.nan
    values = quantize(w, name, axis=-1, dtype=torch.float32).values
    packed = pack(w, name)
    assert torch.equal(as_bits(packed.decode(torch.float32)), as_bits(values))
    assert packed.decode(torch.bfloat16)[2].isnan().any()
    zero = pack(torch.zeros(4, 40), name)
    assert not zero.decode(torch.float32).any()
    assert not zero.multiply(torch.ones(1, 40)).any()


def test_stochastic_rounding_packs_the_draw_of_its_key():
    w, key = torch.randn(16, 64), torch.tensor(77)
    spec = QSpec(format="mxfp4", rounding="stochastic", scale_rule="rceil")
    values = quantize(w, spec, axis=-1, dtype=torch.float32, key=key, operand=1).values
    assert torch.equal(pack(w, spec, key=key).decode(torch.float32), values)
    assert not torch.equal(pack(w, spec, key=key + 1).decode(torch.float32), values)


def test_invariant_12_a_packed_weight_round_trips_through_its_state_dict():
    leaf = nn.Module()
    leaf.weight = PackedWeight(pack(torch.randn(2, 6, 33), "nvfp4"))
    state = leaf.state_dict()
    assert sorted(state) == ["weight.codes", "weight.scales", "weight.tensor_scale"]
    other = nn.Module()
    other.weight = PackedWeight(pack(torch.randn(2, 6, 33), "nvfp4"))
    other.load_state_dict(state)
    assert other.weight.shape == (2, 6, 33)
    assert torch.equal(other.weight.decode(torch.float32), leaf.weight.decode(torch.float32))
    assert torch.equal(other.weight.tensor_scale, leaf.weight.tensor_scale)


def test_another_floating_type_leaves_a_packed_weight_as_it_is():
    weight = PackedWeight(pack(torch.randn(6, 64), "nvfp4"))
    before = {name: t.clone() for name, t in weight.state_dict().items()}
    weight.to(torch.bfloat16).half()
    for name, t in weight.state_dict().items():
        assert t.dtype == before[name].dtype
        assert torch.equal(t, before[name])


def test_rows_of_a_table_decode_alone():
    w, ids = torch.randn(10, 48), torch.tensor([7, 0, 7])
    spec = QSpec(format="nvfp4", scope="row")
    table = PackedWeight(pack(w, spec))
    whole = table.decode(torch.float32) * table.tensor_scale
    rows = table.packed.rows(ids)
    assert torch.equal(rows.decode(torch.float32) * rows.tensor_scale, whole[ids])
    assert torch.equal(table.decode_rows(ids, torch.float32), table.decode(torch.float32)[ids])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mxfp4", 4.25), ("nvfp4", 4.5), (QSpec(format="nvfp4", tile="2d"), 4.5),
        ("mxfp6_e2m3", 6.25), ("mxfp8_e4m3", 8.25), ("fp8_e4m3", 8.0),
    ],
)  # fmt: skip
def test_bytes_are_the_bits_that_a_format_names(spec, expected):
    w = torch.randn(256, 512)
    weight = PackedWeight(pack(w, spec))
    assert weight.bytes * 8 / w.numel() == pytest.approx(expected, rel=0.001)


def test_native_views_have_the_dtypes_of_torch_and_the_same_bytes():
    weight = pack(torch.randn(4, 64), "nvfp4")
    view = native_view("codes", weight.codes, weight.storage)
    assert view.dtype == torch.float4_e2m1fn_x2
    assert torch.equal(view.view(torch.uint8), weight.codes)
    scales = native_view("scales", weight.scales, weight.storage)
    assert scales.dtype == torch.float8_e4m3fn
    values = weight.decode(torch.float32).unflatten(1, (-1, 16))
    elements = codes.decode_elements(codes.unpack_codes(weight.codes, 4, 64), E2M1)
    assert torch.equal(elements.unflatten(1, (-1, 16)) * scales.float()[..., None], values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: pack(torch.randn(4, 32), "bf16"), "unknown format to pack 'bf16'"),
        (lambda: pack(torch.randn(4, 32), "mxfp5"), "unknown format 'mxfp5'"),
        (lambda: pack(torch.randn(4, 32), QSpec(format="mxfp4", hadamard=32, signs="step")),
         "new signs each step cannot be packed"),
        (lambda: codes.encode_elements(torch.tensor([0.75]), E2M1), "grid e2m1 cannot say 0.75"),
        (lambda: codes.encode_scales(torch.tensor([3.0]), "e8m0"), "scales e8m0 cannot say 3.0"),
        (lambda: codes.pack_codes(torch.zeros(2, dtype=torch.uint8), 5), "4, 6 or 8 bits can be"),
        (lambda: codes.unpack_codes(torch.zeros(2, dtype=torch.uint8), 4, 6), "take 3 bytes a row"),
    ],
)  # fmt: skip
def test_wrong_packings_say_so_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        wrong()
    assert message in str(error.value)
