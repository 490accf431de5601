"""Routers and their losses: choices, weights, closed forms, masks."""

import math

import pytest
import torch
from torch.testing import assert_close

from routers.balance import balance_loss, heterogeneous_balance_loss, z_loss
from routers.pathway import PathwayRouter, PathwayRouterConfig
from routers.scores import SMALL, scores, top_indices
from routers.top_k import TopKRouter, TopKRouterConfig

D = 8


def top_k(**options):
    router = TopKRouter(TopKRouterConfig(d_model=D, **options)).double()
    torch.nn.init.normal_(router.weight)
    return router


def pathway(**options):
    router = PathwayRouter(PathwayRouterConfig(d_model=D, **options)).double()
    for p in router.parameters():
        torch.nn.init.normal_(p)
    return router


def tokens(n=50):
    return torch.randn(n, D, dtype=torch.float64, requires_grad=True)


# Choosing and weighting


def test_softmax_of_the_chosen_equals_renormalised_softmax_with_gradients():
    router, x = top_k(top_k=3), tokens()
    got = router(x)
    p = got.logits.softmax(-1).gather(-1, got.experts)
    expected = p / p.sum(-1, keepdim=True)
    assert_close(got.weights, expected)
    probe = torch.randn_like(expected)
    inputs = (x, router.weight)
    assert_close(
        torch.autograd.grad(got.weights, inputs, probe, retain_graph=True),
        torch.autograd.grad(expected, inputs, probe),
    )


@pytest.mark.parametrize("n_tokens", [3, SMALL])
def test_the_best_first_and_of_equals_the_lower_index(n_tokens):
    assert top_indices(torch.zeros(n_tokens, 300), 4).tolist() == [[0, 1, 2, 3]] * n_tokens
    ties = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]]).expand(n_tokens, -1)
    assert top_indices(ties, 4).tolist() == [[1, 3, 2, 4]] * n_tokens
    random = torch.randn(n_tokens, 16)
    assert torch.equal(top_indices(random, 5), random.topk(5).indices)


@pytest.mark.parametrize("router", [top_k(top_k=3), pathway(), pathway(weights="released")])
def test_a_shift_of_all_logits_changes_nothing(router):
    x = torch.cat([tokens().detach(), torch.ones(50, 1)], dim=-1)
    weight = torch.cat([router.weight.detach(), torch.zeros(router.weight.shape[0], 1)], dim=-1)
    router.weight = torch.nn.Parameter(weight)
    before = router(x)
    router.weight.data[:, -1] = 3.7
    after = router(x)
    assert torch.equal(before.experts, after.experts)
    assert_close(before.weights, after.weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_decides_in_float32_or_better_under_autocast_too(dtype):
    router = TopKRouter(TopKRouterConfig(d_model=D))
    x = torch.randn(20, D).to(dtype)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x)
    wide = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for t in (plain.weights, plain.logits, *plain.losses.values())} == {wide}
    assert plain.experts.dtype == torch.int64
    assert torch.equal(plain.logits, cast.logits)
    assert_close(plain.logits, (x.double() @ router.weight.double().T).to(wide), atol=1e-6, rtol=0)


def test_jitter_is_on_the_logits_in_training_alone_and_leaves_x():
    router, x = top_k(jitter=0.3), tokens()
    before = x.detach().clone()
    jittered = router(x).logits
    assert not torch.equal(jittered, scores(x, router.weight))
    assert torch.equal(x.detach(), before)
    bound = 0.3 * x.abs() @ router.weight.abs().T
    assert ((jittered - scores(x, router.weight)).abs() <= bound).all()
    assert torch.equal(router.eval()(x).logits, scores(x, router.weight))


def test_zero_expert_gives_its_partner_all_in_released_weights_and_p_in_paper_weights():
    for weights in ("paper", "released"):
        router = pathway(n_experts=2, n_constant=0, n_copy=0, n_zero=2, weights=weights)
        with torch.no_grad():
            router.weight[:] = torch.tensor([3.0, -1.0, 2.0, 1.0])[:, None]
        routing = router(torch.full((1, D), 0.25, dtype=torch.float64))
        assert routing.experts.tolist() == [[0, 2]]
        p = routing.logits.softmax(-1)[0]
        assert_close(routing.weights[0, 0], p[0] if weights == "paper" else torch.ones_like(p[0]))
        assert_close(routing.weights[0, 1], p[2] if weights == "paper" else torch.zeros_like(p[0]))


