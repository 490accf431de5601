"""However experts are multiplied, the sums are those of a loop over tokens in float64."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import zoo
from layers.dispatch import make_plan
from layers.experts import Experts, ExpertsConfig
from layers.fixed_plan import slot_plan, sorted_plan
from layers.grouped import chosen, grouped_linear
from layers.linear import ExpertLinear
from layers.mlp import ACTIVATIONS
from layers.moe import MoE, MoEConfig
from layers.precision import PrecisionPolicy, apply_policy
from layers.swiglu import GATES
from routers.top_k import TopKRouter, TopKRouterConfig

T, D, F, E, K = 23, 16, 24, 6, 2
NAMED = ("auto", "batched", "capacity", "grouped", "loop")
every_backend = pytest.mark.parametrize("backend", NAMED)
BODIES = {"gated": {}, "ungated, biases": {"gated": False, "activation": "gelu", "bias": True}}
every_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)


def experts(backend, d=D, f=F, **body):
    torch.manual_seed(1)
    module = Experts(
        ExpertsConfig(
            d_model=d, d_expert=f, n_experts=E, backend=backend, **{"activation": "silu", **body}
        )
    )
    for leaf in (module.inner, module.down):
        if leaf.bias is not None:
            torch.nn.init.normal_(leaf.bias)
    return module


def inputs(n=T, kept=0.7, dtype=torch.float32, d=D):
    """(tokens, chosen experts, weights, which choices to run); expert E - 1 is idle."""
    torch.manual_seed(2)
    routed = torch.stack([torch.randperm(E - 1)[:K] for _ in range(n)]) if n else torch.empty(0, K)
    keep = None if kept is None else torch.rand(n, K) < kept
    x = torch.randn(n, d, dtype=dtype, requires_grad=True)
    return x, routed.long(), torch.rand(n, K, dtype=dtype, requires_grad=True), keep


def by_token(module, x, routed, weights, keep, weighs):
    """The definition, in float64 and Python."""
    c, w_in, w_out = module.config, module.inner.weight.double(), module.down.weight.double()
    x, weights, out = x.double(), weights.double(), []
    for t in range(len(x)):
        y = torch.zeros(D, dtype=torch.float64)
        for k, e in enumerate(routed[t].tolist()):
            if keep is not None and not keep[t, k]:
                continue
            h = w_in[e] @ (x[t] * weights[t, k] if weighs == "input" else x[t])
            h = h if module.inner.bias is None else h + module.inner.bias[e].double()
            if c.gated:
                gate, up = h.chunk(2)
                h = GATES[c.activation](gate, up)
            else:
                h = ACTIVATIONS[c.activation](h)
            of_expert = w_out[e] @ h
            if module.down.bias is not None:
                of_expert = of_expert + module.down.bias[e].double()
            y = y + (of_expert if weighs == "input" else weights[t, k] * of_expert)
        out.append(y)
    return torch.stack(out)


def gradients(y, x, weights, module):
    torch.manual_seed(3)
    probe = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, (x, weights, *module.parameters()), probe)


@every_backend
@every_body
@pytest.mark.parametrize("kept", [None, 0.7, 0.0])
@pytest.mark.parametrize("weighs", ["output", "input"])
def test_invariant_1_outputs_and_gradients_are_those_of_a_loop_over_tokens(
    backend, body, kept, weighs
):
    module = experts(backend, **body)
    x, routed, weights, keep = inputs(kept=kept)
    y = module(x, routed, weights, keep, weighs, capacity=T)
    expected = by_token(module, x, routed, weights, keep, weighs)
    assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    if kept == 0:
        assert not y.any()
        return
    found = gradients(y, x, weights, module)
    assert_close(found, gradients(expected, x, weights, module), rtol=1e-5, atol=1e-5)
    for grad in found[2:]:  # of the expert that nobody chose
        assert torch.equal(grad[E - 1], torch.zeros_like(grad[E - 1]))


@pytest.mark.parametrize("backend", ["batched", "capacity", "loop"])
def test_invariant_1_gradcheck_with_the_routing_held_fixed(backend):
    module = experts(backend, d=2, f=3, gated=False, bias=True, activation="gelu").double()
    x, routed, weights, keep = inputs(n=5, dtype=torch.float64, d=2)
    parameters = dict(module.named_parameters())

    def run(x, weights, *values):
        held = dict(zip(parameters, values, strict=True))
        args = (x, routed, weights, keep)
        return torch.func.functional_call(module, held, args, {"capacity": 5})

    assert torch.autograd.gradcheck(run, (x, weights, *parameters.values()))


@every_backend
def test_invariants_8_and_10_no_tokens_and_the_same_bits_twice(backend):
    module = experts(backend)
    x, routed, weights, keep = inputs(n=0)
    y = module(x, routed, weights, keep, capacity=0)
    assert y.shape == (0, D)
    grads = torch.autograd.grad(y.sum(), tuple(module.parameters()))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    x, routed, weights, keep = inputs()
    runs = []
    for _ in range(2):
        y = module(x, routed, weights, keep, capacity=T)
        runs.append((y, *gradients(y, x, weights, module)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def layer(backend, **options):
    torch.manual_seed(0)
    factors = {"capacity_factor": 2.0, "eval_capacity_factor": 2.0} if backend == "capacity" else {}
    config = MoEConfig(
        d_model=D, d_expert=F, n_experts=4, top_k=K, backend=backend, **{**factors, **options}
    )
    return MoE(config, TopKRouter(TopKRouterConfig(d_model=D, n_experts=4, top_k=K)))


@every_backend
@pytest.mark.parametrize("training", [True, False])
def test_invariants_2_5_6_7_9_11_of_a_layer(backend, training):
    moe, x = layer(backend).train(training), torch.randn(2, 12, D)
    out = moe(x)
    assert_close(out.y, layer("loop").train(training)(x).y, rtol=1e-5, atol=1e-6)
    order = torch.randperm(12)
    assert_close(moe(x[:, order]).y, out.y[:, order])
    assert_close(moe(x[:1, :1]).y, out.y[:1, :1])
    later = x.clone()
    later[:, 7:] = torch.randn(2, 5, D)
    assert_close(moe(later).y[:, :7], out.y[:, :7])
    assert out.stats["counts"].sum() == 24 * K
    mask = torch.rand(2, 12) > 0.3
    dirty = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    masked = moe(dirty, mask=mask)
    assert not masked.y[~mask].any()
    assert_close(masked.y[mask], out.y[mask])
    (masked.y.square().sum() + masked.losses["balance"]).backward()
    assert dirty.grad.isfinite().all()
    before = [p.detach().clone() for p in moe.experts.parameters()]
    torch.optim.SGD(moe.parameters(), lr=1.0).step()
    for old, new in zip(before, moe.experts.parameters(), strict=True):
        assert (old != new).flatten(1).any(1).all()


# Precision

PRESETS = ("bf16", "fp8_block128", "fp8_row", "fp8_tensor", "hif4", "mxfp4", "mxfp8", "nvfp4")


def trained(module, policy, kept):
    """Output and gradients under a policy."""
    module = copy.deepcopy(module)
    apply_policy(module, policy)
    x, routed, weights, keep = inputs(kept=kept)
    y = module(x, routed, weights, keep, capacity=T)
    return y, *gradients(y, x, weights, module)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backend", ["auto", "batched", "capacity", "grouped"])
@pytest.mark.parametrize("kept", [None, 0.7])
def test_every_precision_gives_the_numbers_of_the_loop(preset, backend, kept):
    """The operands are the same; only their products are summed in another order.

    Where gradients round at random, rows that stand elsewhere draw other numbers.
    """
    policy = PrecisionPolicy.of(preset)
    found = trained(experts(backend), policy, kept)
    expected = trained(experts("loop"), policy, kept)
    forward_only = preset in ("mxfp4", "nvfp4") and backend == "capacity"
    for mine, theirs in list(zip(found, expected, strict=True))[: 1 if forward_only else None]:
        if backend == "auto":
            assert torch.equal(mine, theirs)
        size = theirs.abs().max().item()
        assert_close(mine, theirs, rtol=0, atol=0.02 * size)
        assert (mine - theirs).abs().mean() < 2e-3 * size


def test_rotated_blocks_of_rounded_rows_are_alike_in_slots():
    """Blocks lie along an expert's rows in its weight gradient, rotated in tiles of 32 rows."""
    spec = {"format": "mxfp4", "hadamard": 32}
    policy = PrecisionPolicy.of({"default": {"all": "bf16", "wgrad_dy": spec, "wgrad_x": spec}})
    for kept in (None, 0.7):
        found = trained(experts("capacity"), policy, kept)
        for mine, theirs in zip(found, trained(experts("loop"), policy, kept), strict=True):
            assert_close(mine, theirs, rtol=0, atol=0.01 * theirs.abs().max().item())


