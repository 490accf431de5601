"""Dense FFNs as Spark's: every number is used, and what is left of the function is as said."""

import pytest
import torch
from conversion_toys import WIDTH, D, dense
from recipe_toys import refused
from torch.testing import assert_close

import zoo
from layers.mlp import ACTIVATIONS, MLP
from layers.spark_ffn import SparkFFN
from layers.swiglu import SwiGLU
from zoo.conversion import convert, convert_ffn, receipt


def mlp(activation="gelu"):
    made = zoo.create("mlp", d_model=D, d_ff=WIDTH, activation=activation).double()
    assert isinstance(made, MLP)
    return made


def gated(activation="silu"):
    made = dense(activation)
    assert isinstance(made, SwiGLU)
    return made


def spark(ffn, **options):
    made = convert_ffn(ffn, "spark", **options)
    assert isinstance(made, SparkFFN)
    return made


def numbers(module):
    """All of its weights' numbers, in order."""
    return torch.cat([p.detach().flatten() for p in module.parameters()]).sort().values


@pytest.mark.parametrize("r", [1, 8, 15])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_an_ungated_ffn_is_cut_and_every_number_kept(r, activation):
    ffn = mlp(activation)
    made = spark(ffn, d_predictor=r, top_k=5)
    assert made.config.hidden == WIDTH
    assert made.config.activation == activation
    assert_close(numbers(made), numbers(ffn), rtol=0, atol=0)
    both = torch.cat((made.predictor.weight, made.up.weight), dim=1)
    assert_close(both, ffn.up.weight, rtol=0, atol=0)
    # with all neurons, the product of what were two parts of a sum
    whole = spark(ffn, d_predictor=r, selection="none")
    x = torch.randn(1, 9, D, dtype=torch.float64)
    one, two = x[..., :r] @ ffn.up.weight[:, :r].T, x[..., r:] @ ffn.up.weight[:, r:].T
    assert_close(whole(x).y, ffn.down(ACTIVATIONS[activation](one) * two))


def test_a_gated_ffn_becomes_half_as_wide_again_with_as_many_parameters():
    ffn = gated()
    made = spark(ffn, density=0.2)
    gate, up = ffn.gate_up.weight.chunk(2)
    r = made.config.r
    assert made.config.hidden == WIDTH * 3 // 2
    assert numbers(made).numel() == numbers(ffn).numel()
    assert_close(made.predictor.weight[:WIDTH], gate[:, :r], rtol=0, atol=0)
    assert_close(made.up.weight[:WIDTH], up[:, r:], rtol=0, atol=0)
    assert_close(made.down.weight[:, :WIDTH], ffn.down.weight, rtol=0, atol=0)
    size = up[:, :r].norm(dim=1) * gate[:, r:].norm(dim=1) * ffn.down.weight.norm(dim=0)
    more = [n for n in range(WIDTH) if sum(size > size[n]) < WIDTH // 2]
    assert_close(made.predictor.weight[WIDTH:], up[more, :r], rtol=0, atol=0)
    assert_close(made.up.weight[WIDTH:], gate[more, r:], rtol=0, atol=0)
    assert_close(made.down.weight[:, WIDTH:], ffn.down.weight[:, more], rtol=0, atol=0)


def test_without_a_split_a_gated_ffn_is_the_same_but_for_the_threshold():
    ffn = gated("gelu")
    same = spark(ffn, predictor="full", selection="none")
    x = torch.randn(1, 9, D, dtype=torch.float64)
    assert_close(same(x).y, ffn(x).y)
    assert receipt(ffn, same, 0, 0).largest < 1e-12
    made = spark(ffn, predictor="full", top_k=6)
    gate, up = ffn.gate_up(x).chunk(2, dim=-1)
    assert_close(made(x).y, ffn.down(ACTIVATIONS["gelu"](made.select(gate)) * up))


def test_a_model_of_ungated_ffns_converts_and_learns():
    sizes = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16}
    model = zoo.build({"model": {**sizes, "ffn": {"name": "mlp", "d_ff": 40}}})
    made = convert(model, "spark", layers="last", density=0.2)
    names = [type(block.ffn).__name__ for block in made.model.blocks]
    assert names == ["MLP", "SparkFFN"]
    assert [r.layer for r in made.receipts] == [1]
    assert sum(p.numel() for p in made.model.parameters()) == sum(
        p.numel() for p in model.parameters()
    )
    out = made.model(torch.randint(0, 32, (2, 16)))
    out.logits.square().mean().backward()
    assert all(p.grad is not None for p in made.model.parameters())
    with refused("layer 0 is a MLP, only swiglu layers are converted"):
        convert(model, "upcycle")


def test_wrong_options_are_one_line():
    with refused("spark has no router, so leave out router_std"):
        convert_ffn(dense(), "spark", router_std=0.5)
    with refused("predictor: full needs a gated FFN's gate, which an mlp has not"):
        convert_ffn(mlp(), "spark", predictor="full")
    with refused("unknown activation of spark_ffn 'relu2'"):
        convert_ffn(mlp("relu2"), "spark")
    with refused("unknown predictor of spark 'half'"):
        convert_ffn(dense(), "spark", predictor="half")
    with refused("only swiglu layers are converted, got a MLP"):
        convert_ffn(mlp(), "upcycle")
    with refused("d_ff=25 must be even"):
        convert_ffn(dense(d_ff=25), "spark")
