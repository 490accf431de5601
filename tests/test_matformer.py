"""What a nested FFN promises of its widths: the numbers of the plain layer of that width, in every
precision, with gradients that are zero beyond."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import zoo
from layers.matformer import MatFormerConfig
from layers.precision import LeafPrecision

D, F = 32, 128
PLAIN = {False: "mlp", True: "swiglu"}
both = pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])


def nested(gated, **options):
    return zoo.create("matformer", d_model=D, d_ff=F, gated=gated, **options)


def plain(ffn, width, precision=None):
    """The plain layer of a width, with the nested one's first neurons."""
    gated = ffn.config.gated
    other = zoo.create(PLAIN[gated], d_model=D, d_ff=width, precision=precision)
    inner = ffn.gate_up if gated else ffn.up
    rows = [half[:width] for half in inner.weight.detach().chunk(2 if gated else 1)]
    name = ffn.config.inner_name
    weights = {f"{name}.weight": torch.cat(rows), "down.weight": ffn.down.weight[:, :width]}
    other.load_state_dict(weights, strict=False)  # delayed scales are drawn anew
    return other


def step(ffn, x, forward=None, **part):
    """y, gradient of x, gradients by name."""
    x = x.clone().requires_grad_()
    y = (ffn if forward is None else forward)(x, **part).y
    probe = torch.linspace(-1, 1, y.numel()).view_as(y)
    ffn.zero_grad()
    (y * probe).sum().backward()
    return y.detach(), x.grad, {name: p.grad.clone() for name, p in ffn.named_parameters()}


def cut(name, gradient, width):
    """What of the gradient of a nested layer belongs to its first neurons, and the rest."""
    if name == "down.weight":
        return gradient[:, :width], gradient[:, width:]
    parts = gradient.chunk(2 if name.startswith("gate") else 1)
    return torch.cat([p[:width] for p in parts]), torch.cat([p[width:] for p in parts])


@both
@pytest.mark.parametrize("width", [1, 16, 32, 64, 100, F])
def test_a_width_is_the_plain_layer_of_its_neurons_bit_for_bit(gated, width):
    ffn, x = nested(gated), torch.randn(2, 16, D)
    y, dx, grads = step(ffn, x, width=width)
    expected, expected_dx, expected_grads = step(plain(ffn, width), x)
    assert torch.equal(y, expected)
    assert_close(dx, expected_dx)
    for name, gradient in grads.items():
        inside, beyond = cut(name, gradient, width)
        assert_close(inside, expected_grads[name])
        assert not beyond.any()
        assert inside.any()


@both
def test_the_full_width_is_the_plain_variant(gated):
    """The same draws, the same parameters, the same bits; no width at all is the full one."""
    torch.manual_seed(1)
    ffn = nested(gated)
    torch.manual_seed(1)
    other = zoo.create(PLAIN[gated], d_model=D, d_ff=F)
    assert_close(dict(ffn.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    x = torch.randn(2, 16, D)
    assert torch.equal(ffn(x).y, other(x).y)
    assert torch.equal(ffn(x, width=F).y, other(x).y)
    assert other.load_state_dict(ffn.state_dict()).missing_keys == []
    assert zoo.cost("matformer", d_model=D, d_ff=F, gated=gated) == zoo.cost(
        PLAIN[gated], d_model=D, d_ff=F
    )


@both
@pytest.mark.parametrize("precision", zoo.precisions())
def test_a_width_keeps_the_precision(gated, precision):
    """Blocks of 32 divide the width, so that operands are cut where blocks end."""
    width = 64
    ffn = nested(gated, precision=precision)
    other = plain(ffn, width, precision)
    x = torch.randn(4, 16, D)
    for layer in (ffn, other):
        zoo.seed_rounding(layer, seed=3, step=5)
    y, dx, grads = step(ffn, x, width=width)
    expected, expected_dx, expected_grads = step(other, x)
    assert_close(y, expected)
    assert_close(dx, expected_dx)
    for name, gradient in grads.items():
        inside, beyond = cut(name, gradient, width)
        assert_close(inside, expected_grads[name])
        assert not beyond.any()


def test_delayed_scales_see_the_part_that_runs():
    ffn = nested(False)
    p = LeafPrecision.of({"all": {"format": "fp8_e4m3", "scope": "delayed", "history": 2}})
    for leaf in (ffn.up, ffn.down):
        leaf.precision = p
    with torch.no_grad():
        ffn.up.weight[-1, 0] = 100.0  # beyond the width
    step(ffn, torch.randn(2, 8, D), width=16)
    assert 0 < ffn.up.operand_peaks[1] == ffn.up.weight[:16].abs().max() < 100


@both
def test_a_mask_and_other_dtypes_at_a_width(gated):
    ffn = nested(gated)
    x = torch.randn(2, 8, D)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 5:] = False
    dirty = x.masked_fill(~mask[..., None], torch.nan)
    y = ffn(dirty, mask=mask, width=16).y
    assert torch.equal(y[mask], ffn(x.masked_fill(~mask[..., None], 0), width=16).y[mask])
    assert not y[~mask].any()
    assert ffn(x.bfloat16(), width=16).y.dtype == torch.bfloat16


@both
def test_checkpointing_at_a_width(gated):
    ffn, x = nested(gated, precision="nvfp4"), torch.randn(2, 16, D)
    zoo.seed_rounding(ffn, seed=0, step=0)
    before = step(ffn, x, width=32)

    def recomputed(x, width):
        return checkpoint(ffn, x, None, None, width, use_reentrant=False)

    again = step(ffn, x, recomputed, width=32)
    assert_close(again, before, rtol=0, atol=0)


def test_compiled_with_a_graph_for_each_width():
    torch.compiler.reset()
    ffn, x = nested(True), torch.randn(2, 16, D)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, backend=counter, dynamic=False)
    for _ in range(2):
        for width in ffn.config.granularities:
            assert_close(step(ffn, x, compiled, width=width), step(ffn, x, width=width))
    assert counter.frame_count == 4


