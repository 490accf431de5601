"""Packed weights in the byte orders of others: there and back, each number where it belongs."""

import pytest
import torch
from packed_toys import STORAGES, random_packed

from layers.packing import codes, layouts
from layers.packing.hif4 import decode_metadata


def test_layouts_come_back():
    mxfp4, nvfp4 = random_packed(STORAGES[0], 2, 6, 96), random_packed(STORAGES[1], 6, 128)
    hif4 = random_packed(STORAGES[4], 6, 128)
    nvfp4.scales.clamp_(max=126)
    for packed, there, back in (
        (mxfp4, layouts.to_gpt_oss, lambda parts: layouts.from_gpt_oss(*parts)),
        (mxfp4, layouts.to_gguf_mxfp4, layouts.from_gguf_mxfp4),
        (nvfp4, layouts.to_gguf_nvfp4, layouts.from_gguf_nvfp4),
        (hif4, layouts.to_hif4_units, layouts.from_hif4_units),
    ):
        again = back(there(packed))
        assert again.storage == packed.storage
        assert again.shape == packed.shape
        assert torch.equal(again.codes, packed.codes)
        assert torch.equal(again.scales, packed.scales)


def test_layouts_put_each_number_where_they_say():
    packed = random_packed(STORAGES[0], 1, 64)
    code = codes.unpack_codes(packed.codes, 4, 64)[0].tolist()
    data = layouts.to_gguf_mxfp4(packed)[0].tolist()
    assert len(data) == 34
    assert data[17] == packed.scales[0, 1]
    assert data[18 + 5] == code[32 + 5] + 16 * code[32 + 16 + 5]
    blocks, scales = layouts.to_gpt_oss(packed)
    assert (blocks.shape, scales.shape) == ((1, 2, 16), (1, 2))
    assert blocks[0, 1, 3] == code[32 + 6] + 16 * code[32 + 7]
    packed = random_packed(STORAGES[1], 1, 64)
    code = codes.unpack_codes(packed.codes, 4, 64)[0].tolist()
    data = layouts.to_gguf_nvfp4(packed)[0].tolist()
    assert data[:4] == packed.scales[0].tolist()
    assert data[4 + 8 * 2 + 3] == code[32 + 3] + 16 * code[32 + 8 + 3]


def test_units_of_hif4_hold_bit_k_for_group_k():
    metadata = torch.zeros(1, 4, dtype=torch.uint8)
    metadata[0] = torch.tensor([192, 1 << 3, 1 << 2, 1 << 5])
    expected = torch.ones(16)
    expected[6:8] *= 2  # the third eight from zero
    expected[2] *= 2
    expected[8 + 5] *= 2
    assert decode_metadata(metadata)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("shape", [(1, 1), (130, 5), (256, 8)])
def test_blackwell_scales_stand_at_the_offsets_of_the_layout(shape):
    scales = torch.randint(0, 256, shape).to(torch.uint8)
    flat = layouts.to_blackwell_scales(scales)
    width = -(-shape[1] // 4)
    for r in range(0, shape[0], 7):
        for c in range(shape[1]):
            at = (r // 128 * width + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
            assert flat[at] == scales[r, c]
    assert torch.equal(layouts.from_blackwell_scales(flat, *shape), scales)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: layouts.to_gpt_oss(random_packed(STORAGES[1], 2, 32)), "this layout holds"),
        (lambda: layouts.to_gguf_mxfp4(random_packed(STORAGES[0], 2, 33)), "multiple of 32"),
        (lambda: layouts.from_gguf_mxfp4(torch.zeros(2, 18)), "17 to a block"),
        (lambda: layouts.from_blackwell_scales(torch.zeros(3), 4, 4), "fill 512 bytes, got 3"),
    ],
)  # fmt: skip
def test_wrong_layouts_say_so_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        wrong()
    assert message in str(error.value)
