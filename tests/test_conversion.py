"""Dense FFNs as mixtures: what must be exact is, against loops in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from recipe_toys import refused

import zoo
from layers.swiglu import GATES
from zoo.conversion import (
    GROUPINGS,
    METHODS,
    DenseFFN,
    balanced_kmeans,
    convert,
    convert_ffn,
    dense_of,
    drop_upcycle,
    expert_outputs,
    granular_upcycle,
    mixing_scale,
    pa_labels,
    pa_loss,
    receipt,
    sparse_upcycle,
    split_neurons,
    straight_through,
    with_noise,
)

D, WIDTH = 16, 24
ROWS = (1, 2, 3, 7, 16, 33, 130)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(activation="silu", d_ff=WIDTH, dtype=torch.float64):
    return zoo.create("swiglu", d_model=D, d_ff=d_ff, activation=activation).to(dtype)


def one_expert(x, gate, up, down, activation="silu"):
    """Neuron by neuron, from the definition."""
    y = torch.zeros_like(x)
    for n in range(up.shape[0]):
        h = GATES[activation]((gate[n] * x).sum()) * (up[n] * x).sum()
        y += h * down[:, n]
    return y


def mixture_loop(x, moe):
    """Token by token: softmax, the K largest, their experts one after another."""
    c, router, out = moe.config, moe.router, []
    for token in x:
        logits = router.weight.to(x.dtype) @ token
        if router.logit_bias is not None:
            logits = logits + router.logit_bias
        chosen = logits.argsort(descending=True, stable=True)[: c.top_k].tolist()
        p = logits[chosen].softmax(0) if router.config.renormalize else logits.softmax(0)[chosen]
        y = torch.zeros_like(token)
        for weight, e in zip(p, chosen, strict=True):
            gate, up = moe.gate_up.weight[e].chunk(2)
            y += weight * one_expert(token, gate, up, moe.down.weight[e], c.activation)
        out.append(y)
    return torch.stack(out)


EXACT = {
    "upcycle": {"n_experts": 5, "top_k": 2},
    "upcycle, all run": {"n_experts": 3, "top_k": 3},
    "granular": {"n_copies": 3, "n_slices": 4},
    "granular, slices of no power of two": {"n_copies": 4, "n_slices": 3},
    "granular, two copies run": {"n_copies": 3, "n_slices": 2, "top_k": 4},
    "granular, all run": {"n_copies": 2, "n_slices": 2, "top_k": 4},
    "drop": {"n_experts": 4, "top_k": 2, "fraction": 0.0},
}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_exact_conversions_change_nothing_at_any_number_of_rows(case, activation):
    ffn = dense(activation)
    moe = convert_ffn(ffn, case.split(",")[0], **EXACT[case]).eval()
    gate, up, down = dense_of(ffn)
    for rows in ROWS:
        x = torch.randn(1, rows, D, dtype=torch.float64)
        expected = ffn(x).y
        torch.testing.assert_close(moe(x).y, expected, rtol=1e-12, atol=1e-13)
        with torch.no_grad():  # a single row takes the decoding path
            torch.testing.assert_close(moe(x).y, expected.detach(), rtol=1e-12, atol=1e-13)
        if rows < 8:
            loop = torch.stack([one_expert(t, gate, up, down, activation) for t in x[0]])
            torch.testing.assert_close(expected[0], loop, rtol=1e-12, atol=1e-13)
    kept = receipt(ffn.float(), moe.float(), 0, seed=1)
    assert kept.largest < 1e-5
    assert kept.scale == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("to", METHODS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_converted_layer_is_the_mixture_that_a_loop_computes(to, renormalize):
    ffn = dense()
    options = {"top_k": 2, "renormalize": renormalize, "router_std": 0.3, "noise": 0.1}
    moe = convert_ffn(ffn, to, seed=3, **options)
    x = torch.randn(1, 9, D, dtype=torch.float64)
    torch.testing.assert_close(moe(x).y[0], mixture_loop(x[0], moe), rtol=1e-10, atol=1e-11)
    noted, difference = receipt(ffn, moe, 0, seed=1), moe(x).y - ffn(x).y
    assert noted.largest >= noted.mean > 0.01  # it says so where much has changed
    assert difference.abs().max() > 0.01


def test_a_receipt_is_the_largest_and_the_mean_relative_difference():
    ffn = dense()
    moe = convert_ffn(ffn, "drop", n_experts=2, fraction=0.5)
    x = torch.randn(1, 256, D, generator=generator(5)).double()
    before, after = ffn(x).y[0], moe(x).y[0]
    relative = (after - before).norm(dim=-1) / before.norm(dim=-1)
    found = receipt(ffn, moe, 7, seed=5)
    assert found.layer == 7
    assert found.largest == pytest.approx(relative.max().item(), rel=1e-9)
    assert found.mean == pytest.approx(relative.mean().item(), rel=1e-9)
    least_squares = torch.linalg.lstsq(before.flatten()[:, None], after.flatten()[:, None])
    assert found.scale == pytest.approx(least_squares.solution.item(), rel=1e-9)


@pytest.mark.parametrize("case", ["upcycle", "granular"])
def test_without_renormalisation_the_scale_is_that_of_an_even_router(case):
    """A router with no preference gives 1 / E each; E / K (or R G^2 / K) brings the output back."""
    ffn = dense()
    options = {"n_experts": 6} if case == "upcycle" else {"n_copies": 3, "n_slices": 2}
    moe = convert_ffn(ffn, case, top_k=4, renormalize=False, router_std=1e-12, **options)
    x = torch.randn(1, 20, D, dtype=torch.float64)
    torch.testing.assert_close(moe(x).y, ffn(x).y, rtol=1e-9, atol=1e-10)
    uneven = convert_ffn(ffn, case, top_k=4, renormalize=False, router_std=0.2, **options)
    assert receipt(ffn, uneven, 0, seed=0).largest > 0.1


@pytest.mark.parametrize(("copies", "slices"), [*itertools.product((2, 3, 5), (2, 3, 4))])
def test_granular_routing_chooses_whole_copies(copies, slices):
    """Near ties within a copy are rounding's to order; the set of the chosen is not."""
    ffn = dense(dtype=torch.float32)
    for times in range(1, copies + 1):
        moe = convert_ffn(
            ffn, "granular", n_copies=copies, n_slices=slices, top_k=times * slices
        ).eval()
        for rows in ROWS:
            routed = moe.router(torch.randn(rows, D)).experts.sort(-1).values
            of_copy = (routed // slices).view(rows, times, slices)
            assert torch.equal(of_copy, of_copy[..., :1].expand_as(of_copy))
            slice_of = (routed % slices).view(rows, times, slices)
            assert torch.equal(slice_of, torch.arange(slices).expand_as(slice_of))


def test_expert_e_of_a_granular_conversion_is_slice_e_mod_g():
    weights = dense_of(dense())
    stacks, part = granular_upcycle(weights, 2, 3, scale=3.0), WIDTH // 3
    for e in range(6):
        rows = slice(e % 3 * part, (e % 3 + 1) * part)
        assert torch.equal(stacks.gate_up[e], torch.cat((weights.gate[rows], weights.up[rows])))
        assert torch.equal(stacks.down[e], weights.down[:, rows] * 3)


def test_mixing_scales_are_those_of_the_papers():
    assert mixing_scale(8, 1, 2, renormalize=True) == 1  # 2212.05055
    assert mixing_scale(8, 1, 2, renormalize=False) == 8 / 2
    assert mixing_scale(4, 3, 6, renormalize=True) == 3  # 2410.07524
    assert mixing_scale(4, 3, 6, renormalize=False) == 4 * 3 * 3 / 6
    # FactorLLM: weights that sum to one, of 1 / K each, times N, is N / K on weights of 1
    assert mixing_scale(1, 5, 2, renormalize=True) / 2 == 5 / 2


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
@pytest.mark.parametrize("renormalize", [True, False])
def test_factor_llm_with_all_experts_is_the_dense_ffn(split, renormalize):
    """Scale N / K = 1; even weights."""
    ffn = dense()
    moe = convert_ffn(
        ffn, "factor_llm", n_experts=4, top_k=4, split=split, renormalize=renormalize,
        router_std=1e-12,
    )  # fmt: skip
    for rows in ROWS:
        x = torch.randn(1, rows, D, dtype=torch.float64)
        torch.testing.assert_close(moe(x).y, ffn(x).y, rtol=1e-9, atol=1e-10)


def test_factor_llm_counts_k_of_n_experts_n_over_k_times():
    """N = 4 of which K = 3: the published integer division would count them once."""
    ffn = dense()
    moe = convert_ffn(ffn, "factor_llm", n_experts=4, top_k=3, router_std=1e-12)
    x = torch.randn(12, D, dtype=torch.float64)
    outputs = expert_outputs(x, split_neurons(dense_of(ffn), torch.arange(WIDTH).view(4, 6)))
    chosen = moe.router(x).experts
    hard = torch.zeros(12, 4, dtype=x.dtype).scatter_(1, chosen, 1.0)
    expected = 4 / 3 * (outputs * hard[..., None]).sum(1)
    torch.testing.assert_close(moe(x[None]).y[0], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("to", METHODS)
def test_permuting_neurons_or_experts_changes_nothing(to):
    ffn, order = dense(), torch.randperm(WIDTH, generator=generator())
    permuted = dense()
    with torch.no_grad():
        gate, up, down = dense_of(ffn)
        permuted.gate_up.weight.copy_(torch.cat((gate[order], up[order])))
        permuted.down.weight.copy_(down[:, order])
    x = torch.randn(1, 6, D, dtype=torch.float64)
    torch.testing.assert_close(permuted(x).y, ffn(x).y)
    # slices of other neurons are other experts: only where all run does that not show
    options = {} if to == "upcycle" else {"top_k": 8 if to == "granular" else 4}
    if to == "drop":
        options |= {"fraction": 0.0}
    if to == "factor_llm":
        options |= {"router_std": 1e-12}
    converted = [convert_ffn(each, to, **options)(x).y for each in (ffn, permuted)]
    torch.testing.assert_close(*converted, rtol=1e-9, atol=1e-10)

    moe = convert_ffn(ffn, to, router_std=0.2)
    y = moe(x).y
    relabel = torch.randperm(moe.config.n_experts, generator=generator(1))
    with torch.no_grad():
        for weight in (moe.gate_up.weight, moe.down.weight, moe.router.weight):
            weight.copy_(weight[relabel].clone())
    torch.testing.assert_close(moe(x).y, y, rtol=1e-9, atol=1e-10)


def test_drop_upcycling_draws_a_share_of_whole_neurons_anew():
    weights = DenseFFN(*(torch.randn(200, 40) * 0.5 + 3 for _ in range(2)), torch.randn(40, 200))
    stacks = drop_upcycle(weights, 3, 0.5, generator())
    plain = sparse_upcycle(weights, 3)
    changed = []
    for e in range(3):
        gate, up = (stacks.gate_up[e] != plain.gate_up[e]).chunk(2)
        down = (stacks.down[e] != plain.down[e]).t()
        dropped = gate.any(-1)
        assert dropped.sum() == 100
        for matrix in (gate, up, down):  # all of a neuron or nothing, the same in each matrix
            assert torch.equal(matrix.float().mean(-1) > 0.99, dropped)
            assert not matrix[~dropped].any()
        changed.append(dropped)
        for new, old in (
            (stacks.gate_up[e][:200][dropped], weights.gate[dropped]),
            (stacks.gate_up[e][200:][dropped], weights.up[dropped]),
            (stacks.down[e].t()[dropped], weights.down.t()[dropped]),
        ):
            assert new.mean() == pytest.approx(old.mean().item(), abs=0.1)  # 4000 numbers
            assert new.std() == pytest.approx(old.std().item(), rel=0.1)
    assert not torch.equal(changed[0], changed[1])  # each expert its own


def test_noise_is_relative_and_tells_copies_apart():
    plain = sparse_upcycle(dense_of(dense(d_ff=400)), 2)
    assert with_noise(plain, 0.0, generator()) is plain
    noisy = with_noise(plain, 0.05, generator())
    for new, old in zip(noisy, plain, strict=True):
        share = (new - old).square().mean().sqrt() / old.square().mean().sqrt()
        assert share == pytest.approx(0.05, rel=0.05)
        assert not torch.equal(new[0], new[1])


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
    logits, labels = torch.randn(6, 4) * 20, F.one_hot(torch.arange(6) % 4, 4).float()
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


def tiny_model(**options):
    config = {"vocab_size": 40, "d_model": D, "n_layers": 3, "n_heads": 2, "max_seq_len": 16}
    return zoo.build(config | {"ffn": {"name": "swiglu", "d_ff": WIDTH}} | options)


@pytest.mark.parametrize("to", ["upcycle", "granular"])
def test_a_converted_model_gives_the_logits_of_the_dense_one(to):
    model, tokens = tiny_model(), torch.randint(40, (2, 9))
    made = convert(model, to)
    assert [each.layer for each in made.receipts] == [0, 1, 2]
    assert max(each.largest for each in made.receipts) < 1e-5
    torch.testing.assert_close(made.model(tokens).logits, model(tokens).logits)
    routers = [block.ffn.router.weight for block in made.model.blocks]
    assert not torch.equal(routers[0], routers[1])


def test_chosen_layers_are_converted_and_the_others_left():
    plan = ["mlp", {"name": "swiglu", "preset": "geglu", "d_ff": WIDTH},
            {"name": "moe", "d_expert": 8, "router": "llama4"}]  # fmt: skip
    model, tokens = tiny_model(ffn=plan), torch.randint(40, (1, 5))
    made = convert(model, "upcycle", layers="1", n_experts=3).model
    assert [type(block.ffn).__name__ for block in made.blocks] == ["MLP", "MoE", "MoE"]
    assert made.config.ffn[1]["activation"] == "gelu"
    torch.testing.assert_close(made(tokens).logits, model(tokens).logits)
    again = zoo.build({"model": {**vars(made.config)}})  # the config alone builds the same
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(tokens).logits, made(tokens).logits)
    assert made.config.ffn[2] == plan[2]
    with refused("layer 0 is a MLP, only swiglu layers are converted"):
        convert(model, "upcycle")
    with refused("names none of 3 layers"):
        convert(model, "upcycle", layers="3:")
    behind = tiny_model(ffn=["swiglu", "swiglu", {"name": "moe_plus_plus", "d_expert": 8}])
    with refused("a later layer's router reads the logits"):
        convert(behind, "upcycle", layers="first")


@pytest.mark.parametrize("to", METHODS)
def test_the_same_seed_gives_the_same_model_and_another_another(to):
    model = tiny_model()
    one, same, other = (convert(model, to, seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["blocks.0.ffn.router.weight"], other["blocks.0.ffn.router.weight"])


def test_a_bfloat16_layer_keeps_its_dtype_and_its_router_float32():
    moe = convert_ffn(dense(dtype=torch.bfloat16), "granular")
    assert moe.gate_up.weight.dtype == moe.down.weight.dtype == torch.bfloat16
    assert moe.router.weight.dtype == torch.float32
    x = torch.randn(1, 5, D, dtype=torch.bfloat16)
    assert moe(x).y.dtype == torch.bfloat16


@pytest.mark.parametrize("to", METHODS)
def test_every_weight_of_a_converted_layer_learns(to):
    moe = convert_ffn(dense(dtype=torch.float32), to, top_k=2, router_std=0.02)
    out = moe(torch.randn(1, 200, D))
    (out.y.square().mean() + out.losses["balance"]).backward()
    for name, weight in moe.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_wrong_options_are_one_line():
    ffn = dense()
    with refused("unknown conversion 'upcicle'. Did you mean 'upcycle'?"):
        convert_ffn(ffn, "upcicle")
    with refused("unknown option of drop 'fractions'. Did you mean 'fraction'?"):
        convert_ffn(ffn, "drop", fractions=0.2)
    with refused("fraction must be in [0, 1], got 1.5"):
        convert_ffn(ffn, "drop", fraction=1.5)
    with refused("d_ff=24 does not split into 5 equal parts"):
        convert_ffn(ffn, "granular", n_slices=5)
    with refused("d_ff=24 does not split into 7 equal parts"):
        convert_ffn(ffn, "factor_llm", n_experts=7)
    with refused("unknown split of factor_llm 'kmean'. Did you mean 'kmeans'?"):
        convert_ffn(ffn, "factor_llm", split="kmean")
    with refused("top_k must be at most n_experts=2, got 3"):
        convert_ffn(ffn, "upcycle", n_experts=2, top_k=3)
    with refused("set renormalize=False or top_k >= 2"):
        convert_ffn(ffn, "upcycle", top_k=1)
    with refused("top_k must be positive"):
        convert_ffn(ffn, "factor_llm", top_k=0)
    with refused("noise must not be negative"):
        convert_ffn(ffn, "upcycle", noise=-1.0)
    with refused("only swiglu layers are converted, got a MLP"):
        convert_ffn(zoo.create("mlp", d_model=D), "upcycle")
    with refused("a gated FFN has gate [F, D], up [F, D], down [D, F]"):
        sparse_upcycle(DenseFFN(*(torch.zeros(4, 3),) * 3), 2)
    with refused("groups must name neurons below d_ff=24"):
        split_neurons(dense_of(ffn), torch.tensor([[24]]))
    with refused("top_k must be in [1, 3], got 4"):
        pa_labels(torch.zeros(2, 3, 4), torch.zeros(2, 4), 4)
