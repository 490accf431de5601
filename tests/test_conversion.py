"""Dense FFNs as mixtures: what must be exact is, against loops in float64."""

import itertools

import pytest
import torch
from conversion_toys import ROWS, WIDTH, D, dense, generator, mixture_loop, one_expert
from recipe_toys import refused

import zoo
from zoo.conversion import (
    METHODS,
    DenseFFN,
    convert_ffn,
    dense_of,
    drop_upcycle,
    granular_upcycle,
    mixing_scale,
    pa_labels,
    receipt,
    sparse_upcycle,
    split_neurons,
    with_noise,
)

MIXED = ("drop", "granular", "upcycle")  # by a softmax

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


@pytest.mark.parametrize("to", MIXED)
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


@pytest.mark.parametrize("to", METHODS)
def test_permuting_neurons_changes_nothing(to):
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
    if to == "spt":
        options |= {"weighting": "one"}
    if to == "versatile":
        options = {"path": "depth", "loops": "fixed"}
    converted = [convert_ffn(each, to, **options)(x).y for each in (ffn, permuted)]
    torch.testing.assert_close(*converted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("to", [*MIXED, "factor_llm"])
def test_relabelling_experts_changes_nothing(to):
    x = torch.randn(1, 6, D, dtype=torch.float64)
    moe = convert_ffn(dense(), to, router_std=0.2)
    y = moe(x).y
    relabel = torch.randperm(moe.config.n_experts, generator=generator(1))
    with torch.no_grad():
        for weight in (moe.experts.gate_up.weight, moe.experts.down.weight, moe.router.weight):
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


def test_a_bfloat16_layer_keeps_its_dtype_and_its_router_float32():
    moe = convert_ffn(dense(dtype=torch.bfloat16), "granular")
    assert moe.experts.gate_up.weight.dtype == moe.experts.down.weight.dtype == torch.bfloat16
    assert moe.router.weight.dtype == torch.float32
    x = torch.randn(1, 5, D, dtype=torch.bfloat16)
    assert moe(x).y.dtype == torch.bfloat16


@pytest.mark.parametrize("to", METHODS)
def test_every_weight_of_a_converted_layer_learns(to):
    """But SPT's frozen base, and its left factors, which wait for the right ones to leave zero."""
    router = {} if to == "spark" else {"router_std": 0.02}
    layer = convert_ffn(dense(dtype=torch.float32), to, top_k=2, **router)
    out = layer(torch.randn(1, 200, D))
    (out.y.square().mean() + sum((out.losses or {}).values())).backward()
    frozen = {"gate_up.weight", "down.weight"} if to == "spt" else set()
    assert {name for name, w in layer.named_parameters() if not w.requires_grad} == frozen
    for name, weight in layer.named_parameters():
        if name not in frozen:
            assert weight.grad is not None, name
            assert (weight.grad.abs().sum() > 0) == ("_left" not in name), name


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
