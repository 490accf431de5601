"""The gated FFN family against its equation, token by token in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from layers.swiglu import GATES, SwiGLU, SwiGLUConfig

pytestmark = pytest.mark.parity


def gpt_oss(gate, up):
    gate, up = min(gate, 7.0), max(min(up, 7.0), -7.0)
    return (up + 1) * gate / (1 + math.exp(-1.702 * gate))


FORMULA = {  # of gate and up
    "silu": lambda g, u: u * g / (1 + math.exp(-g)),
    "gelu": lambda g, u: u * g * 0.5 * (1 + math.erf(g / math.sqrt(2))),
    "relu": lambda g, u: u * max(g, 0.0),
    "identity": lambda g, u: u * g,
    "gpt_oss": gpt_oss,
}


def test_every_gate_has_its_formula():
    assert FORMULA.keys() == GATES.keys()


def small(activation="silu"):
    ffn = SwiGLU(SwiGLUConfig(d_model=4, d_ff=6, activation=activation)).double()
    torch.nn.init.normal_(ffn.gate_up.weight, std=4.0)  # so that gpt-oss's bounds are met
    return ffn


@pytest.mark.parametrize("activation", FORMULA)
def test_is_its_equation_with_gate_rows_first(activation):
    ffn = small(activation)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = ffn(x).y
    w_gate, w_up = ffn.gate_up.weight[:6], ffn.gate_up.weight[6:]
    for b in range(2):
        for s in range(3):
            pairs = zip((w_gate @ x[b, s]).tolist(), (w_up @ x[b, s]).tolist(), strict=True)
            hidden = [FORMULA[activation](gate, up) for gate, up in pairs]
            assert_close(y[b, s], ffn.down.weight @ torch.tensor(hidden, dtype=torch.float64))
    assert (ffn.gate_up(x).abs() > 7).any()


@pytest.mark.parametrize("activation", FORMULA)
def test_gradients(activation):
    ffn = small(activation)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def y(x, *weights):
        names = [name for name, _ in ffn.named_parameters()]
        return torch.func.functional_call(ffn, dict(zip(names, weights, strict=True)), x).y

    assert torch.autograd.gradcheck(y, (x, *ffn.parameters()))


@pytest.mark.parametrize(("d_model", "width"), [(512, 1376), (768, 2048), (16, 64), (96, 256)])
def test_default_width_is_eight_thirds_up_to_32(d_model, width):
    assert SwiGLUConfig(d_model=d_model).hidden == width


def test_masked_tokens_give_zero_and_take_no_part_even_as_nan():
    ffn = small()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    clean = ffn(x).y.masked_fill(~mask[..., None], 0)
    dirty = x.masked_fill(~mask[..., None], torch.nan)
    y = ffn(dirty, mask=mask).y
    assert_close(y, clean, rtol=0, atol=0)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in ffn.parameters())


def test_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match=r"unknown activation of swiglu 'silo'.*'silu'"):
        SwiGLUConfig(d_model=4, activation="silo")
