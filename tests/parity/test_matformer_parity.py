"""MatFormer's FFN against its equation at every width, neuron by neuron in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from layers.matformer import MatFormer, MatFormerConfig
from zoo.model import ModelConfig, model_cost

pytestmark = pytest.mark.parity

FORMULA = {
    "relu": lambda h: max(h, 0.0),
    "gelu": lambda h: h * 0.5 * (1 + math.erf(h / math.sqrt(2))),
    "relu2": lambda h: max(h, 0.0) ** 2,
    "silu": lambda h: h / (1 + math.exp(-h)),
}
BODIES = [(False, "gelu"), (False, "relu2"), (True, "silu"), (True, "relu")]


def small(gated, activation):
    config = MatFormerConfig(d_model=4, d_ff=8, gated=gated, activation=activation)
    return MatFormer(config).double()


@pytest.mark.parametrize(("gated", "activation"), BODIES)
@pytest.mark.parametrize("width", [1, 3, 8])
def test_is_its_equation(gated, activation, width):
    ffn, act = small(gated, activation), FORMULA[activation]
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = ffn(x, width=width).y
    inner = ffn.gate_up.weight if gated else ffn.up.weight
    for b in range(2):
        for s in range(3):
            expected = torch.zeros(4, dtype=torch.float64)
            for j in range(width):
                h = act((inner[j] @ x[b, s]).item())
                if gated:
                    h *= (inner[8 + j] @ x[b, s]).item()
                expected += h * ffn.down.weight[:, j]
            assert_close(y[b, s], expected)


@pytest.mark.parametrize(("gated", "activation"), BODIES)
def test_gradients(gated, activation):
    ffn = small(gated, activation)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def y(x, *weights):
        names = [name for name, _ in ffn.named_parameters()]
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(ffn, named, x, {"width": 3}).y

    assert torch.autograd.gradcheck(y, (x, *ffn.parameters()))


@pytest.mark.parametrize(
    ("d_model", "millions"),
    [  # non-embedding parameters of XL, L, M and S (the paper's table of sizes)
        (256, (12.6, 8.4, 6.3, 5.3)),
        (512, (50, 33.7, 25.3, 21.1)),
        (768, (113, 75, 56, 47)),
        (1024, (201, 134, 100, 84)),
        (1536, (453, 302, 227, 189)),
    ],
)
def test_sizes_are_the_papers(d_model, millions):
    ffn = MatFormerConfig(d_model=d_model)
    assert ffn.granularities == (d_model // 2, d_model, 2 * d_model, 4 * d_model)
    for width, expected in zip(reversed(ffn.granularities), millions, strict=True):
        config = ModelConfig(
            d_model=d_model, n_layers=16, n_heads=16, ffn={"name": "mlp", "d_ff": width}
        )
        roles = model_cost(config, 16).by_role()
        matrices = roles["ffn"].params + roles["attention"].params
        assert matrices == 16 * (4 * d_model**2 + 2 * d_model * width)
        assert roles["ffn"].params == 16 * ffn.cost(width).params
        assert matrices / 1e6 == pytest.approx(expected, rel=0.015)  # it rounds and cuts
