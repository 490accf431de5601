"""Packed models: the numbers of the fake-quantised forward, in a fraction of the room."""

import json

import pytest
import torch
from safetensors import safe_open

import zoo
from layers.linear import ExpertLinear, Linear, ValueTable
from layers.packing import PackedWeight
from layers.packing.products import FEW
from layers.packing.storage import packable
from layers.precision import LeafPrecision, QSpec
from zoo.catalogue import FFNS
from zoo.generate import generate
from zoo.packing import header_of, pack
from zoo.pretrained import load_weights, write_weights

LOW = [name for name in zoo.precisions() if name not in ("fp32", "bf16")]
every_variant = pytest.mark.parametrize("entry", FFNS, ids=lambda entry: entry.name)
every_precision = pytest.mark.parametrize("precision", LOW)
SPECS = [
    *packable(),
    {"format": "nvfp4", "tile": "2d"}, {"format": "nvfp4", "scope": "row"},
    {"format": "fp8_e4m3", "scope": "block"}, {"format": "mxfp4", "hadamard": 32},
]  # fmt: skip
every_format = pytest.mark.parametrize("spec", SPECS, ids=str)


def small_model(precision, **options) -> zoo.LanguageModel:
    config = {
        "vocab_size": 96, "d_model": 64, "n_layers": 2, "max_seq_len": 64,
        "ffn": {"name": "moe", "n_experts": 4, "top_k": 2, "d_expert": 48},
        "router": {"name": "top_k"}, "n_heads": 4,
    }  # fmt: skip
    return zoo.build({"model": config | options, "precision": precision}).eval()


def leaf_of(leaf, spec):
    leaf.precision = LeafPrecision.of({"all": spec})
    return leaf.eval()


@every_variant
@every_precision
@torch.no_grad()
def test_every_variant_packed_gives_the_same_bits(entry, precision):
    ffn = zoo.create(entry.name, **entry.tiny, precision=precision).eval()
    x = torch.randn(2, 32, entry.tiny["d_model"])
    before = ffn(x)
    report = pack(ffn)
    assert report.leaves
    after = ffn(x)
    assert torch.equal(after.y, before.y)
    for name, loss in (before.losses or {}).items():
        assert torch.equal(after.losses[name], loss)


@every_format
@torch.no_grad()
def test_linear_packed_gives_the_same_bits(spec):
    leaf = leaf_of(Linear(80, 24, role="ffn", bias=True), spec)
    x, one = torch.randn(3, 7, 80), torch.randn(1, 80)
    y, y_one = leaf(x), leaf(one)
    pack(leaf)
    assert isinstance(leaf.weight, PackedWeight)
    assert torch.equal(leaf(x), y)
    torch.testing.assert_close(leaf(one), y_one, rtol=2**-7, atol=2**-7)  # an ulp of bfloat16


@every_format
@torch.no_grad()
def test_experts_packed_give_the_same_bits(spec):
    leaf = leaf_of(ExpertLinear(4, 80, 24, role="expert"), spec)
    x = torch.randn(40, 80)
    for counts in ([40, 0, 0, 0], [17, 0, 20, 3], [0, 1, 1, 1]):
        counts = torch.tensor(counts)
        rows = x[: int(counts.sum())]
        y = leaf(rows, counts)
        packed = leaf_of(ExpertLinear(4, 80, 24, role="expert"), spec)
        packed.load_state_dict(leaf.state_dict())
        pack(packed)
        if len(rows) > FEW:
            assert torch.equal(packed(rows, counts), y)
        else:
            torch.testing.assert_close(packed(rows, counts), y, rtol=2**-7, atol=2**-7)
        for expert in range(4):
            ours, theirs = packed.one(x[:9], expert), leaf.one(x[:9], expert)
            assert torch.equal(ours, theirs)


@every_format
@torch.no_grad()
def test_tables_packed_give_the_same_bits(spec):
    table = leaf_of(ValueTable(50, 48, role="memory"), spec)
    table.weight.data[3] *= 100  # a scale that other rows must not see
    ids, weights = torch.randint(0, 50, (6, 5)), torch.rand(6, 5)
    y = table(ids, weights)
    pack(table)
    assert torch.equal(table(ids, weights), y)


@torch.no_grad()
def test_a_token_alone_computes_in_float32_what_the_decoded_matrix_would():
    leaf = leaf_of(Linear(256, 32, role="ffn"), "nvfp4")
    x = torch.randn(1, 256)
    pack(leaf)
    leaf.precision = LeafPrecision.of({"all": "nvfp4", "fprop_x": "fp32", "compute": "fp32"})
    w = leaf.weight.decode(torch.float32).double() * leaf.weight.tensor_scale
    torch.testing.assert_close(leaf(x), (x.double() @ w.T).float())


