"""SPT's blocks against loops in float64: what a token runs, what learns, what stays frozen."""

import pytest
import torch
from conversion_toys import ROWS, WIDTH, D, dense, one_expert
from recipe_toys import refused

from layers.swiglu import GATES
from zoo.conversion import DenseFFN, LowRank, RoutedFFN, choose_blocks, dense_of, routed_ffn

BLOCKS, SIZE = 4, WIDTH // 4


def all_blocks(rows):
    return torch.stack([torch.randperm(BLOCKS) for _ in range(rows)])


def draw_low_rank(rank=3):
    """All factors away from zero."""
    shapes = [(rank, D), (WIDTH, rank)] * 2 + [(rank, WIDTH), (D, rank)]
    return LowRank(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_all_blocks_are_the_dense_ffn(activation):
    ffn = dense(activation)
    for rows in (0, *ROWS):
        x = torch.randn(rows, D, dtype=torch.float64)
        blocks = all_blocks(rows) if rows else torch.empty(0, BLOCKS, dtype=torch.int64)
        y = routed_ffn(x, dense_of(ffn), blocks, BLOCKS, activation=activation)
        torch.testing.assert_close(y, ffn(x[None]).y[0], rtol=1e-12, atol=1e-13)


def test_a_token_runs_its_blocks_alone():
    weights, x = dense_of(dense()), torch.randn(9, D, dtype=torch.float64)
    blocks = all_blocks(9)[:, :2]
    y = routed_ffn(x, weights, blocks, BLOCKS)
    for t in range(9):
        expected = torch.zeros(D, dtype=torch.float64)
        for b in blocks[t].tolist():
            part = slice(b * SIZE, (b + 1) * SIZE)
            expected += one_expert(
                x[t], weights.gate[part], weights.up[part], weights.down[:, part]
            )
        torch.testing.assert_close(y[t], expected, rtol=1e-12, atol=1e-13)


def test_low_rank_blocks_follow_the_published_formula():
    """c on the frozen products alone: gate, up and down each."""
    weights, low, x = dense_of(dense()), draw_low_rank(), torch.randn(6, D, dtype=torch.float64)
    blocks, c = all_blocks(6)[:, :2], torch.rand(6, 2, dtype=torch.float64) * 2
    y = routed_ffn(x, weights, blocks, BLOCKS, coefficients=c, low_rank=low)
    for t in range(6):
        expected = torch.zeros(D, dtype=torch.float64)
        for k, b in enumerate(blocks[t].tolist()):
            part = slice(b * SIZE, (b + 1) * SIZE)
            gate = c[t, k] * weights.gate[part] @ x[t] + low.gate_right[part] @ low.gate_left @ x[t]
            up = c[t, k] * weights.up[part] @ x[t] + low.up_right[part] @ low.up_left @ x[t]
            h = GATES["silu"](gate, up)
            expected += c[t, k] * weights.down[:, part] @ h
            expected += low.down_right @ low.down_left[:, part] @ h
        torch.testing.assert_close(y[t], expected, rtol=1e-10, atol=1e-11)


def test_gradients_are_right():
    weights, low = dense_of(dense()), draw_low_rank(1)
    x, blocks = torch.randn(3, D, dtype=torch.float64, requires_grad=True), all_blocks(3)[:, :2]
    c = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    given = [w.clone().requires_grad_() for w in (*weights, *low)]

    def run(x, c, *given):
        dense, low = DenseFFN(*given[:3]), LowRank(*given[3:])
        return routed_ffn(x, dense, blocks, BLOCKS, coefficients=c, low_rank=low)

    assert torch.autograd.gradcheck(run, (x, c, *given), fast_mode=True)


def test_blocks_are_the_largest_sigmoids_of_a_router_with_a_bias():
    x, weight = torch.randn(7, D), torch.randn(BLOCKS, D)
    bias = torch.tensor([0.0, 0.0, 50.0, -50.0])
    blocks, probs = choose_blocks(x, weight, bias, 2)
    expected = (x @ weight.t() + bias).sigmoid()
    torch.testing.assert_close(probs, expected.gather(1, blocks))
    assert (blocks[:, 0] == 2).all()
    assert not (blocks == 3).any()
    torch.testing.assert_close(probs.sum(-1), expected.topk(2).values.sum(-1))


def test_an_even_router_makes_the_low_rank_layer_the_dense_one():
    """Probability 1/2 gives c = 1, and right factors start at zero."""
    ffn = dense()
    routed = RoutedFFN(ffn, n_blocks=BLOCKS, top_k=BLOCKS, rank=4)
    torch.nn.init.zeros_(routed.router_weight)
    for rows in ROWS:
        x = torch.randn(1, rows, D, dtype=torch.float64)
        routed.low_rank.double()
        torch.testing.assert_close(routed(x).y, ffn(x).y, rtol=1e-6, atol=1e-7)


def test_a_dense_checkpoint_loads_unchanged_and_views_follow_it():
    ffn, other = dense(), dense()
    routed = RoutedFFN(ffn, n_blocks=BLOCKS, top_k=BLOCKS, weighting="none")
    found = routed.load_state_dict(other.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert sorted(found.missing_keys) == ["router_bias", "router_weight"]
    x = torch.randn(2, 5, D, dtype=torch.float64)
    torch.testing.assert_close(routed(x).y, other(x).y)


def test_half_of_four_blocks_is_what_runs_unless_told():
    routed = RoutedFFN(dense(dtype=torch.float32))
    assert (routed.n_blocks, routed.top_k) == (4, 2)


@pytest.mark.parametrize("weighting", ["none", "twice"])
@pytest.mark.parametrize("rank", [None, 2])
def test_what_learns(weighting, rank):
    """The published layer without coefficients leaves its router untaught; low rank, the base."""
    routed = RoutedFFN(dense(dtype=torch.float32), rank=rank, weighting=weighting)
    routed(torch.randn(2, 30, D)).y.square().mean().backward()
    learning = {
        name for name, w in routed.named_parameters() if w.grad is not None and w.grad.any()
    }
    router = {"router_weight", "router_bias"} if weighting == "twice" else set()
    # the left factors see a gradient once the right ones have left zero
    rest = {f"low_rank.{n}_right" for n in ("gate", "up", "down")}
    assert learning == router | (rest if rank else {"gate_up.weight", "down.weight"})
    if rank:
        assert not routed.gate_up.weight.requires_grad


def test_masked_tokens_give_zero_and_change_nothing():
    routed = RoutedFFN(dense(dtype=torch.float32), rank=2)
    x, mask = torch.randn(1, 6, D), torch.tensor([[True, True, False, True, False, True]])
    spoiled = x.masked_fill(~mask[..., None], torch.nan)
    y = routed(spoiled, mask=mask).y
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(y[mask], routed(x).y[mask])


def test_wrong_options_are_one_line():
    ffn = dense()
    with refused("d_ff=24 does not split into 5 equal parts"):
        RoutedFFN(ffn, n_blocks=5)
    with refused("top_k must be at most n_blocks=4, got 5"):
        RoutedFFN(ffn, top_k=5)
    with refused("unknown weighting 'twise'. Did you mean 'twice'?"):
        RoutedFFN(ffn, weighting="twise")
    with refused("rank must be positive"):
        RoutedFFN(ffn, rank=0)
    with refused("d_ff=24 does not split into 7 equal parts"):
        routed_ffn(torch.zeros(1, D), dense_of(ffn), torch.zeros(1, 1, dtype=torch.int64), 7)