@every_backend
@pytest.mark.parametrize("n", [2, T])
def test_packed_weights_give_what_the_same_numbers_give_unpacked(backend, n):
    factors = {"capacity_factor": 2.0, "eval_capacity_factor": 2.0} if backend == "capacity" else {}
    options = {"n_experts": 4, "top_k": K, "d_expert": 32, "backend": backend, **factors}
    moe = zoo.create("moe", d_model=32, precision="mxfp4", **options).eval()
    x = torch.randn(1, n, 32)
    with torch.no_grad():
        expected = moe(x).y
        zoo.pack(moe)
        assert_close(moe(x).y, expected, rtol=0, atol=0.01 * expected.abs().max().item())


def test_instructions_of_the_device_are_not_batched():
    use = {"all": "fp8_e4m3", "dgrad_dy": "fp8_e5m2", "wgrad_dy": "fp8_e5m2", "compute": "fp32"}
    leaf = ExpertLinear(3, 48, 24, role="expert")
    apply_policy(leaf, PrecisionPolicy.of({"default": use, "backend": "hardware"}))
    x, counts = torch.randn(9, 48), torch.tensor([3, 0, 6])
    assert torch.equal(leaf(x, counts, backend="loop"), leaf(x, counts))
    for backend in ("batched", "capacity", "grouped"):
        with pytest.raises(ValueError, match="'hardware' multiplies expert by expert"):
            leaf(x, counts, backend=backend)


