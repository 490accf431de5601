"""A dense FFN dealt out to experts, and what FactorLLM teaches their router."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conversion_toys import ROWS, WIDTH, D, dense, generator, one_expert
from recipe_toys import refused

import zoo
from routers.factor_llm import straight_through
from zoo.conversion import (
    GROUPINGS,
    balanced_kmeans,
    convert_ffn,
    dense_of,
    expert_outputs,
    layer_pa_loss,
    pa_labels,
    pa_loss,
    split_neurons,
)


@pytest.mark.parametrize("split", GROUPINGS)
@pytest.mark.parametrize("n_experts", [1, 2, 3, 8, 24])
def test_the_experts_of_a_split_add_up_to_the_dense_ffn(split, n_experts):
    ffn = dense()
    weights = dense_of(ffn)
    groups = GROUPINGS[split](weights.up, n_experts, generator())
    assert groups.shape == (n_experts, WIDTH // n_experts)
    assert torch.equal(groups.flatten().sort().values, torch.arange(WIDTH))  # each neuron once
    stacks = split_neurons(weights, groups)
    for rows in ROWS:
        x = torch.randn(rows, D, dtype=torch.float64)
        outputs = expert_outputs(x, stacks)  # [T, N, D]
        torch.testing.assert_close(outputs.sum(1), ffn(x[None]).y[0], rtol=1e-12, atol=1e-13)
    x = torch.randn(2, D, dtype=torch.float64)
    for e, (gate_up, down) in enumerate(zip(*stacks, strict=True)):
        gate, up = gate_up.chunk(2)
        loop = torch.stack([one_expert(token, gate, up, down) for token in x])
        torch.testing.assert_close(expert_outputs(x, stacks)[:, e], loop, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("split", GROUPINGS)
def test_factor_llm_with_all_experts_is_the_dense_ffn(split):
    """Whatever its router says."""
    ffn = dense()
    moe = convert_ffn(ffn, "factor_llm", n_experts=4, top_k=4, split=split, router_std=1.0)
    for rows in ROWS:
        x = torch.randn(1, rows, D, dtype=torch.float64)
        torch.testing.assert_close(moe(x).y, ffn(x).y, rtol=1e-9, atol=1e-10)


def test_factor_llm_counts_k_of_n_experts_n_over_k_times():
    """N = 4 of which K = 3: the published integer division would count them once."""
    ffn = dense()
    moe = convert_ffn(ffn, "factor_llm", n_experts=4, top_k=3, router_std=1.0)
    assert torch.equal(moe.router.logit_bias, torch.zeros(4))  # there is one, as published
    x = torch.randn(12, D, dtype=torch.float64)
    outputs = expert_outputs(x, split_neurons(dense_of(ffn), torch.arange(WIDTH).view(4, 6)))
    chosen = moe.router(x).experts
    hard = torch.zeros(12, 4, dtype=x.dtype).scatter_(1, chosen, 1.0)
    expected = 4 / 3 * (outputs * hard[..., None]).sum(1)
    torch.testing.assert_close(moe(x[None]).y[0], expected, rtol=1e-9, atol=1e-10)


def cost_of(points, labels):
    return sum(
        (points[labels == j] - points[labels == j].mean(0)).square().sum() for j in labels.unique()
    )


@pytest.mark.parametrize("n_groups", [2, 3, 5])
def test_balanced_kmeans_finds_planted_groups(n_groups):
    planted = torch.arange(n_groups).repeat(20)
    points = 4 * torch.randn(n_groups, 6)[planted] + 0.1 * torch.randn(len(planted), 6)
    labels = balanced_kmeans(points, n_groups, generator())
    pairs = {(a, b) for a, b in zip(labels.tolist(), planted.tolist(), strict=True)}
    assert len(pairs) == n_groups


def test_balanced_kmeans_is_balanced_repeatable_and_cannot_be_bettered_by_a_swap():
    points = torch.randn(24, 3)
    labels = balanced_kmeans(points, 4, generator())
    assert labels.bincount().tolist() == [6] * 4
    assert torch.equal(labels, balanced_kmeans(points, 4, generator()))
    centres = torch.stack([points[labels == j].mean(0) for j in range(4)])
    distances = torch.cdist(points, centres).square()
    held = distances.gather(1, labels[:, None]).sum()
    for a, b in itertools.combinations(range(24), 2):
        other = labels.clone()
        other[[a, b]] = labels[[b, a]]
        assert distances.gather(1, other[:, None]).sum() >= held - 1e-5
    at_random = torch.arange(4).repeat(6)
    assert cost_of(points, labels) < 0.9 * cost_of(points, at_random)


def test_balanced_kmeans_of_equal_points_is_still_balanced():
    labels = balanced_kmeans(torch.ones(12, 2), 3, generator())
    assert labels.bincount().tolist() == [4] * 3


def test_pa_labels_are_the_experts_nearest_to_their_share_of_the_teacher():
    outputs, target = torch.randn(20, 5, D), torch.randn(20, D)
    labels = pa_labels(outputs, target, 2)
    for t in range(20):
        distance = [((outputs[t, e] - target[t] * 2 / 5) ** 2).mean().item() for e in range(5)]
        nearest = sorted(range(5), key=distance.__getitem__)[:2]
        assert labels[t].nonzero().flatten().tolist() == sorted(nearest)
    assert torch.equal(pa_labels(outputs, target, 5), torch.ones(20, 5))


def test_pa_loss_is_the_clipped_divergence_meaned_over_real_tokens():
    logits, labels = torch.randn(6, 4) * 200, F.one_hot(torch.arange(6) % 4, 4).float()
    per_token = []
    for t in range(6):
        p, q = (
            [min(max(v, 1e-7), 1 - 1e-7) for v in row.softmax(0).tolist()]
            for row in (logits[t], labels[t])
        )
        per_token.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
    assert pa_loss(logits, labels).item() == pytest.approx(sum(per_token) / 6, rel=1e-4)
    mask = torch.tensor([True, False, True, True, False, False])
    expected = (per_token[0] + per_token[2] + per_token[3]) / 3
    assert pa_loss(logits, labels, mask).item() == pytest.approx(expected, rel=1e-4)
    assert pa_loss(labels, labels).item() == pytest.approx(0, abs=1e-7)
    assert pa_loss(logits, labels, torch.zeros(6, dtype=torch.bool)) == 0


def test_pa_loss_teaches_a_router_the_pseudo_labels():
    ffn = dense(dtype=torch.float32)
    stacks = split_neurons(dense_of(ffn), torch.arange(WIDTH).view(4, 6))
    x = torch.randn(64, D)
    labels = pa_labels(expert_outputs(x, stacks), ffn(x[None]).y[0], 2)
    weight = torch.zeros(4, D, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    losses = []
    for _ in range(60):
        loss = pa_loss(x @ weight.t(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_straight_through_mask_is_hard_and_has_the_gradient_of_the_probabilities():
    logits, probe = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    mask = torch.zeros(5, 4).scatter_(1, logits.topk(2).indices, 1.0)
    hard = straight_through(mask, logits.softmax(-1))
    torch.testing.assert_close(hard, mask)
    (hard * probe).sum().backward()
    (expected,) = torch.autograd.grad((logits.softmax(-1) * probe).sum(), logits)
    torch.testing.assert_close(logits.grad, expected)


def test_a_layer_is_taught_by_the_ffn_that_it_came_from():
    """The labels are those of its slices; only the router learns."""
    ffn, x = dense(dtype=torch.float32), torch.randn(128, D)
    moe = convert_ffn(ffn, "factor_llm")
    slices = split_neurons(dense_of(ffn), torch.arange(WIDTH).view(4, 6))
    labels = pa_labels(expert_outputs(x, slices), ffn(x[None]).y[0], 2)
    loss = layer_pa_loss(moe, ffn, x)
    torch.testing.assert_close(loss, pa_loss(moe.router(x).logits, labels))
    mask = torch.arange(128) < 40
    spoiled = x.masked_fill(~mask[:, None], torch.nan)
    torch.testing.assert_close(
        layer_pa_loss(moe, ffn, spoiled, mask), layer_pa_loss(moe, ffn, x[:40])
    )
    loss.backward()
    assert {name for name, w in moe.named_parameters() if w.grad is not None} == {
        "router.weight", "router.logit_bias",
    }  # fmt: skip
    with refused("factor_llm alone is taught, got a RandomRouter"):
        layer_pa_loss(zoo.create("moe", d_model=D, router="random"), ffn, x)
