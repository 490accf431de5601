"""Routing recorded and taken again: under recomputation, from a record, forced."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointError, checkpoint

import zoo
from layers.replay import force_balance, join_routes
from zoo.catalogue import ROUTERS
from zoo.generate import generate
from zoo.model import ModelConfig, build

D, E, V = 16, 8, 23
LAYER = {"pathway": "moe_plus_plus", "longcat": "moe_plus_plus", "spt": "spt_ffn"}
CONTROLS = {"sign_hash", "random"}
ALL = [entry.name for entry in ROUTERS]
every = pytest.mark.parametrize("name", ALL)
learned = pytest.mark.parametrize("name", [name for name in ALL if name not in CONTROLS])


def config(name, **options):
    """A model of a dense layer and one with that router."""
    options = {"n_experts": E} | options
    layer = LAYER.get(name, "moe")
    options |= {"d_ff": 128} if layer == "spt_ffn" else {"d_expert": 16}
    routed = {"name": layer, "router": {"name": name}, **options}
    ffn = [{"name": "swiglu", "d_ff": 32, "layers": "first"}, routed]
    return ModelConfig(
        vocab_size=V, d_model=D, n_layers=2, n_heads=2, max_seq_len=32, init_std=0.3, ffn=ffn,
        allow_noncausal=True,
    )  # fmt: skip


def make(name, checkpointing=False, **options):
    """Such a model, whose router tells tokens apart."""
    torch.manual_seed(1)
    model = build(config(name, **options))
    model.activation_checkpointing = checkpointing
    for p in router_of(model).parameters():
        torch.nn.init.normal_(p)
    return model


def router_of(model):
    return model.blocks[1].ffn.router


def ids(b=2, s=12):
    return torch.randint(V, (b, s), generator=torch.Generator().manual_seed(2))


def loss_of(model, tokens):
    torch.manual_seed(3)  # noise and jitter are drawn alike
    out = model(tokens)
    return out.logits.logsumexp(-1).mean() + sum(out.losses.values())


def gradients(model, tokens):
    model.zero_grad()
    loss = loss_of(model, tokens)
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def shifted(model):
    """Move the router's weights so far that it chooses otherwise."""
    with torch.no_grad():
        for p in router_of(model).parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(4)))


def choices(routing):
    return (routing.experts,) if routing.keep is None else (routing.experts, routing.keep)


def watched(model):
    """What the router returns from now on, forward by forward."""
    seen = []
    router_of(model).register_forward_hook(lambda module, args, output: seen.append(output))
    return seen


# Recomputation


@every
def test_recomputing_gives_the_same_bits(name):
    plain = gradients(make(name), ids())
    again = gradients(make(name, checkpointing=True), ids())
    assert_close(again, plain, rtol=0, atol=0)


@learned
def test_recomputing_takes_the_recorded_choices_however_logits_have_moved(name):
    model = make(name, checkpointing=True)
    seen = watched(model)
    loss = loss_of(model, ids())
    shifted(model)
    loss.backward()
    first, second = seen
    assert not torch.equal(first.logits, second.logits)
    for a, b in zip(choices(first), choices(second), strict=True):
        assert torch.equal(a, b)
    if second.keep is not None:
        assert (second.weights[~second.keep] == 0).all()


@learned
def test_without_a_record_recomputing_decides_anew(name):
    model = make(name)
    seen = watched(model)
    x = torch.randn(2, 12, D, requires_grad=True)
    loss = checkpoint(model.blocks[1].ffn, x, use_reentrant=False).y.square().sum()
    shifted(model)
    with suppress(CheckpointError):  # where that makes another number of rows
        loss.backward()
    first, second = (choices(routing) for routing in seen)
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("priority", [{}, {"priority": "weight"}], ids=["default", "weight"])
def test_recomputing_keeps_who_stays_within_a_capacity(priority):
    model = make("pathway", checkpointing=True, capacity_factor=0.5, **priority)
    found = []
    experts = model.blocks[1].ffn.experts
    experts.register_forward_pre_hook(lambda module, args: found.append(args[3]))
    loss = loss_of(model, ids())
    shifted(model)
    loss.backward()
    first, second = found
    assert not first.all()
    assert torch.equal(first, second)


def test_a_graph_may_be_recomputed_twice():
    model = make("remoe", checkpointing=True)
    loss = loss_of(model, ids())
    found = []
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.slow
def test_a_compiled_model_recomputes_too():
    torch.compiler.reset()
    plain = gradients(make("top_k"), ids())
    model = make("top_k", checkpointing=True)
    model.compile(backend="aot_eager")
    assert_close(gradients(model, ids()), plain, rtol=1e-3, atol=1e-4)  # fused: rounds less often


