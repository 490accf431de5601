"""Losses that keep experts in use: closed forms, scopes, the conventions of others (moe.md 3)."""

import pytest
import torch
from torch.testing import assert_close

from routers.balance import (
    BalanceLoss,
    balance_loss,
    load_weighted_l1,
    sequence_balance_loss,
    square_loss,
)
from routers.conventions import CONVENTIONS, converted, value
from routers.importance import importance_loss, load_loss, squared_variation, threshold_of_others

E, K = 6, 2


def draw(n_tokens=40, k=K, n_experts=E):
    """(probabilities of free logits, choices best first, logits)."""
    logits = torch.randn(n_tokens, n_experts, dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(-1)
    return probs, probs.topk(k).indices, logits


def even(n_tokens, k):
    probs = torch.full((n_tokens, E), 1 / E, dtype=torch.float64)
    return probs, torch.arange(n_tokens * k).remainder(E).view(n_tokens, k)


# Scopes


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("n_sequences", [1, 2, 4])
def test_inv16_every_scope_is_one_when_even_and_e_over_k_at_collapse(n_sequences, k):
    n_tokens = E * n_sequences
    probs, experts = even(n_tokens, k)
    counts = experts.flatten().bincount(minlength=E) * 3
    for loss in (
        balance_loss(probs, experts),
        balance_loss(probs, experts, None, counts),
        sequence_balance_loss(probs, experts, n_sequences),
    ):
        assert_close(loss.item(), 1.0)
    probs = torch.zeros(n_tokens, E, dtype=torch.float64)
    probs[:, :k] = 1 / k
    experts = torch.arange(k).expand(n_tokens, k)
    counts = experts.flatten().bincount(minlength=E)
    for loss in (
        balance_loss(probs, experts, None, counts),
        sequence_balance_loss(probs, experts, n_sequences),
    ):
        assert_close(loss.item(), E / k)


def test_the_sequence_loss_is_the_mean_of_each_sequences_own():
    probs, experts, _ = draw()
    mask = torch.rand(40) > 0.3
    mask[10:20] = False  # a sequence of padding has no say
    for given in (None, mask):
        parts = [slice(10 * b, 10 * b + 10) for b in range(4)]
        own = [
            balance_loss(probs[p], experts[p], None if given is None else given[p])
            for p in parts
            if given is None or given[p].any()
        ]
        got = sequence_balance_loss(probs, experts, 4, given)
        assert_close(got, torch.stack(own).mean())
    assert_close(sequence_balance_loss(probs, experts, 1), balance_loss(probs, experts))
    none = sequence_balance_loss(probs, experts, 4, torch.zeros(40, dtype=torch.bool))
    assert none == 0


def test_inv19_the_mean_over_ranks_with_global_counts_is_the_loss_of_the_whole():
    probs, experts, logits = draw()
    whole = balance_loss(probs, experts)
    counts = experts.flatten().bincount(minlength=E)
    parts = [
        balance_loss(probs[p], experts[p], None, counts) for p in (slice(0, 20), slice(20, 40))
    ]
    mean = torch.stack(parts).mean()
    assert_close(mean, whole)
    assert_close(torch.autograd.grad(mean, logits, retain_graph=True),
                 torch.autograd.grad(whole, logits))  # fmt: skip
    own = [balance_loss(probs[p], experts[p]) for p in (slice(0, 20), slice(20, 40))]
    assert not torch.allclose(torch.stack(own).mean(), whole)  # what global counts are for


def test_global_counts_leave_masked_tokens_out_of_p():
    probs, experts, _ = draw()
    mask = torch.rand(40) > 0.4
    counts = torch.randint(1, 9, (E,))
    assert_close(
        balance_loss(probs, experts, mask, counts),
        balance_loss(probs[mask], experts[mask], None, counts),
    )
    assert balance_loss(probs, experts, torch.zeros_like(mask), counts) == 0
    assert balance_loss(probs[:0], experts[:0], None, counts * 0) == 0


def test_the_module_adds_what_the_step_has_seen_in_training_alone():
    loss, (probs, experts, _) = BalanceLoss("global_batch", E), draw()
    assert torch.equal(loss(probs, experts, None), balance_loss(probs, experts, None, experts_of(
        experts)))  # fmt: skip
    loss.seen += torch.arange(E) * 10
    expected = balance_loss(probs, experts, None, experts_of(experts) + loss.seen)
    assert_close(loss(probs, experts, None), expected)
    assert_close(loss.eval()(probs, experts, None), balance_loss(probs, experts))
    assert loss.state_dict() == {}
    assert loss.to(torch.bfloat16).seen.dtype == torch.int64
    assert BalanceLoss("micro_batch", E).seen is None


def experts_of(experts):
    return experts.flatten().bincount(minlength=E)


# Gradients


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch", "sequence"])
def test_inv17_the_gradient_is_the_closed_form_and_sums_to_zero(scope):
    probs, experts, logits = draw()
    if scope == "micro_batch":
        loss, f = balance_loss(probs, experts), experts_of(experts).expand(40, E) / 40
    elif scope == "global_batch":
        counts = torch.randint(1, 9, (E,))
        loss = balance_loss(probs, experts, None, counts)
        f = (counts * K / counts.sum()).expand(40, E)
    else:
        loss = sequence_balance_loss(probs, experts, 4)
        f = torch.cat([(experts_of(e) / 10).expand(10, E) for e in experts.split(10)])
    (got,) = torch.autograd.grad(loss, logits)
    p = probs.detach()
    expected = E / K / 40 * p * (f - (f * p).sum(-1, keepdim=True))
    assert_close(got, expected)
    assert_close(got.sum(-1), torch.zeros(40, dtype=torch.float64))


# Other losses


def test_inv18_the_square_loss():
    logits = torch.full((5, E), -3.0, dtype=torch.float64)
    assert square_loss(logits) == 9
    mask = torch.tensor([True, False, True, False, False])
    logits[1] = 100
    assert square_loss(logits, mask) == 9


def test_importance_and_load_are_nothing_when_even_and_e_less_one_at_collapse():
    gates, _ = even(12, 1)
    assert_close(importance_loss(gates).item(), 0.0)
    one = torch.zeros(12, E, dtype=torch.float64)
    one[:, 2] = 1
    assert_close(importance_loss(one).item(), E - 1.0)
    logits = torch.zeros(12, E, dtype=torch.float64)
    assert_close(load_loss(logits, logits, 1.0).item(), 0.0)
    logits[:, 2] = 100
    assert_close(load_loss(logits, logits * 0 + 50, 1.0).item(), E - 1.0)
    assert squared_variation(torch.zeros(E)) == 0
    v = torch.tensor([1.0, 3.0])
    assert_close(squared_variation(v), torch.tensor(0.25))


def test_the_smooth_load_is_how_often_noise_would_choose_an_expert():
    """The probability under another draw of an expert's own noise, by drawing."""
    logits, noise = torch.randn(1, E, dtype=torch.float64), torch.randn(1, E, dtype=torch.float64)
    noisy = logits + noise
    threshold = threshold_of_others(noisy, noisy.topk(K).indices)
    p = torch.special.ndtr(logits - threshold)[0]
    for e in range(E):
        again = noisy.expand(20000, E).clone()
        again[:, e] = logits[0, e] + torch.randn(20000, dtype=torch.float64)
        chosen = (again.topk(K).indices == e).any(-1).double().mean()
        assert abs(chosen - p[e]) < 0.015


def test_load_weighted_l1_of_even_gates_is_their_sum_and_closed_gates_get_no_gradient():
    gates = torch.zeros(E, E, dtype=torch.float64)
    for t in range(E):
        gates[t, [t, (t + 1) % E]] = 0.7
    assert_close(load_weighted_l1(gates, K).item(), 1.4)
    logits = torch.randn(20, E, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(load_weighted_l1(logits.relu(), K), logits)
    assert (grad[logits <= 0] == 0).all()
    counts = (logits > 0).sum(0)
    expected = (logits > 0) * counts * E / (K * 400)
    assert_close(grad, expected.double())


# Conventions


def models(n_layers, k=K):
    probs, experts = zip(*(draw(k=k)[:2] for _ in range(n_layers)), strict=True)
    return probs, experts


def test_each_convention_by_its_own_formula():
    probs, experts = models(3)
    f = [experts_of(e).double() / 40 for e in experts]  # sums to K
    p = [q.mean(0) for q in probs]
    first = [e[:, 0].bincount(minlength=E).double() / 40 for e in experts]
    pairs = list(zip(f, p, strict=True))
    wholes = [q.sum(0) for q in probs]
    expected = {
        "canonical": sum(E / K * (a * b).sum() for a, b in pairs) / 3,
        "switch": sum(E * (a / K * b).sum() for a, b in pairs),
        "flaxformer": sum(E * (a * b).sum() for a, b in pairs),
        "gshard": sum((a * b).mean() * E**2 for a, b in zip(first, p, strict=True)),
        "megatron": sum(E / (K * 40**2) * (a * 40 * w).sum() for (a, _), w in zip(
            pairs, wholes, strict=True)),
        "megablocks": sum(E / (K * 40) * (a * 40 * b).sum() for a, b in pairs) / 3,
        "huggingface": E * (sum(f) / 3 * (sum(p) / 3)).sum(),
        "sonicmoe": sum(E * (a / a.sum() * (w / w.sum())).sum() for (a, _), w in zip(
            pairs, wholes, strict=True)),
        "moe_plus_plus": sum((a * b).sum() for a, b in pairs),
    }  # fmt: skip
    assert expected.keys() == CONVENTIONS.keys()
    for name, wanted in expected.items():
        assert_close(value(name, probs, experts), wanted, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("n_layers", [1, 4])
def test_a_converted_coefficient_weighs_alike(n_layers):
    probs, experts = models(n_layers)
    sizes = {"n_experts": E, "top_k": K, "n_layers": n_layers}
    exact = [name for name in CONVENTIONS if name not in ("huggingface", "gshard")]
    exact += ["huggingface"] if n_layers == 1 else []
    for of in exact:
        for to in exact:
            ours = converted(0.01, of=of, to=to, **sizes) * value(to, probs, experts)
            assert_close(ours, 0.01 * value(of, probs, experts))
    balanced = [even(24, K)] * n_layers
    flat = [p for p, _ in balanced], [e for _, e in balanced]
    for name in CONVENTIONS:
        one = converted(0.01, of=name, to="canonical", **sizes)
        assert_close(0.01 * value(name, *flat).item(), one)


def test_the_coefficients_of_papers():
    olmoe = {"n_experts": 64, "top_k": 8, "n_layers": 16}
    assert converted(0.01, of="megablocks", to="canonical", **olmoe) == 0.01
    assert_close(converted(0.01, of="huggingface", to="canonical", **olmoe), 0.08)
    plus = {"n_experts": 20, "top_k": 2, "n_layers": 1}
    assert_close(converted(0.01, of="moe_plus_plus", to="canonical", **plus), 0.001)
    with pytest.raises(ValueError, match="unknown convention of the balance loss 'megatrn'"):
        converted(0.01, of="megatrn", to="canonical", **plus)


def test_pooled_layers_hide_opposite_imbalances():
    probs = [torch.zeros(10, 2, dtype=torch.float64) for _ in range(2)]
    probs[0][:, 0] = probs[1][:, 1] = 1
    experts = [torch.zeros(10, 1, dtype=torch.int64), torch.ones(10, 1, dtype=torch.int64)]
    assert value("huggingface", probs, experts) == 1
    assert value("canonical", probs, experts) == 2


def test_masks_of_conventions():
    probs, experts = models(2)
    mask = torch.rand(40) > 0.4
    kept = [p[mask] for p in probs], [e[mask] for e in experts]
    for name in CONVENTIONS:
        assert_close(value(name, probs, experts, mask), value(name, *kept))
