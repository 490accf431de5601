"""Products straight from codes: within float32 rounding of those of the decoded numbers."""

import ctypes
import logging

import pytest
import torch
from packed_toys import STORAGES, as_bits, by_storage, random_packed
from torch.utils.flop_counter import FlopCounterMode

from layers.packing import bits, native, unpack


@by_storage
def test_native_decode_equals_its_definition(storage):
    if storage.rows == 1 and not unpack.KERNELS.wanted():
        pytest.skip("needs a C++ compiler")
    for shape in ((5, 64), (3, 100), (4, 33), (2, 8, 17)):
        packed = random_packed(storage, *shape)
        for dtype in (torch.float32, torch.bfloat16):
            plain = storage.decode(packed.codes, packed.scales, shape[-1], dtype)
            assert torch.equal(as_bits(packed.decode(dtype)), as_bits(plain))
        if storage.bits == 4:  # exact in bfloat16
            assert torch.equal(packed.decode(torch.bfloat16).float(), packed.decode(torch.float32))


def assert_product(y, x, w):
    """Within float32 rounding of the sum of |x| |w|."""
    exact, size = x.double() @ w.double().mT, x.double().abs() @ w.double().abs().mT
    assert ((y - exact).abs() <= 4e-7 * size + 1e-30).all()


@by_storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["auto", "torch"])
def test_invariant_12_packed_products_equal_those_of_the_numbers(storage, dtype, mode, monkeypatch):
    monkeypatch.setenv("MOE_ZOO_KERNELS", mode)
    for n, k in ((5, 64), (3, 1000), (4, 33), (2, 1), (6, 512), (1, 129)):
        packed = random_packed(storage, n, k)
        w = packed.decode(torch.float32)
        for tokens in (1, 2, 4, 5):
            x = torch.randn(tokens, k).to(dtype)
            y = packed.multiply(x)
            assert y.dtype == torch.float32
            assert_product(y, x, w)


@by_storage
@pytest.mark.parametrize("mode", ["auto", "torch"])
def test_packed_products_of_experts_take_each_its_own(storage, mode, monkeypatch):
    monkeypatch.setenv("MOE_ZOO_KERNELS", mode)
    packed, x = random_packed(storage, 6, 20, 96), torch.randn(9, 96)
    which = torch.tensor([0, 0, 3, 5, 5, 5, 5, 5, 1])
    y, w = packed.multiply(x, which), packed.decode(torch.float32)
    for t, expert in enumerate(which.tolist()):
        assert_product(y[t : t + 1], x[t : t + 1], w[expert])
        one = packed[expert]
        assert torch.equal(one.decode(torch.float32), w[expert])
    with pytest.raises(ValueError, match=r"must be in \[0, 6\)"):
        packed.multiply(x[:1], torch.tensor([6]))


def test_an_infinity_or_nan_in_a_scale_reaches_the_product():
    for storage, nan in ((STORAGES[0], 255), (STORAGES[1], 127), (STORAGES[4], 255)):
        packed = random_packed(storage, 4, 128)
        packed.scales[2, 0] = nan
        for y in (packed.multiply(torch.ones(1, 128)), bits_product(packed, torch.ones(1, 128))):
            assert y.isnan().tolist() == [[False, False, True, False]]


def bits_product(packed, x):
    return bits.multiply(x, packed.codes, packed.scales, packed.storage, None)


def test_rows_that_are_large_do_not_overflow_the_decode_of_bits():
    packed = random_packed(STORAGES[0], 4, 64)
    x = torch.randn(1, 64) * 2.0**24
    assert_product(bits_product(packed, x), x, packed.decode(torch.float32))


def test_the_smallest_power_of_two_is_not_doubled():
    packed = random_packed(STORAGES[0], 4, 64)
    packed.scales.zero_()  # 2^-127, below the smallest normal float32
    x = torch.randn(1, 64) * 2.0**20
    y, exact = packed.multiply(x), x.double() @ packed.decode(torch.float32).double().mT
    assert exact.abs().min() > 0
    torch.testing.assert_close(y.double() * 2.0**107, exact * 2.0**107, rtol=1e-2, atol=1e-2)


def test_slices_of_rows_change_nothing(monkeypatch):
    for storage in (STORAGES[1], STORAGES[-1]):
        packed, x = random_packed(storage, 37, 64), torch.randn(2, 64)
        whole = bits_product(packed, x)
        monkeypatch.setattr(bits, "SLICE", 64 * 5)
        assert torch.equal(bits_product(packed, x), whole)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES[:3], ids=lambda s: f"{s.grid.name}-{s.scale}")
def test_the_compiled_decode_of_bits_gives_the_same(storage, monkeypatch):
    packed, x = random_packed(storage, 64, 256), torch.randn(1, 256)
    monkeypatch.setattr(bits, "FUSED", 0)
    assert_product(bits_product(packed, x), x, packed.decode(torch.float32))


def test_what_cannot_be_compiled_is_said_once_and_computed_plainly(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    monkeypatch.setattr(bits, "FUSED", 0)
    bits._fused.cache_clear()
    packed, x = random_packed(STORAGES[0], 8, 64), torch.randn(1, 64)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_product(bits_product(packed, x), x, packed.decode(torch.float32))
    bits._fused.cache_clear()
    assert [r.message for r in caplog.records] == [
        "packed products are not compiled, torch ops do the same: no compiler here"
    ]


def test_flops_are_counted_and_shapes_known_without_numbers():
    packed = random_packed(STORAGES[0], 24, 64)
    with FlopCounterMode(display=False) as counter:
        packed.multiply(torch.randn(3, 64))
    assert counter.get_total_flops() == 2 * 3 * 24 * 64
    for op, args in (
        (torch.ops.moe_zoo.packed_multiply, (torch.randn(3, 64), packed.codes, packed.scales,
                                             "e2m1", "e8m0", 32, 1, None)),
        (torch.ops.moe_zoo.packed_decode, (packed.codes, packed.scales, "e2m1", "e8m0", 32, 1, 64,
                                           torch.bfloat16)),
    ):  # fmt: skip
        torch.library.opcheck(op.default, args)


def test_jobs_are_laid_out_as_in_the_kernels():
    assert ctypes.sizeof(native.Job) == 6 * 8 + 6 * 8 + 4 * 4
    assert ctypes.sizeof(unpack.Job) == 4 * 8 + 5 * 8 + 2 * 4