# Records


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_record_replayed_gives_the_same_bits(name, checkpointing):
    model = make(name, checkpointing)
    expected = gradients(model, ids())
    with zoo.record_routing() as routes:  # the backward's recomputation is not recorded again
        assert_close(gradients(model, ids()), expected, rtol=0, atol=0)
    n_routes = len(routes)
    with zoo.replay_routing(routes):
        got = gradients(model, ids())
    assert_close(got, expected, rtol=0, atol=0)
    assert len(routes) == n_routes
    assert {r.dtype for r in routes} <= {torch.int64, torch.bool}
    assert not any(r.requires_grad for r in routes)


@learned
@pytest.mark.parametrize("checkpointing", [False, True])
def test_replay_chooses_as_recorded_and_weighs_by_the_current_logits(name, checkpointing):
    model = make(name, checkpointing)
    seen = watched(model)
    with zoo.record_routing() as routes:
        loss_of(model, ids())
    shifted(model)
    loss_of(model, ids())
    with zoo.replay_routing(routes):
        _, grads = gradients(model, ids())
    recorded, free, replayed = seen[:3]
    for a, b in zip(choices(recorded), choices(replayed), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(choices(recorded), choices(free), strict=True))
    assert_close(replayed.logits, free.logits)  # of the current weights
    if name != "factor_llm":  # whose weights are all alike
        assert not torch.allclose(replayed.weights, recorded.weights)
    assert grads["blocks.1.ffn.router.weight"].abs().sum() > 0


def test_replayed_weights_by_hand():
    model = make("top_k", top_k=2)
    seen = watched(model)
    with zoo.record_routing() as routes:
        loss_of(model, ids())
    (experts,) = routes
    shifted(model)
    with zoo.replay_routing([r.clone() for r in routes]):
        loss_of(model, ids())
    assert_close(seen[1].weights, seen[1].logits.gather(-1, experts).softmax(-1))


def test_what_a_model_chose_while_generating_is_replayed_by_one_forward():
    model = make("deepseek_v3", n_groups=4, top_groups=2).eval()
    prompt = ids(1, 5)
    with zoo.record_routing() as routes:
        tokens = generate(model, prompt, max_new_tokens=6, temperature=0.0)
    joined = join_routes(routes, n_forwards=6, n_sequences=1)
    assert [len(r) for r in joined] == [10, 10]  # groups and experts of all tokens but the last
    seen = watched(model)
    with torch.no_grad():
        model(tokens[:, :-1])
    assert torch.equal(seen[0].experts, joined[1])
    shifted(model)
    with zoo.replay_routing(joined):
        model(tokens[:, :-1])
    assert torch.equal(seen[1].experts, joined[1])


def test_join_keeps_sequences_apart():
    whole = torch.arange(2 * 5 * 3).view(2, 5, 3)
    parts = [whole[:, :3].flatten(0, 1), whole[:, 3:4].flatten(0, 1), whole[:, 4:].flatten(0, 1)]
    assert torch.equal(join_routes(parts, 3, 2)[0], whole.flatten(0, 1))
    with pytest.raises(ValueError, match="3 choices are not those of 2 forwards"):
        join_routes(parts, 2, 2)
    with pytest.raises(ValueError, match="not of 4 sequences"):
        join_routes(parts, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:-1], "holds 0 choices and the forward makes more"),
        (lambda r: [*r, r[0]], "holds 2 choices, 1 were replayed"),
        (lambda r: [r[0][:-1]], r"is torch.int64 \[23, 2\], the forward makes .* \[24, 2\]"),
        (lambda r: [r[0] > 0], "is torch.bool"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change, message):
    model = make("top_k", top_k=2)
    with zoo.record_routing() as routes:
        loss_of(model, ids())
    with pytest.raises(ValueError, match=message), zoo.replay_routing(change(routes)):
        loss_of(model, ids())
    loss_of(model, ids())  # and nothing of it stays


@pytest.mark.parametrize("context", [zoo.record_routing, force_balance])
def test_a_record_of_nothing_is_refused(context):
    dense = build(replace(config("top_k"), ffn="swiglu"))
    with pytest.raises(ValueError, match="no routed layer ran"), context():
        loss_of(dense, ids())


def test_compiled_code_keeps_no_record():
    torch.compiler.reset()
    router = router_of(make("top_k"))
    router.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="the model is compiled"), zoo.record_routing():
        router(torch.randn(4, D))


# Forced


@pytest.mark.parametrize("name", ["top_k", "deepseek_v3", "llama4", "sign_hash", "pathway"])
def test_forced_balance_is_even(name):
    model = make(name, top_k=2)
    seen = watched(model)
    with force_balance(), zoo.record_routing():
        loss_of(model, ids())
    counts = seen[0].experts.flatten().bincount()
    assert counts.max() - counts.min() <= 1
    assert all(len(set(row)) == 2 for row in seen[0].experts.tolist())
