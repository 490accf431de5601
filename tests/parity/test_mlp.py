"""The plain FFN against its equation, token by token in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from layers.mlp import MLP, MLPConfig

pytestmark = pytest.mark.parity

FORMULA = {
    "relu": lambda h: max(h, 0.0),
    "gelu": lambda h: h * 0.5 * (1 + math.erf(h / math.sqrt(2))),
    "relu2": lambda h: max(h, 0.0) ** 2,
    "silu": lambda h: h / (1 + math.exp(-h)),
}


@pytest.mark.parametrize("activation", FORMULA)
def test_is_its_equation(activation):
    ffn = MLP(MLPConfig(d_model=4, d_ff=6, activation=activation)).double()
    torch.nn.init.normal_(ffn.up.weight)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = ffn(x).y
    for b in range(2):
        for s in range(3):
            up = [(row @ x[b, s]).item() for row in ffn.up.weight]
            hidden = torch.tensor([FORMULA[activation](h) for h in up], dtype=torch.float64)
            assert_close(y[b, s], ffn.down.weight @ hidden)


@pytest.mark.parametrize("activation", FORMULA)
def test_gradients(activation):
    ffn = MLP(MLPConfig(d_model=4, d_ff=6, activation=activation)).double()
    torch.nn.init.normal_(ffn.up.weight)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def y(x, *weights):
        names = [name for name, _ in ffn.named_parameters()]
        return torch.func.functional_call(ffn, dict(zip(names, weights, strict=True)), x).y

    assert torch.autograd.gradcheck(y, (x, *ffn.parameters()))


def test_default_width_is_four_times_the_model():
    assert MLPConfig(d_model=24).hidden == 96


def test_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match=r"unknown activation of mlp 'rely'.*Did you mean 'relu'"):
        MLPConfig(d_model=4, activation="rely")
    with pytest.raises(ValueError, match="d_ff must be positive, got 0"):
        MLPConfig(d_model=4, d_ff=0)
