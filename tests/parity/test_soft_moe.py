"""Soft MoE against loops over tokens, slots and experts in float64; prefixes against whole runs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import zoo
from layers.soft_moe import SoftMoE, SoftMoEConfig
from zoo.generate import generate
from zoo.model import ModelConfig, build, model_cost

D, FF, N, P, B, S = 12, 20, 3, 2, 2, 7
SIZES = {"d_model": D, "d_expert": FF, "n_experts": N, "slots_per_expert": P}


def make(**options):
    ffn = SoftMoE(SoftMoEConfig(**SIZES | options)).double()
    with torch.no_grad():
        ffn.scale.fill_(3.0)
    return ffn


def tokens(b=B, s=S):
    return torch.randn(b, s, D, dtype=torch.float64)


def expert(ffn, n, x):
    if ffn.config.gated:
        gate, up = (ffn.experts.gate_up.weight[n] @ x).chunk(2)
        h = F.silu(gate) * up
    else:
        h = F.relu(ffn.experts.up.weight[n] @ x)
    return ffn.experts.down.weight[n] @ h


def loops(ffn, x, mask=None):
    """moe.md section 8 word by word, for one sequence after another. x: [B, S, D]."""
    scale, mu = ffn.scale, ffn.mu.view(N, P, D)
    ys = []
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if mask is None or mask[b, t]]
        logits = {}
        for t in real:
            x_hat = x[b, t] * torch.rsqrt((x[b, t] ** 2).sum() + 1e-6)
            for n in range(N):
                for p in range(P):
                    mu_hat = mu[n, p] * torch.rsqrt((mu[n, p] ** 2).sum() + 1e-6)
                    logits[t, n, p] = (x_hat * (scale * mu_hat)).sum()
        outs = {}
        for n in range(N):
            for p in range(P):
                e = {t: logits[t, n, p].exp() for t in real}
                total = sum(e.values())
                slot = sum((e[t] / total * x[b, t] for t in real), torch.zeros(D).double())
                outs[n, p] = expert(ffn, n, slot)
        rows = []
        for t in range(x.shape[1]):
            if t not in real:
                rows.append(torch.zeros(D, dtype=torch.float64))
                continue
            e = {q: logits[(t, *q)].exp() for q in outs}
            total = sum(e.values())
            rows.append(sum(e[q] / total * outs[q] for q in outs))
        ys.append(torch.stack(rows))
    return torch.stack(ys)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("body", [{}, {"gated": False, "activation": "relu"}])
def test_forward_and_gradients_are_those_of_loops(masked, body):
    ffn, x = make(**body), tokens().requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(B, S) > 0.3
        mask[0, 0] = False
    y, expected = ffn(x, mask=mask).y, loops(ffn, x, mask)
    assert_close(y, expected)
    inputs, probe = (x, *ffn.parameters()), torch.randn_like(y)
    assert_close(
        torch.autograd.grad(y, inputs, probe), torch.autograd.grad(expected, inputs, probe)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_evaluation_is_the_training_rule_on_each_prefix(masked):
    ffn, x = make(), tokens()
    mask = torch.ones(B, S, dtype=torch.bool)
    if masked:
        mask[0, :2] = False  # padding on the left, and within
        mask[1, 4] = False
    y = ffn.eval()(x, mask=mask if masked else None).y
    ffn.train()
    for t in range(S):
        prefix = ffn(x[:, : t + 1], mask=mask[:, : t + 1]).y[:, -1]
        assert_close(y[:, t], prefix)
    assert_close(y[:, -1], loops(ffn, x, mask)[:, -1])
    assert (y[~mask] == 0).all()


def test_prefix_sums_do_not_overflow_or_vanish():
    ffn, x = make(), tokens(1, 40)
    with torch.no_grad():
        ffn.scale.fill_(400.0)  # exp(400) is more than float32 holds
    y = ffn.float().eval()(x.float()).y
    assert_close(y.double(), ffn.double()(x).y, rtol=1e-2, atol=1e-3)
    assert y.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_a_sequence_of_padding_gives_zeros_and_finite_gradients(training):
    ffn, x = make().train(training), tokens().requires_grad_()
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0] = False
    y = ffn(x, mask=mask).y
    assert (y[0] == 0).all()
    assert_close(y[1:], ffn(x[1:]).y)
    (y * torch.randn_like(y)).sum().backward()
    assert (x.grad[0] == 0).all()
    assert all(p.grad.isfinite().all() for p in ffn.parameters())


def test_later_tokens_are_seen_in_training_alone():
    ffn, x = make(), tokens()
    other = x.clone()
    other[:, 4:] += 1
    assert not torch.allclose(ffn(x).y[:, :4], ffn(other).y[:, :4])
    ffn.eval()
    assert torch.equal(ffn(x).y[:, :4], ffn(other).y[:, :4])
    whole = make(decision="whole")
    whole.load_state_dict(ffn.state_dict())
    assert_close(whole.eval()(x).y, ffn.train()(x).y)


def test_sequences_do_not_mix():
    ffn, x = make(), tokens()
    assert_close(ffn(x).y, torch.cat([ffn(x[:1]).y, ffn(x[1:]).y]))


def test_noise_is_of_training_alone():
    ffn, x = make(noise=0.5), tokens()
    assert not torch.allclose(ffn(x).y, ffn(x).y)
    ffn.eval()
    state = torch.get_rng_state()
    assert torch.equal(ffn(x).y, ffn(x).y)
    assert torch.equal(state, torch.get_rng_state())


def test_first_weights():
    ffn = SoftMoE(SoftMoEConfig(d_model=64, n_experts=8, slots_per_expert=64))
    std = 64**-0.5
    assert abs(ffn.mu.std().item() / std - 1) < 0.02
    assert ffn.mu.abs().max() <= 2 * std / 0.8796
    assert ffn.scale.tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_per_expert": 0}, "slots_per_expert must be positive"),
        ({"decision": "prefixes"}, "Did you mean 'prefix'"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"activation": "relu2"}, "unknown activation of gated experts"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SoftMoEConfig(**SIZES | options)


# What it costs


@pytest.mark.parametrize("seq_len", [3, 6, 24])
def test_cost_by_sequence_length_is_what_runs(seq_len):
    ffn, x = make(), tokens(2, seq_len)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ffn(x)
    assert counter.get_total_flops() == pytest.approx(
        2 * seq_len * ffn.config.cost(seq_len).flops, rel=1e-12
    )
    assert ffn.config.cost().flops == ffn.config.cost(N * P).flops
    assert ffn.config.cost().active_params == ffn.config.cost().params


CONFIG = ModelConfig(
    vocab_size=17, d_model=D, n_layers=2, n_heads=2, max_seq_len=24, init_std=0.3,
    ffn={"name": "soft_moe", "n_experts": N, "slots_per_expert": P, "d_expert": FF},
    allow_noncausal=True,
)  # fmt: skip


def test_a_model_costs_it_at_its_own_sequence_length():
    short, long = (model_cost(CONFIG, n).by_role()["expert"].flops for n in (6, 24))
    assert math.isclose(short, 4 * long)
    assert math.isclose(short, 2 * 6 * D * FF)  # two layers, one expert each


# Generation


@pytest.mark.parametrize("masked", [False, True])
def test_generation_is_that_of_whole_forwards(masked):
    model = build(CONFIG).eval()
    assert not model.tokenwise
    prompt, mask = torch.randint(17, (2, 5)), None
    if masked:
        mask = torch.ones(2, 5, dtype=torch.bool)
        mask[1, :2] = False
    got = generate(model, prompt, mask=mask, max_new_tokens=6, temperature=0.0)
    expected = prompt
    with torch.no_grad():
        for _ in range(6):
            best = model(expected, mask=mask).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, best], dim=1)
            if mask is not None:
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], dim=1)
        assert torch.equal(got, expected)
        # the padded row as if it stood alone
        if masked:
            alone = generate(model, prompt[1:, 2:], max_new_tokens=6, temperature=0.0)
            assert torch.equal(alone[0], got[1, 2:])
        with pytest.raises(ValueError, match="without a cache"):
            model(prompt, cache=model.new_cache())


def test_a_language_model_asks_for_it():
    with pytest.raises(ValueError, match="allow_noncausal"):
        ModelConfig(d_model=D, n_heads=2, ffn="soft_moe").layers()
    assert zoo.resolve("soft_moe", d_model=D).causal is False