@pytest.mark.parametrize("k", [1, 2])
def test_only_zero_experts_chosen_is_no_nan(k):
    router = pathway(n_experts=2, n_constant=0, n_copy=0, n_zero=2, top_k=k, weights="released")
    with torch.no_grad():
        router.weight[:] = torch.tensor([1.0, -1.0, 3.0, 2.0])[:, None]
    x = torch.full((1, D), 0.25, dtype=torch.float64, requires_grad=True)
    routing = router(x)
    assert routing.weights.tolist() == [[0.0] * k]
    (routing.weights.sum() + routing.losses["balance"]).backward()
    assert x.grad.isfinite().all()


def test_logit_norm_of_a_token_of_zeros_is_finite():
    router, x = pathway(weights="released", logit_norm=1.0), torch.zeros(3, D, dtype=torch.float64)
    x.requires_grad_()
    routing = router(x)
    (routing.weights.square().sum() + routing.losses["balance"]).backward()
    assert routing.weights.isfinite().all()
    assert x.grad.isfinite().all()


def test_the_gating_residual():
    n = 12
    first, second = pathway(), pathway(n_carry=n)
    assert first.carry is None
    x = tokens()
    carry = first(x).logits
    got = second(x, carry)
    assert_close(got.logits, scores(x, second.weight) + carry @ second.carry.T)
    got.weights.sum().backward()
    assert first.weight.grad.abs().sum() > 0  # not detached
    with torch.no_grad():
        second.carry.zero_()
    assert torch.equal(second(x, carry).logits, scores(x, second.weight))
    with pytest.raises(ValueError, match="reads 12 logits of the previous MoE layer, got none"):
        second(x)
    with pytest.raises(ValueError, match="got 5"):
        second(x, carry[:, :5])


# Losses


def even(n_tokens, n, k):
    """(uniform probabilities, choices that use every expert equally)."""
    probs = torch.full((n_tokens, n), 1 / n, dtype=torch.float64)
    return probs, torch.arange(n_tokens * k).remainder(n).view(n_tokens, k)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_one_when_even_and_e_over_k_at_collapse(k):
    assert_close(balance_loss(*even(24, 8, k)).item(), 1.0)
    probs = torch.zeros(24, 8, dtype=torch.float64)
    probs[:, :k] = 1 / k
    experts = torch.arange(k).expand(24, k)
    assert_close(balance_loss(probs, experts).item(), 8 / k)


def test_tau_one_is_k_over_n_times_canonical():
    probs = torch.randn(30, 12, dtype=torch.float64).softmax(-1)
    experts = probs.topk(2).indices
    raw = heterogeneous_balance_loss(probs, experts, torch.ones(12, dtype=torch.float64))
    assert_close(raw, balance_loss(probs, experts) * 2 / 12)


