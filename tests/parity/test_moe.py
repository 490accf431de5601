"""The mixture of experts against a loop over tokens in float64, from the equations alone."""

import pytest
import torch
from torch.testing import assert_close

from layers.moe import MoE, MoEConfig
from layers.swiglu import SwiGLU, SwiGLUConfig
from routers.llama4 import Llama4Router, Llama4RouterConfig
from routers.top_k import TopKRouter, TopKRouterConfig

pytestmark = pytest.mark.parity

D, F, E, K = 6, 5, 4, 2


def small(dtype=torch.float64, n_shared=0, **options):
    sizes = {"d_model": D, "n_experts": E, "top_k": K} | options
    router = TopKRouterConfig(**{k: v for k, v in sizes.items() if k != "d_expert"})
    config = MoEConfig(d_expert=F, n_shared=n_shared, **{
        k: v for k, v in sizes.items() if k != "renormalize"
    })  # fmt: skip
    layer = MoE(config, TopKRouter(router)).to(dtype)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer


def silu(h):
    return h / (1 + torch.exp(-h))


def expert(x, experts, e):
    """W_down( silu(W_gate x) * (W_up x) ), gate rows first."""
    gate_up, down = experts.gate_up.weight[e], experts.down.weight[e]
    gate, up = gate_up[:F] @ x, gate_up[F:] @ x
    return down @ (silu(gate) * up)


def by_token(layer, x, renormalize):
    """y [B, S, D], each token alone."""
    c, rows = layer.config, []
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token
        p = torch.exp(logits) / torch.exp(logits).sum()
        chosen = sorted(range(c.n_experts), key=lambda e: -p[e].item())[: c.top_k]
        norm = sum(p[e] for e in chosen) if renormalize else 1.0
        y = sum(p[e] / norm * expert(token, layer.experts, e) for e in chosen)
        if layer.shared is not None:
            wide = layer.shared.gate_up.weight, layer.shared.down.weight
            half = wide[0].shape[0] // 2
            y = y + wide[1] @ (silu(wide[0][:half] @ token) * (wide[0][half:] @ token))
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("n_shared", [0, 2])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_forward_and_gradients(renormalize, top_k, n_shared):
    layer = small(renormalize=renormalize, top_k=top_k, n_shared=n_shared)
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x).y, by_token(layer, x, renormalize)
    assert_close(y, expected)
    probe = torch.randn_like(x)
    inputs = (x, *layer.parameters())
    assert_close(
        torch.autograd.grad(y, inputs, probe), torch.autograd.grad(expected, inputs, probe)
    )


@pytest.mark.parametrize("mode", ["train", "decode"])
def test_in_float32_as_in_float64(mode):
    layer = small(torch.float32, top_k=3)
    x = torch.randn(1, 1 if mode == "decode" else 9, D)
    with torch.set_grad_enabled(mode == "train"):
        assert_close(layer(x).y.double(), by_token(layer.double(), x.double(), True).detach(),
                     rtol=1e-5, atol=1e-5)  # fmt: skip


def test_gradcheck_with_routing_held_fixed():
    layer = small()
    x = torch.randn(1, 5, D, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def y(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x).y

    assert torch.autograd.gradcheck(y, (x, *layer.parameters()), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 37), (1, 1)])
@pytest.mark.parametrize("grad", [True, False])
def test_one_expert_is_the_dense_ffn_bit_for_bit(shape, grad):
    dense = SwiGLU(SwiGLUConfig(d_model=64))
    router = TopKRouter(TopKRouterConfig(d_model=64, n_experts=1, top_k=1))
    moe = MoE(MoEConfig(d_model=64, n_experts=1, top_k=1), router)
    with torch.no_grad():
        moe.experts.gate_up.weight[0], moe.experts.down.weight[0] = (
            dense.gate_up.weight,
            dense.down.weight,
        )
    x = torch.randn(*shape, 64)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.set_grad_enabled(grad):
        ys = dense(inputs[0]).y, moe(inputs[1]).y
    # a single token without gradients takes the decoding kernel, which sums in another order
    tolerance = {} if shape == (1, 1) and not grad else {"rtol": 0, "atol": 0}
    assert_close(*ys, **tolerance)
    if grad:
        probe = torch.randn_like(x)
        for y in ys:
            y.backward(probe)
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        assert torch.equal(dense.gate_up.weight.grad, moe.experts.gate_up.weight.grad[0])
        assert torch.equal(dense.down.weight.grad, moe.experts.down.weight.grad[0])


@pytest.mark.parametrize("mode", ["train", "decode"])
def test_weights_on_the_input_of_experts(mode):
    """Llama 4: y = sum_e E_e(sigmoid(l_e) x), which is not sum_e sigmoid(l_e) E_e(x)."""
    config = MoEConfig(d_model=D, d_expert=F, n_experts=E, top_k=K)
    router = Llama4Router(Llama4RouterConfig(d_model=D, n_experts=E, top_k=K))
    layer = MoE(config, router).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(1, 1 if mode == "decode" else 9, D, dtype=torch.float64)
    rows = []
    for token in x[0]:
        logits = layer.router.weight @ token
        chosen = sorted(range(E), key=lambda e: -logits[e].item())[:K]
        weight = {e: 1 / (1 + torch.exp(-logits[e])) for e in chosen}
        rows.append(sum(expert(weight[e] * token, layer.experts, e) for e in chosen))
    expected = torch.stack(rows)[None]
    with torch.set_grad_enabled(mode == "train"):
        y = layer(x).y
    assert_close(y, expected.detach() if mode == "decode" else expected)
    if mode == "train":
        probe, weights = torch.randn_like(x), tuple(layer.parameters())
        assert_close(
            torch.autograd.grad(y, weights, probe), torch.autograd.grad(expected, weights, probe)
        )