@pytest.mark.parametrize("precision", ["mxfp4", "nvfp4", "fp8_block128"])
@torch.no_grad()
def test_a_packed_model_gives_the_same_bits_and_generates(precision):
    model = small_model(precision)
    tokens = torch.randint(0, 96, (2, 24))
    logits = model(tokens).logits
    report = pack(model)
    assert torch.equal(model(tokens).logits, logits)
    assert report.bytes < report.bytes_before
    new = generate(model, tokens[:1], max_new_tokens=5, temperature=0.0)
    assert new.shape == (1, 29)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_packed_model_comes_back_from_a_folder(tmp_path, tied):
    model = small_model("nvfp4", tie_embeddings=tied)
    tokens = torch.randint(0, 96, (2, 24))
    pack(model)
    model.save_pretrained(tmp_path)
    loaded = zoo.LanguageModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert not loaded.training
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    state, again = model.state_dict(), loaded.state_dict()
    assert list(state) == list(again)
    for name, t in state.items():
        assert again[name].dtype == t.dtype
        assert torch.equal(again[name], t)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    codes = [d for name, d in dtypes.items() if name.endswith(".codes")]
    assert codes
    assert set(codes) == {"F4"}
    assert {d for name, d in dtypes.items() if name.endswith(".scales")} == {"F8_E4M3"}


@every_format
@torch.no_grad()
def test_every_format_comes_back_from_a_file(tmp_path, spec):
    def built():
        model = small_model({"default": {"all": spec}, "name": "x"})
        return model

    model, tokens = built(), torch.randint(0, 96, (2, 24))
    pack(model)
    write_weights(model, tmp_path / "w.safetensors")
    loaded = built()
    loaded.load_state_dict(small_model("bf16").state_dict())
    load_weights(loaded, tmp_path / "w.safetensors")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_packed_bytes_are_within_two_percent_of_the_formats_bits(tmp_path):
    for name, bits in (("mxfp4", 4.25), ("nvfp4", 4.5)):
        ffn = zoo.create("swiglu", d_model=256, d_ff=512, precision=name)
        numbers = sum(p.numel() for p in ffn.parameters())
        report = pack(ffn)
        write_weights(ffn, tmp_path / "w.safetensors")
        on_disk = (tmp_path / "w.safetensors").stat().st_size
        assert report.bytes * 8 / numbers == pytest.approx(bits, rel=0.02)
        assert on_disk * 8 / numbers == pytest.approx(bits, rel=0.02)
        assert sum(leaf.numbers for leaf in report.leaves) == numbers
        assert "swiglu" not in str(report)
        assert f"{bits:.3f} bits" in str(report)


def test_high_leaves_are_cast_and_everything_is_frozen():
    model = small_model("mxfp4", tie_embeddings=False)
    pack(model)
    assert model.head.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_a_plain_model_has_no_header():
    assert header_of(small_model("mxfp4")) is None
    model = small_model("mxfp4")
    pack(model)
    said = json.loads(header_of(model))
    assert set(said["packed"]) <= set(said["leaves"])


def test_the_inputs_may_be_left_high():
    leaf = leaf_of(Linear(64, 8, role="ffn"), "mxfp4")
    pack(leaf)
    leaf.precision = LeafPrecision.of({"all": "mxfp4", "fprop_x": "bf16"})
    x = torch.randn(32, 64)
    with torch.no_grad():
        y = leaf(x)
    assert torch.equal(y, x.bfloat16() @ leaf.weight.decode(torch.bfloat16).T)


def packed_leaf():
    leaf = leaf_of(Linear(64, 8, role="ffn"), "mxfp4")
    pack(leaf)
    return leaf


def broken_file(tmp_path):
    model = small_model("mxfp4")
    pack(model)
    write_weights(model, tmp_path / "w.safetensors")
    load_weights(small_model("mxfp4", d_model=128), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda _: pack(packed_leaf()), "packed already"),
        (lambda _: pack(small_model("bf16")), "nothing to pack"),
        (lambda _: pack(small_model("bf16"), "mxfp5"), "unknown precision 'mxfp5'"),
        (lambda _: packed_leaf().train()(torch.randn(2, 64)), "cannot be trained"),
        (lambda _: packed_leaf()(torch.randn(2, 64, requires_grad=True)), "cannot be trained"),
        (lambda _: setattr(leaf := packed_leaf(), "precision", LeafPrecision.of("bf16"))
         or leaf(torch.randn(2, 64)), "packed as mxfp4, but"),
        (lambda _: pack(leaf_of(Linear(64, 8, role="ffn"),
                                {"format": "mxfp4", "hadamard": 32, "signs": "step"})),
         "new signs each step"),
        (lambda _: pack(leaf_of(ValueTable(8, 32, role="memory"),
                                {"format": "mxfp4", "rounding": "stochastic"})),
         "rounded at random"),
        (broken_file, "must be"),
    ],
)  # fmt: skip
def test_wrong_uses_say_so_in_one_line(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        wrong(tmp_path)
    assert message in str(error.value)


def test_what_cannot_be_packed_leaves_the_model_as_it_was():
    model = small_model("mxfp4")
    leaf = model.blocks[0].get_submodule(
        next(n for n, m in model.blocks[0].named_modules() if isinstance(m, ExpertLinear))
    )
    leaf.precision = LeafPrecision.of({"all": QSpec(format="mxfp4", hadamard=32, signs="step")})
    with pytest.raises(ValueError, match="new signs each step"):
        pack(model)
    assert header_of(model) is None
    assert any(p.requires_grad for p in model.parameters())