def test_gradient_is_the_closed_form_and_sums_to_zero():
    logits = torch.randn(30, 12, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(-1)
    experts = p.detach().topk(2).indices
    eta = torch.tensor([1.0] * 8 + [0.75] * 4, dtype=torch.float64)
    (got,) = torch.autograd.grad(heterogeneous_balance_loss(p, experts, eta), logits)
    f = experts.flatten().bincount(minlength=12) / 30
    expected = p / 30 * (eta * f - (eta * f * p).sum(-1, keepdim=True))
    assert_close(got, expected.detach())
    assert_close(got.sum(-1), torch.zeros(30, dtype=torch.float64))


def test_z_loss_of_zeros_and_of_a_shift():
    logits = torch.zeros(5, 8, dtype=torch.float64)
    assert_close(z_loss(logits).item(), math.log(8) ** 2)
    assert_close(z_loss(logits + 3).item(), (math.log(8) + 3) ** 2)


def test_of_a_concatenated_batch_is_the_formula_with_global_f():
    parts = [torch.randn(n, 6, dtype=torch.float64).softmax(-1) for n in (10, 30)]
    whole = torch.cat(parts)
    f = whole.topk(2).indices.flatten().bincount(minlength=6) / 40
    by_part = [3 * (f * part.mean(0)).sum() * len(part) / 40 for part in parts]
    assert_close(balance_loss(whole, whole.topk(2).indices), sum(by_part))


@pytest.mark.parametrize(("n_ffn", "n_zc"), [(16, 4), (8, 4), (32, 8)])
def test_descent_on_free_logits_finds_the_designed_balance(n_ffn, n_zc):
    """f = K P, as when choices follow probabilities: P is proportional to 1 / eta (moe.md 4.4)."""
    tau, k, n = 0.75, 2, n_ffn + n_zc
    eta = torch.tensor([1.0] * n_ffn + [tau] * n_zc, dtype=torch.float64)
    logits = torch.randn(n, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        p = logits.softmax(-1)
        loss = k * (eta * p.square()).sum()
        (grad,) = torch.autograd.grad(loss, logits)
        logits = (logits - 5.0 * grad).detach().requires_grad_()
    share = 1 / (tau * n_ffn + n_zc)
    expected = torch.tensor([tau * share] * n_ffn + [share] * n_zc, dtype=torch.float64)
    assert_close(logits.softmax(-1).detach(), expected, rtol=1e-3, atol=0)
    assert_close(loss.item(), k * tau * share, rtol=1e-4, atol=0)


def test_descent_on_the_loss_itself_reaches_the_designed_use():
    """Sampled choices, the loss of the library: FFN experts per token go to 1.5 for 16 + 4."""
    tau, n_ffn, n_zc, k = 0.75, 16, 4, 2
    eta = torch.tensor([1.0] * n_ffn + [tau] * n_zc)
    logits, used = (0.5 * torch.randn(n_ffn + n_zc)).requires_grad_(), []
    for step in range(1200):
        p = logits.softmax(-1).expand(1000, -1)
        # choices with probability P each: one draw per slot
        experts = torch.multinomial(logits.detach().softmax(-1), 1000 * k, replacement=True)
        loss = heterogeneous_balance_loss(p, experts.view(-1, k), eta)
        (grad,) = torch.autograd.grad(loss, logits)
        logits = (logits - 5.0 * grad).detach().requires_grad_()
        if step >= 800:
            used.append((experts < n_ffn).float().mean().item() * k)
    assert abs(sum(used) / len(used) - 1.5) < 0.02


# Masks, emptiness, refusals


@pytest.mark.parametrize(
    "router", [top_k(), top_k(renormalize=False), pathway(), pathway(logit_norm=1.0)]
)
def test_masked_tokens_change_no_loss(router):
    x = tokens().detach()
    mask = torch.rand(50) > 0.4
    masked, alone = router(x, None, mask), router(x[mask])
    for name in ("balance", "z"):
        assert_close(masked.losses[name], alone.losses[name])
    assert_close(masked.weights[mask], alone.weights)
    nothing = router(x, None, torch.zeros(50, dtype=torch.bool))
    assert all(loss == 0 for loss in nothing.losses.values())


@pytest.mark.parametrize("router", [top_k(), pathway(weights="released", logit_norm=1.0)])
def test_no_tokens(router):
    routing = router(tokens(0))
    assert routing.experts.shape == (0, 2)
    sum(routing.losses.values()).backward()
    assert torch.equal(router.weight.grad, torch.zeros_like(router.weight))


def test_a_decoding_step_chooses_alike_and_reports_no_losses():
    router, x = top_k(), tokens(1)
    with torch.no_grad():
        decoded = router(x)
    assert decoded.losses == {}
    full = router(x)
    assert torch.equal(decoded.weights, full.weights)
    assert set(full.losses) == {"balance", "z"}


def test_refusals():
    with pytest.raises(ValueError, match="top_k=1 with renormalize=True"):
        TopKRouterConfig(d_model=D, top_k=1)
    TopKRouterConfig(d_model=D, top_k=1, n_experts=1)  # one expert has no choice to learn
    with pytest.raises(ValueError, match="top_k must be at most n_experts=2, got 3"):
        TopKRouterConfig(d_model=D, n_experts=2, top_k=3)
    with pytest.raises(ValueError, match=r"jitter must be in \[0, 1\)"):
        TopKRouterConfig(d_model=D, jitter=1.5)
    with pytest.raises(ValueError, match="unknown routing weights 'papers'"):
        PathwayRouterConfig(d_model=D, weights="papers")
    with pytest.raises(ValueError, match="top_k=1 with weights='topk_softmax'"):
        PathwayRouterConfig(d_model=D, weights="topk_softmax", top_k=1)
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        PathwayRouterConfig(d_model=D, tau=0)
    with pytest.raises(ValueError, match="at most the 12 experts of all kinds, got 13"):
        PathwayRouterConfig(d_model=D, top_k=13)


@pytest.mark.parametrize("router", [top_k(), pathway(), pathway(n_carry=7)])
def test_cost_names_every_parameter(router):
    cost = router.config.cost()
    assert {i.name: i.params for i in cost} == {n: p.numel() for n, p in router.named_parameters()}
    assert {i.role for i in cost} == {"router"}
