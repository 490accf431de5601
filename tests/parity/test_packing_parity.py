"""Packed bytes against those of other packages, each skipped where it is missing."""

import warnings

import numpy as np
import pytest
import torch

from layers.packing import codes, layouts, pack
from layers.packing.gguf_file import write_gguf
from layers.precision.grids import E2M1, E2M3, E3M2
from layers.precision.quantize import fake_quantize
from layers.precision.spec import QSpec

pytestmark = pytest.mark.parity


@pytest.fixture
def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.prototype.mx_formats", exc_type=ImportError)


@pytest.mark.parametrize("rule", ["floor", "rceil", "ceil", "even"])
def test_mxfp4_bytes_are_torchaos(torchao, rule):
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode

    w = torch.randn(64, 128)
    theirs = MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode(rule))
    ours = pack(w, QSpec(format="mxfp4", scale_rule=rule))
    assert torch.equal(ours.codes, theirs.qdata.view(torch.uint8))
    assert torch.equal(ours.scales, theirs.scale.view(torch.uint8).view_as(ours.scales))


def test_nvfp4_bytes_are_torchaos(torchao):
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    w = torch.randn(64, 128)
    theirs = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().max()))
    ours = pack(w, "nvfp4")
    assert torch.equal(ours.scales, theirs.scale.view(torch.uint8).view_as(ours.scales))
    differ = ours.codes != theirs.qdata.view(torch.uint8)
    assert differ.double().mean() < 1e-3  # ties


def test_blackwell_scales_are_torchaos(torchao):
    from torchao.prototype.mx_formats.utils import to_blocked

    for shape in ((128, 4), (200, 9), (1, 1)):
        scales = torch.randint(0, 256, shape).to(torch.uint8)
        assert torch.equal(layouts.to_blackwell_scales(scales), to_blocked(scales).flatten())


@pytest.mark.parametrize(("name", "kind"), [("mxfp4", "MXFP4"), ("nvfp4", "NVFP4")])
def test_gguf_reads_what_we_pack(name, kind):
    gguf = pytest.importorskip("gguf")
    packed = pack(torch.randn(6, 128), name)
    data = getattr(layouts, f"to_gguf_{name}")(packed).numpy()
    theirs = gguf.quants.dequantize(data, getattr(gguf.GGMLQuantizationType, kind))
    np.testing.assert_array_equal(theirs, packed.decode(torch.float32).numpy())


def test_a_gguf_file_holds_the_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    w, plain = torch.randn(4, 128), torch.randn(3)
    tensors = {"a": pack(w, "mxfp4"), "b": pack(w, "nvfp4"), "experts": pack(w.view(2, 2, 128),
               "mxfp4"), "norm": plain}  # fmt: skip
    write_gguf(tmp_path / "model.gguf", tensors)
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert sorted(read) == ["a", "b", "b.scale", "experts", "norm"]
    assert read["experts"].shape.tolist() == [128, 2, 2]
    np.testing.assert_array_equal(read["norm"].data, plain.numpy())
    values = gguf.quants.dequantize(read["a"].data, read["a"].tensor_type)
    np.testing.assert_array_equal(values, fake_quantize(w, "mxfp4").numpy())
    values = gguf.quants.dequantize(read["b"].data, read["b"].tensor_type) * read["b.scale"].data
    np.testing.assert_array_equal(values, fake_quantize(w, "nvfp4").numpy())
    with pytest.raises(ValueError, match="unknown format of a gguf file"):
        write_gguf(tmp_path / "other.gguf", {"a": pack(w, "mxfp8_e4m3")})


def test_ml_dtypes_reads_our_codes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for grid, dtype, count in (
        (E2M1, ml_dtypes.float4_e2m1fn, 16),
        (E2M3, ml_dtypes.float6_e2m3fn, 64),
        (E3M2, ml_dtypes.float6_e3m2fn, 64),
    ):
        code = torch.arange(count).to(torch.uint8)
        theirs = code.numpy().view(dtype).astype(np.float32)
        np.testing.assert_array_equal(codes.values_by_code(grid).numpy(), theirs)


def test_transformers_unpacks_the_gpt_oss_layout():
    module = pytest.importorskip("transformers.integrations.mxfp4")
    packed = pack(torch.randn(2, 6, 96), "mxfp4")
    blocks, scales = layouts.to_gpt_oss(packed)
    theirs = module.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(theirs.mT, packed.decode(torch.bfloat16))