# What a backend promises beside its sums


def test_plans_of_fixed_sizes_hold_what_the_plan_holds():
    _, routed, _, keep = inputs()
    plan, fixed, slots = (
        make_plan(routed, E, keep), sorted_plan(routed, E, keep), slot_plan(routed, E, T, keep),
    )  # fmt: skip
    n = len(plan.order)
    assert torch.equal(fixed.counts, plan.counts)
    assert torch.equal(fixed.order[fixed.filled], plan.order)
    assert fixed.filled.tolist() == [True] * n + [False] * (T * K - n)
    assert torch.equal(slots.order[slots.filled], plan.order)
    assert slots.counts.tolist() == [T] * E
    few = slot_plan(routed, E, 2, keep)  # what does not fit is left out, the first stay
    assert few.filled.view(E, 2).sum(1).tolist() == plan.counts.clamp(max=2).tolist()
    first = torch.cat([part[:2] for part in plan.order.split(plan.counts.tolist())])
    assert torch.equal(few.order[few.filled], first)


@pytest.mark.parametrize("backend", ["batched", "capacity", "grouped"])
@pytest.mark.parametrize("kept", [None, 0.7])
def test_nothing_is_read_on_the_host(backend, kept, monkeypatch):
    module = experts(backend)
    x, routed, weights, keep = inputs(kept=kept)

    def read(*_, **__):
        raise AssertionError("a tensor was read on the host")

    for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    y = module(x, routed, weights, keep, capacity=T)
    gradients(y, x, weights, module)
    if kept:
        with pytest.raises(AssertionError, match="read on the host"):
            experts("loop")(x, routed, weights, keep)


@pytest.mark.parametrize("backend", ["batched", "capacity", "grouped"])
def test_compiles_whole_and_once_whatever_the_routing(backend):
    torch.compiler.reset()
    module = experts(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for seed in range(3):
        x, _, weights, _ = inputs()
        torch.manual_seed(seed + 10)
        routed = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
        keep = torch.rand(T, K) < 0.3 * seed + 0.1
        y = compiled(x, routed, weights, keep, capacity=9)
        expected = module(x, routed, weights, keep, capacity=9)
        assert_close(y, expected)
        assert_close(gradients(y, x, weights, module), gradients(expected, x, weights, module))
    assert counter.frame_count == 1


def test_a_layer_of_fixed_shapes_compiles_whole():
    torch.compiler.reset()
    moe = layer("capacity", capacity_factor=1.0, capacity_pool="sequence")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, backend=counter, fullgraph=True)
    for _ in range(3):
        x = torch.randn(2, 12, D)
        out, expected = compiled(x), moe(x)
        assert_close(out.y, expected.y)
        assert torch.equal(out.stats["dropped"], expected.stats["dropped"])
        out.y.square().sum().backward()
    assert counter.frame_count == 1


def test_auto_copies_matrices_only_for_few_rows_of_many_small_ones():
    def auto(n, e, o, k):
        return chosen(torch.empty(n, k), "auto", (e, o, k))

    assert [auto(n, 256, 32, 32) for n in (1, 128, 2048)] == ["batched", "batched", "loop"]
    assert auto(1, 8, 32, 32) == "loop"
    assert auto(1, 256, 512, 256) == "loop"
    x, w = torch.randn(4, 32), torch.randn(256, 32, 32)
    counts = torch.zeros(256, dtype=torch.int64).index_fill(0, torch.tensor([3, 77]), 2)
    assert torch.equal(grouped_linear(x, w, counts), grouped_linear(x, w, counts, "batched"))


def test_refusals():
    with pytest.raises(
        ValueError, match=r"unknown experts' backend 'groupt'.*Did you mean 'grouped'"
    ):
        experts("groupt")
    x, routed, weights, keep = inputs()
    with pytest.raises(ValueError, match="backend 'capacity' needs a capacity"):
        experts("capacity")(x, routed, weights, keep)
    with pytest.raises(ValueError, match="takes no float64"):
        experts("grouped").double()(x.double(), routed, weights.double(), keep)
    with pytest.raises(ValueError, match=r"multiples of 16 bytes; got torch\.float32 and 6 x 5"):
        grouped_linear(torch.randn(4, 5), torch.randn(1, 6, 5), torch.tensor([4]), "grouped")
    with pytest.raises(ValueError, match="in evaluation: set eval_capacity_factor"):
        MoEConfig(d_model=D, backend="capacity", capacity_factor=2.0)
