"""One token through the native kernel gives what torch ops give, and nothing else takes it."""

import logging

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from layers import decode
from layers.base import Routing
from layers.decode import ACTIVATIONS, DTYPES, KERNEL, Computes, native_dtypes, run_token
from layers.moe import MoE, MoEConfig
from layers.moe_plus_plus import MoEPlusPlus, MoEPlusPlusConfig
from layers.native import _load
from layers.precision.operands import LeafPrecision
from layers.swiglu import GATES
from routers.top_k import TopKRouter, TopKRouterConfig

F32, BF16 = DTYPES
KINDS = {  # dtype of the token, dtype of the weights, precision of the leaves
    "fp32": (F32, F32, None),
    "bf16": (BF16, BF16, None),
    "bf16 leaf": (F32, F32, "bf16"),
    "bf16 leaf, bf16 token": (BF16, F32, "bf16"),
    "bf16 leaf, bf16 weights": (F32, BF16, "bf16"),
    "fp32 leaf, bf16 weights": (BF16, BF16, "fp32"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
needs_compiler = pytest.mark.skipif(KERNEL.library() is None, reason="no C++ compiler")


class Fixed(nn.Module):
    """A router that has decided."""

    def __init__(self, experts, n_routes):
        super().__init__()
        self.experts, self.n_routes = torch.tensor([experts], dtype=torch.int64), n_routes

    def forward(self, x, carry=None, mask=None):
        weights = torch.linspace(0.3, 0.9, self.experts.shape[1])[None]
        return Routing(self.experts, weights, torch.zeros(1, self.n_routes), {})


class Ops(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def prepare(layer, kind):
    """Gates of size one, so that no activation is almost linear."""
    _, dtype, precision = KINDS[kind]
    for leaf in layer.modules():
        if hasattr(leaf, "precision") and isinstance(leaf.weight, nn.Parameter):
            weight = torch.randn_like(leaf.weight) / leaf.weight.shape[-1] ** 0.5
            leaf.weight.data = weight.to(dtype)
            leaf.precision = None if precision is None else LeafPrecision.of(precision)
    return layer.eval()


def moe(kind="fp32", experts=(1, 3), d_model=64, d_expert=96, **options):
    config = MoEConfig(
        d_model=d_model, d_expert=d_expert, n_experts=4, top_k=len(experts), **options
    )
    return prepare(MoE(config, Fixed(experts, 4)), kind)


def token(kind="fp32", d_model=64):
    return torch.randn(1, 1, d_model).to(KINDS[kind][0])


def forward(layer, x, mode, monkeypatch, **inputs):
    """What the layer gives without gradients, and whether the kernel gave it."""
    monkeypatch.setenv("MOE_ZOO_KERNELS", mode)
    with torch.no_grad(), Ops() as ops:
        y = layer(x, **inputs).y
    return y, "moe_zoo::run_token" in ops.names


def assert_native_equals_torch(layer, x, monkeypatch, **inputs):
    expected, native = forward(layer, x, "torch", monkeypatch, **inputs)
    assert not native
    got, native = forward(layer, x, "native", monkeypatch, **inputs)
    assert native
    assert_close(got, expected)
    return got


def test_every_activation_but_gpt_oss_has_a_kernel(monkeypatch):
    """Its experts have biases, which no kernel takes; without them it is torch's too."""
    assert ACTIVATIONS.keys() == GATES.keys() - {"gpt_oss"}
    assert not forward(moe(activation="gpt_oss"), token(), "auto", monkeypatch)[1]


@needs_compiler
@every_kind
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("experts", [(2,), (3, 0), (1, 0, 3)], ids=len)
@pytest.mark.parametrize(("d_model", "d_expert"), [(64, 96), (37, 45), (5, 1)])
def test_native_equals_torch(kind, activation, experts, d_model, d_expert, monkeypatch):
    layer = moe(kind, experts, d_model, d_expert, activation=activation)
    y = assert_native_equals_torch(layer, token(kind, d_model), monkeypatch)
    assert y.dtype == KINDS[kind][0]


@needs_compiler
def test_bfloat16_is_rounded_where_torch_rounds(monkeypatch):
    """Sums in another order round differently now and then: seldom, and by one step."""
    layer, x = moe("bf16 leaf", (0, 1, 2, 3), 256, 256), token("bf16", 256)
    got, _ = forward(layer, x, "native", monkeypatch)
    expected, _ = forward(layer, x, "torch", monkeypatch)
    assert (got == expected).float().mean() > 0.9
    exact = moe("fp32", (0, 1, 2, 3), 256, 256)
    exact.load_state_dict(layer.state_dict())
    assert (forward(exact, x.float(), "native", monkeypatch)[0] == expected).float().mean() < 0.1


@needs_compiler
@every_kind
def test_shared_experts(kind, monkeypatch):
    assert_native_equals_torch(moe(kind, n_shared=2), token(kind), monkeypatch)


@needs_compiler
@every_kind
@pytest.mark.parametrize("experts", [(0, 3), (1, 5), (6, 2), (4, 7), (6, 7), (7, 0)])
def test_experts_that_compute_nothing(kind, experts, monkeypatch):
    config = MoEPlusPlusConfig(d_model=37, d_expert=45, n_experts=4, n_constant=2, n_copy=1)
    assert config.expert_names[4:] == ("constant 0", "constant 1", "copy 0", "zero 0")
    layer = prepare(MoEPlusPlus(config, Fixed(experts, config.n_routes)), kind)
    assert_native_equals_torch(layer, token(kind, 37), monkeypatch)


@needs_compiler
@every_kind
def test_a_masked_token_is_zero(kind, monkeypatch):
    x = torch.full_like(token(kind), torch.nan)
    mask = torch.zeros(1, 1, dtype=torch.bool)
    y = assert_native_equals_torch(moe(kind), x, monkeypatch, mask=mask)
    assert (y == 0).all()


@needs_compiler
@every_kind
def test_a_token_with_a_stride(kind, monkeypatch):
    x = torch.randn(1, 1, 64, 3).to(KINDS[kind][0])[..., 1]
    assert not x.is_contiguous()
    y = assert_native_equals_torch(moe(kind), x, monkeypatch)
    assert y.shape == (1, 1, 64)


@needs_compiler
@every_kind
def test_threads_change_nothing(kind, monkeypatch):
    monkeypatch.setattr(decode, "NUMBERS_PER_THREAD", 1)
    layer, x = moe(kind, d_model=96, d_expert=165), token(kind, 96)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(assert_native_equals_torch(layer, x, monkeypatch))
    finally:
        torch.set_num_threads(threads)
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


@needs_compiler
def test_a_learned_router(monkeypatch):
    config = TopKRouterConfig(d_model=64, n_experts=8, top_k=3)
    layer = prepare(MoE(MoEConfig(d_model=64, top_k=3), TopKRouter(config)), "fp32")
    assert_native_equals_torch(layer, token(), monkeypatch)


@needs_compiler
@pytest.mark.parametrize("enabled", [BF16, torch.float16])
@pytest.mark.parametrize("precision", [None, "fp32", "bf16"])
def test_autocast(enabled, precision, monkeypatch):
    layer, x = moe(), token()
    for leaf in (layer.experts.gate_up, layer.experts.down):
        leaf.precision = None if precision is None else LeafPrecision.of(precision)
    with torch.autocast("cpu", enabled):
        expected, _ = forward(layer, x, "torch", monkeypatch)
        got, native = forward(layer, x, "native", monkeypatch)
    assert native == (enabled is BF16)
    assert_close(got, expected)


@needs_compiler
@pytest.mark.parametrize("gate_up", [None, "bf16", "fp32"])
@pytest.mark.parametrize("down", [None, "bf16", "fp32"])
def test_leaves_of_different_precision(gate_up, down, monkeypatch):
    layer = moe()
    layer.experts.gate_up.precision = None if gate_up is None else LeafPrecision.of(gate_up)
    layer.experts.down.precision = None if down is None else LeafPrecision.of(down)
    assert_native_equals_torch(layer, token(), monkeypatch)


@needs_compiler
def test_only_the_chosen_experts_are_read(monkeypatch):
    layer, x = moe("bf16 leaf"), token("bf16 leaf")
    with torch.no_grad():
        for leaf in (layer.experts.gate_up, layer.experts.down):
            leaf.weight[[0, 2]] = torch.nan
    y, _ = forward(layer, x, "native", monkeypatch)
    assert y.isfinite().all()
    for bits in (0x7F800001, 0x7FFFFFFF, -1):  # every kind of NaN stays one when it is rounded
        layer.experts.down.weight.data.view(torch.int32)[1, 5, 7] = bits
        y, _ = forward(layer, x, "native", monkeypatch)
        assert y.isnan().nonzero().tolist() == [[0, 0, 5]]


@needs_compiler
@pytest.mark.parametrize("expert", [-1, 4])
def test_an_expert_that_does_not_exist(expert, monkeypatch):
    with pytest.raises(ValueError, match=r"experts must be in \[0, 4\)"):
        forward(moe(experts=(1, expert)), token(), "native", monkeypatch)


@needs_compiler
def test_what_stays_with_torch(monkeypatch):
    monkeypatch.setenv("MOE_ZOO_KERNELS", "native")
    layer, x = moe(), token()
    assert forward(layer, x, "native", monkeypatch)[1]
    with Ops() as ops:  # with gradients
        layer(x)
    assert "moe_zoo::run_token" not in ops.names
    assert not forward(layer.double(), x.double(), "native", monkeypatch)[1]
    layer = moe()
    layer.experts.down.precision = LeafPrecision.of("mxfp4")
    assert not forward(layer, x, "native", monkeypatch)[1]
    layer = moe()
    layer.experts.down.weight.data = layer.experts.down.weight.data.mT.contiguous().mT
    expected, native = forward(layer, x, "native", monkeypatch)
    assert not native
    layer.experts.down.weight.data = layer.experts.down.weight.data.contiguous()
    assert_close(forward(layer, x, "native", monkeypatch)[0], expected)


@needs_compiler
def test_flops_are_counted():
    config = MoEPlusPlusConfig(d_model=64, d_expert=96, n_experts=4, n_constant=0)
    layer = prepare(MoEPlusPlus(config, Fixed((1, 4), config.n_routes)), "fp32")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(token())
    assert counter.get_total_flops() == 2 * 3 * 64 * 96


@needs_compiler
@pytest.mark.parametrize("computes", [Computes(F32, F32), Computes(BF16, F32), Computes(F32, BF16)])
def test_operator_is_registered_well(computes):
    args = (torch.randn(1, 16), torch.tensor([[2, 0]]), torch.rand(1, 2), None,
            torch.randn(3, 24, 16) / 4, torch.randn(3, 16, 12) / 4, "silu", *computes)  # fmt: skip
    torch.library.opcheck(torch.ops.moe_zoo.run_token.default, args)
    y = run_token(*args[:7], computes)
    assert y.dtype == computes.down
    assert_close(y.float(), run_token(*args[:7], Computes(F32, F32)), rtol=0, atol=0.02)


def test_without_a_compiler_torch_ops_do_the_same(monkeypatch, caplog):
    layer, x = moe(), token()
    expected, _ = forward(layer, x, "torch", monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    _load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                got, native = forward(layer, x, "auto", monkeypatch)
                assert not native
                assert got.equal(expected)
        assert len(caplog.records) == 1
        assert "decode.cpp not built" in caplog.text
        monkeypatch.setenv("MOE_ZOO_KERNELS", "native")
        with pytest.raises(RuntimeError, match=r"decode\.cpp does not build"):
            native_dtypes(x[0], layer.experts.gate_up, layer.experts.down, "silu")
    finally:
        _load.cache_clear()
