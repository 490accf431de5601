"""A submodel taken out of a nested model: the same numbers, in a plain model."""

import re

import pytest
import torch
from torch.testing import assert_close

import zoo
from layers.precision import LeafPrecision, leaves
from zoo.extract import extract, extracted_config
from zoo.model import LanguageModel, ModelConfig

SMALL = {"vocab_size": 17, "d_model": 32, "n_layers": 3, "n_heads": 2, "max_seq_len": 24}
UNGATED = {"name": "matformer", "d_ff": 64, "activation": "relu2"}
GATED = {"name": "matformer", "d_ff": 64, "gated": True, "activation": "gelu"}
MOE = {"name": "moe", "n_experts": 4, "top_k": 2, "d_expert": 32}
MIXED = [UNGATED, "swiglu", GATED]
DENSE = {"ungated": UNGATED, "gated": GATED, "mixed": MIXED}
WIDTHS = {"uniform": 16, "each": [16, None, 48], "all": [None] * 3}


def nested(ffn, **options):
    return LanguageModel(ModelConfig(**{**SMALL, **options}, ffn=ffn)).eval()


def of_layers(model, widths):
    """As the model's forward takes them."""
    if not isinstance(widths, int):
        return widths
    return [widths if getattr(block.ffn, "nested", False) else None for block in model.blocks]


def pairs(model, made, widths):
    """Logits of the nested model at these widths, and of the extracted one, in several shapes."""
    for shape in ((1, 1), (2, 7), (3, 24)):
        tokens = torch.randint(17, shape)
        mask = torch.rand(shape) > 0.2
        with torch.no_grad():
            for given in (None, mask):
                yield (
                    model(tokens, given, widths=of_layers(model, widths)).logits,
                    made(tokens, given).logits,
                )


@pytest.mark.parametrize("widths", sorted(WIDTHS))
@pytest.mark.parametrize("ffn", sorted(DENSE))
def test_the_extracted_model_gives_the_same_bits(ffn, widths):
    model, widths = nested(DENSE[ffn]), WIDTHS[widths]
    made = extract(model, widths)
    for want, got in pairs(model, made, widths):
        assert got.equal(want)
    kinds = {type(block.ffn).__name__ for block in made.blocks}
    assert kinds <= {"MLP", "SwiGLU"}
    found = [block.ffn.config.hidden for block in made.blocks]
    full = [block.ffn.config.hidden for block in model.blocks]
    want = [w or f for w, f in zip(of_layers(model, widths), full, strict=True)]
    assert found == want
    assert all(p.is_contiguous() for p in made.parameters())


@pytest.mark.parametrize("ffn", sorted(DENSE))
def test_any_width_gives_the_same_numbers(ffn):
    """To rounding: products of few tokens take rows that are not aligned in another order."""
    model = nested(DENSE[ffn])
    for width in (1, 13, 63):
        for want, got in pairs(model, extract(model, width), width):
            assert_close(got, want)


@pytest.mark.parametrize("precision", ["bf16", "mxfp8", "nvfp4"])
def test_formats_go_with_the_weights(precision):
    """Widths of whole blocks; leaves keep their policies without being told."""
    model = nested(GATED)
    zoo.set_precision(model, precision)
    made = extract(model, 32)
    for want, got in pairs(model, made, 32):
        assert got.equal(want)
    ours, theirs = leaves(made), leaves(model)
    assert {name: leaf.precision for name, leaf in ours.items()} == {
        name: leaf.precision for name, leaf in theirs.items()
    }


def test_delayed_scales_go_with_the_weights():
    model = nested(UNGATED).train()
    delayed = LeafPrecision.of({"all": {"format": "fp8_e4m3", "scope": "delayed", "history": 2}})
    for leaf in leaves(model).values():
        leaf.precision = delayed
    model(torch.randint(17, (4, 24))).logits.square().sum().backward()
    zoo.update_delayed_scales(model)
    made = extract(model.eval(), [16, 32, 48])
    for name, leaf in leaves(made).items():
        assert leaf.operand_scales.equal(leaves(model)[name].operand_scales)
        assert (leaf.operand_scales != 1).any()
    for want, got in pairs(model, made, [16, 32, 48]):
        assert got.equal(want)


@pytest.mark.parametrize("options", [{}, {"gated": False, "activation": "relu", "bias": True}])
def test_experts_of_a_mixture_are_cut_alike(options):
    model = nested({**MOE, **options})
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # they start as zeros
            torch.nn.init.normal_(p)
    made = extract(model, [8, None, 20])
    for want, got in pairs(model, made, [8, None, 20]):
        assert_close(got, want)
    assert [block.ffn.config.hidden for block in made.blocks] == [8, 32, 20]
    assert [block.ffn.router.config for block in made.blocks] == [
        block.ffn.router.config for block in model.blocks
    ]