@both
@pytest.mark.parametrize("width", [1, 48, F])
def test_cost_of_a_width_is_what_runs(gated, width):
    ffn, x = nested(gated), torch.randn(1, 8, D)
    cost = ffn.config.cost(width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ffn(x, width=width)
    assert cost.flops == counter.get_total_flops() / 8
    assert cost == zoo.cost(PLAIN[gated], d_model=D, d_ff=width)


def test_widths_that_are_given():
    assert MatFormerConfig(d_model=8, d_ff=30).granularities == (3, 7, 15, 30)
    config = MatFormerConfig(d_model=8, d_ff=30, widths=[5, 6, 30])  # pyright: ignore
    assert config.granularities == (5, 6, 30)
    assert hash(config) == hash(MatFormerConfig(d_model=8, d_ff=30, widths=(5, 6, 30)))


@pytest.mark.parametrize("widths", [(), (0, 30), (5, 5, 30), (10, 5, 30), (5, 29), (5, 31)])
def test_refuses_widths_that_do_not_rise_to_all(widths):
    with pytest.raises(ValueError, match="widths must rise strictly from 1 or more to the layer's"):
        MatFormerConfig(d_model=8, d_ff=30, widths=widths)


def test_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="unknown activation of gated matformer 'relu2'"):
        MatFormerConfig(d_model=8, gated=True, activation="relu2")
    with pytest.raises(ValueError, match="widths must rise"):
        MatFormerConfig(d_model=8, d_ff=7)  # no eighth
    ffn = nested(False)
    for width in (0, -1, F + 1):
        with pytest.raises(ValueError, match=rf"width must be in \[1, {F}\].*got {width}"):
            ffn(torch.randn(1, 2, D), width=width)


def test_a_packed_weight_does_not_run_in_part():
    ffn = nested(False, precision="mxfp4").eval()
    zoo.pack(ffn)
    with torch.no_grad(), pytest.raises(ValueError, match="packed weight does not run in part"):
        ffn(torch.randn(1, 2, D), width=16)


# Mixtures


EXPERTS = [
    {},
    {"gated": False, "activation": "relu"},
    {"bias": True},
    {"backend": "capacity", "capacity_factor": 2.0, "eval_capacity_factor": 2.0},
    {"router": "llama4", "top_k": 1},
]


def mixture(d_expert, **options):
    return zoo.create("moe", d_model=D, d_expert=d_expert, n_experts=4, **options)


def narrower(moe, width, options):
    """The mixture whose experts are the first neurons of these."""
    other = mixture(width, **options)
    weights = dict(moe.state_dict())
    for name in list(weights):
        rows = name.split(".")[1] in ("gate_up", "up") if name.startswith("experts.") else False
        if rows:
            groups = 2 if "gate_up" in name else 1
            halves = weights[name].chunk(groups, dim=1)
            weights[name] = torch.cat([half[:, :width] for half in halves], dim=1)
        elif name == "experts.down.weight":
            weights[name] = weights[name][:, :, :width]
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize("options", EXPERTS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("n_tokens", [1, 24])
def test_experts_run_in_part(options, n_tokens):
    moe, x = mixture(64, **options), torch.randn(1, n_tokens, D)
    if options.get("bias"):
        torch.nn.init.normal_(moe.experts.gate_up.bias)
    other = narrower(moe, 24, options)
    assert_close(moe(x, width=24).y, other(x).y)
    with torch.no_grad():  # a single token takes a path of its own
        assert_close(moe.eval()(x, width=24).y, other.eval()(x).y)
    assert moe.config.cost(width=24) == other.config.cost()
    assert moe.config.granularities == (8, 16, 32, 64)


def test_experts_keep_the_precision_at_a_width():
    moe = mixture(64)
    other = narrower(moe, 32, {})
    x = torch.randn(1, 24, D)
    for layer in (moe, other):
        zoo.set_precision(layer, "mxfp8")
    assert_close(moe(x, width=32).y, other(x).y)


def test_shared_experts_have_no_width():
    moe = mixture(64, n_shared=1)
    assert not moe.nested
    assert moe.config.granularities == ()
    with pytest.raises(ValueError, match="shared experts have no width of their own"):
        moe(torch.randn(1, 4, D), width=8)
