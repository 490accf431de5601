"""Leaves: each of the three matmuls sums over operands quantised along its own axis."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from layers.linear import ExpertLinear, Linear, ValueTable
from layers.precision import PRESETS, LeafPrecision, fake_quantize, quantize, seed_rounding
from layers.precision.operands import OPERANDS

M, K, N = 48, 64, 32
LOW = [name for name in PRESETS if name not in ("fp32", "bf16")]


def along(x, leaf, operand, axis):
    """The decoded operand, rotated where the spec says so, in float64, and its scale folded in."""
    number = OPERANDS.index(operand)
    key = None if leaf.rounding_key is None else leaf.rounding_key[int(not operand.endswith("_w"))]
    q = quantize(
        x.detach(), getattr(leaf.precision, operand), axis=axis, dtype=torch.float32, key=key,
        operand=number,
    )  # fmt: skip
    return q.values.double() * (1.0 if q.scale is None else q.scale.double())


def expected(x, w, dy, leaf):
    """(y, dx, dw) as explicit products of separately quantised operands, in float64."""
    y = along(x, leaf, "fprop_x", -1) @ along(w, leaf, "fprop_w", -1).T
    dx = along(dy, leaf, "dgrad_dy", -1) @ along(w, leaf, "dgrad_w", -2)
    dw = along(dy, leaf, "wgrad_dy", -2).T @ along(x, leaf, "wgrad_x", -2)
    return y, dx, dw


def leaf_precision(name, compute="fp32", **changes):
    plain = PRESETS[name].default.to_plain()
    plain = plain if isinstance(plain, dict) else {"all": plain}
    return LeafPrecision.of({**plain, "compute": compute, **changes})


def nearest(p):
    """The same operands without random rounding, whose bits go by the place of a row."""
    return replace(p, **{o: getattr(p, o).but(rounding="nearest") for o in OPERANDS})


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize(("compute", "rtol"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_invariant_13_linear_is_three_products_of_quantised_operands(name, compute, rtol):
    p = leaf_precision(name, compute)
    if p.saved == "quantized":
        pytest.skip("its backward pass quantises what the forward made: a test of its own")
    layer = Linear(K, N, role="ffn")
    layer.precision = p
    seed_rounding(layer, 3, 5)
    x = torch.randn(M, K, requires_grad=True)
    dy = torch.randn(M, N)
    y = layer(x)
    assert y.dtype == p.dtype
    y.backward(dy.to(y))
    dy_seen = dy.to(y).float()
    for got, want in zip(
        (y, x.grad, layer.weight.grad), expected(x, layer.weight, dy_seen, layer), strict=True
    ):
        error = (got.double() - want).norm() / want.norm()
        assert error < rtol


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("axes", ["K", "M", "N"])
def test_lengths_that_no_block_divides(name, axes):
    """Padding adds nothing to a product: close to the plain one, as the aligned one is."""
    m, k, n = M + 5 * ("M" in axes), K + 3 * ("K" in axes), N + 7 * ("N" in axes)
    layer = Linear(k, n, role="ffn")
    plain = Linear(k, n, role="ffn")
    plain.load_state_dict(layer.state_dict())
    layer.precision = PRESETS[name].default
    x = torch.randn(m, k)
    results = []
    for leaf in (layer, plain):
        inputs = x.clone().requires_grad_()
        leaf(inputs).square().sum().backward()
        results.append((inputs.grad, leaf.weight.grad))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        assert (got - want).norm() / want.norm() < (0.6 if name == "quartet" else 0.45)


@pytest.mark.parametrize("operand", ["fprop_x", "fprop_w", "dgrad_dy", "wgrad_x"])
def test_invariant_13_one_low_operand_leaves_the_other_products_exact(operand):
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
def test_invariant_13_high_equals_torch_bit_for_bit(precision):
    layer = Linear(K, N, role="ffn", bias=True)
    layer.precision = precision
    x = torch.randn(2, M, K)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bf16", *LOW])
def test_invariant_14_experts_equal_a_loop_of_single_linears(name):
    counts = torch.tensor([5, 0, 33, 17, 0])
    stack = ExpertLinear(5, K, N, role="expert")
    p = stack.precision = nearest(PRESETS[name].default)
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
def test_invariant_15_value_table_equals_a_look_up_in_the_quantised_table(name):
    table = ValueTable(50, 48, role="memory_values")
    ids, weights = torch.randint(50, (7, 3)), torch.randn(7, 3)
    values = table.weight.detach().clone()
    if name in LOW:
        spec = PRESETS[name].default.row_spec
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


def test_both_operands_of_a_product_draw_the_same_signs():
    """Unlike signs would leave nothing of the product: a relative error of one and more."""
    spec = {"format": "mxfp8_e4m3", "hadamard": 32, "signs": "step", "rounding": "stochastic"}
    p = LeafPrecision.of({"all": spec, "compute": "fp32"})
    counts = torch.tensor([40, 0, 56])
    for low, inputs in (
        (Linear(K, N, role="ffn"), ()),
        (ExpertLinear(3, K, N, role="expert"), (counts,)),
    ):
        plain = copy.deepcopy(low)
        low.precision = p
        x, dy = torch.randn(96, K), torch.randn(96, N)
        grads = []
        for step in (1, 2):
            seed_rounding(low, 0, step, micro_batch=3, rank=1)
            for leaf in (low, plain):
                at = x.clone().requires_grad_()
                leaf.zero_grad()
                leaf(at, *inputs).backward(dy)
                grads.append((at.grad, leaf.weight.grad.clone()))
        for got, want in zip(grads[0] + grads[2], grads[1] + grads[3], strict=True):
            assert 1e-3 < (got - want).norm() / want.norm() < 0.1
        assert not torch.equal(grads[0][1], grads[2][1])  # another step, other bits