@pytest.mark.parametrize("ffn", [UNGATED, GATED, MOE, MIXED], ids=str)
def test_it_is_what_its_config_says(ffn):
    model = nested(ffn)
    made = extract(model, 16)
    assert made.config == extracted_config(model.config, 16)
    assert made.cost().params == sum(p.numel() for p in made.parameters())
    assert made.config.ffn == extract(model, of_layers(model, 16)).config.ffn
    again = LanguageModel(made.config)
    again.load_state_dict(made.state_dict())


def test_a_budget_is_kept():
    model = nested(UNGATED)
    budget = sum(p.numel() for p in model.parameters()) * 0.8
    made = zoo.extract(model, zoo.least_slope(model, params=budget))
    step = 2 * 32 * (64 - 32)  # one layer more from the second widest to the widest
    assert 0 <= budget - sum(p.numel() for p in made.parameters()) < step


def test_the_model_stays_as_it_is_and_shares_nothing():
    model = nested(UNGATED).train()
    model.activation_checkpointing = True
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    made = extract(model, 16)
    assert torch.get_rng_state().equal(state)
    assert made.training
    assert made.activation_checkpointing
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    after = model.state_dict()
    assert all(after[name].equal(t) for name, t in before.items())


def test_tied_heads_dtypes_and_other_parts_are_kept():
    ffn = [UNGATED, {"name": "memory_plus", "pool": "shared", "n_keys": 4, "top_k": 2},
           {"name": "memory_plus", "pool": "shared", "n_keys": 4, "top_k": 2}]  # fmt: skip
    for tied in (True, False):
        model = nested(ffn, tie_embeddings=tied).to(torch.bfloat16)
        made = extract(model, [16, None, None])
        assert (made.head.weight is made.embedding.weight) == tied
        assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
        for want, got in pairs(model, made, [16, None, None]):
            assert got.equal(want)


@pytest.mark.parametrize("mixer", ["attention", {"name": "spark_attention", "top_k": 4}])
@pytest.mark.parametrize("widths", [None, 16])
def test_heads_are_extracted_alike(widths, mixer):
    """Of grouped heads with norms: 4 query heads of 8 keep 2 key heads of 4."""
    model = nested(GATED, n_heads=8, n_kv_heads=4, d_head=8, qk_norm=True, mixer=mixer)
    made = extract(model, widths, heads=4)
    tokens = torch.randint(17, (2, 7))
    with torch.no_grad():
        want = model(tokens, widths=None if widths is None else [widths] * 3, heads=[4] * 3).logits
        assert made(tokens).logits.equal(want)
    assert made.config.attention == model.config.attention.first(4)
    assert made.config == extracted_config(model.config, widths, heads=4)
    assert made.cost().params == sum(p.numel() for p in made.parameters())


def test_heads_of_a_model_that_is_not_nested():
    model = nested("swiglu", n_heads=4)
    made = extract(model, heads=2)
    tokens = torch.randint(17, (2, 7))
    with torch.no_grad():
        assert made(tokens).logits.equal(model(tokens, heads=[2] * 3).logits)
    with pytest.raises(ValueError, match="nothing to extract: give widths, heads or both"):
        extract(model)
    with pytest.raises(ValueError, match=re.escape("heads must be in [1, n_heads=4], got 5")):
        extract(model, heads=5)


@pytest.mark.parametrize(
    ("ffn", "widths", "message"),
    [
        ("swiglu", 16, "no layer of this model is nested"),
        ({**MOE, "n_shared": 1}, 16, "no layer of this model is nested"),
        (UNGATED, 65, "layer 0: width must be in [1, 64], what the layer has, got 65"),
        (UNGATED, [64, 8, 0], "layer 2: width must be in [1, 64], what the layer has, got 0"),
        (UNGATED, [8, 8], "widths must have one entry for each of 3 layers, got 2"),
        (MIXED, [8, 8, 8], "layer 1: swiglu is not nested, it has no width 8"),
    ],
)
def test_errors(ffn, widths, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        extract(nested(ffn), widths)


def test_what_was_packed_is_not_cut():
    model = nested(UNGATED)
    zoo.set_precision(model, "nvfp4")
    zoo.pack(model)
    with pytest.raises(ValueError, match="extract first, then pack"):
        extract(model, 32)
