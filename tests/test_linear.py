"""Leaves: each of the three matmuls sums over operands quantised along its own axis."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from layers.linear import ExpertLinear, Linear, ValueTable
from layers.precision import PRESETS, LeafPrecision, fake_quantize

M, K, N = 48, 64, 32
LOW = ["mxfp4", "nvfp4"]


def along(x, spec, axis):
    """The decoded operand, from the public definition, in float64; blocks along `axis`."""
    plain = {"scale_rule": spec.scale_rule, "tile": spec.tile}
    moved = x.float().movedim(axis, -1).contiguous()
    return fake_quantize(moved, spec.format, **plain).movedim(-1, axis).double()


def expected(x, w, dy, p):
    """(y, dx, dw) as explicit products of separately quantised operands, in float64."""
    y = along(x, p.fprop_x, -1) @ along(w, p.fprop_w, -1).T
    dx = along(dy, p.dgrad_dy, -1) @ along(w, p.dgrad_w, -2)
    dw = along(dy, p.wgrad_dy, -2).T @ along(x, p.wgrad_x, -2)
    return y, dx, dw


def leaf_precision(name, compute="fp32"):
    plain = PRESETS[name].default.to_plain()
    return LeafPrecision.of({**plain, "compute": compute})


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize(("compute", "rtol"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_linear_is_three_products_of_quantised_operands(name, compute, rtol):
    p = leaf_precision(name, compute)
    layer = Linear(K, N, role="ffn")
    layer.precision = p
    x = torch.randn(M, K, requires_grad=True)
    dy = torch.randn(M, N)
    y = layer(x)
    assert y.dtype == p.dtype
    y.backward(dy.to(y))
    dy_seen = dy.to(y).float()
    for got, want in zip(
        (y, x.grad, layer.weight.grad), expected(x, layer.weight, dy_seen, p), strict=True
    ):
        error = (got.double() - want).norm() / want.norm()
        assert error < rtol


@pytest.mark.parametrize("operand", ["fprop_x", "fprop_w", "dgrad_dy", "wgrad_x"])
def test_one_low_operand_leaves_the_other_products_exact(operand):
    layer = Linear(K, N, role="ffn")
    layer.precision = LeafPrecision.of({"all": "fp32", operand: "mxfp4", "compute": "fp32"})
    plain = Linear(K, N, role="ffn")
    plain.load_state_dict(layer.state_dict())
    x, dy = torch.randn(M, K), torch.randn(M, N)
    results = []
    for leaf in (layer, plain):
        inputs = x.clone().requires_grad_()
        y = leaf(inputs)
        y.backward(dy)
        results.append({"fprop": y, "dgrad": inputs.grad, "wgrad": leaf.weight.grad})
    for product in ("fprop", "dgrad", "wgrad"):
        same = torch.allclose(results[0][product], results[1][product], rtol=1e-5, atol=1e-6)
        assert same == (not operand.startswith(product)), product


@pytest.mark.parametrize("precision", [None, LeafPrecision.of("fp32")])
def test_high_equals_torch_bit_for_bit(precision):
    layer = Linear(K, N, role="ffn", bias=True)
    layer.precision = precision
    x = torch.randn(2, M, K)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bf16", *LOW])
def test_experts_equal_a_loop_of_single_linears(name):
    counts = torch.tensor([5, 0, 33, 17, 0])
    stack = ExpertLinear(5, K, N, role="expert")
    p = stack.precision = PRESETS[name].default
    x = torch.randn(int(counts.sum()), K, requires_grad=True)
    dy = torch.randn(x.shape[0], N).bfloat16()
    y = stack(x, counts)
    y.backward(dy)
    start = 0
    for e, count in enumerate(counts.tolist()):
        if count == 0:
            assert not stack.weight.grad[e].any()
            continue
        rows = slice(start, start + count)
        start += count
        one = Linear(K, N, role="expert")
        one.weight.data.copy_(stack.weight[e])
        one.precision = p
        x_e = x[rows].detach().clone().requires_grad_()
        y_e = one(x_e)
        y_e.backward(dy[rows])
        assert_close(y[rows], y_e, rtol=0, atol=0)
        assert_close(x.grad[rows], x_e.grad, rtol=0, atol=0)
        assert_close(stack.weight.grad[e], one.weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", [None, "fp32", "bf16", *LOW])
def test_value_table_equals_a_look_up_in_the_quantised_table(name):
    table = ValueTable(50, 48, role="memory_values")
    ids, weights = torch.randint(50, (7, 3)), torch.randn(7, 3)
    values = table.weight.detach().clone()
    if name in LOW:
        spec = PRESETS[name].default.fprop_x
        values = torch.stack([fake_quantize(row[None], spec)[0] for row in values])
    elif name == "bf16":
        values = values.bfloat16()
    table.precision = PRESETS[name].default if name else None
    y = table(ids, weights)
    want = (values.double()[ids] * weights.double()[..., None]).sum(1)
    assert_close(y.double(), want, rtol=2e-2, atol=2e-3)
    y.backward(torch.ones_like(y))
    touched = torch.zeros(50, dtype=torch.bool)
    touched[ids.flatten()] = True
    assert table.weight.grad[touched].any(-1).all()
    assert not table.weight.grad[~touched].any()


@pytest.mark.parametrize("make", [
    lambda: Linear(0, 4, role="ffn"),
    lambda: ExpertLinear(0, 4, 4, role="expert"),
    lambda: ValueTable(4, -1, role="memory_values"),
])  # fmt: skip
def test_sizes_must_be_positive(make):
    with pytest.raises(ValueError, match="must be positive"):
        make()


@pytest.mark.parametrize("dtype", [torch.float64])
def test_gradcheck_without_a_policy(dtype):
    stack = ExpertLinear(3, 4, 3, role="expert").to(dtype)
    counts = torch.tensor([2, 0, 3])
    x = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(stack, {"weight": w}, (x, counts)),
        (x, stack.weight),
    )
