"""What finds slots: product keys, Tucker keys, the k largest (memory.md 1, 5.3, 11)."""

import pytest
import torch
from torch.testing import assert_close

from layers.memory import ProductKeys, ProductKeysConfig, TuckerKeys, TuckerKeysConfig, native
from layers.memory.selection import pairs, product_top_k, top_ids
from layers.memory.tucker import leading_pair, rescore


def exhaustive(rows, cols, k):
    """The k best of all n^2 slots, of equals the lower slot."""
    sums = (rows[..., :, None] + cols[..., None, :]).flatten(-2)
    return torch.sort(sums, dim=-1, descending=True, stable=True).indices[..., :k]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (16, 3), (40, 16), (200, 32)])
@pytest.mark.parametrize("combine", ["pruned", "full"])
@pytest.mark.parametrize("values", ["ties", "gaps"])
def test_product_keys_find_the_best_of_all_slots(n, k, combine, values):
    """With ties (whole numbers, whose sums are exact) slot by slot: the lower slot of equals."""
    for scale in (2, 20):
        rows, cols = torch.randn(2, 3, 2000 // n, n).unbind(0)
        if values == "ties":
            rows, cols = (rows * scale).round(), (cols * scale).round()
        found, best = product_top_k(rows, cols, k, k, combine), exhaustive(rows, cols, k)
        sums = (rows[..., :, None] + cols[..., None, :]).flatten(-2)
        assert torch.equal(sums.gather(-1, found), sums.gather(-1, best))  # bit for bit
        if values == "ties":
            assert torch.equal(found, best)


@pytest.mark.parametrize(("n", "k", "sub_k"), [(1, 1, 1), (9, 9, 9), (70, 40, 12), (300, 128, 128)])
@pytest.mark.parametrize("values", ["ties", "gaps", "extremes"])
def test_native_and_torch_search_alike(monkeypatch, n, k, sub_k, values):
    if not native.KERNEL.wanted():
        pytest.skip("no compiler")
    rows, cols = torch.randn(2, 40, n).unbind(0)
    if values == "ties":
        rows, cols = rows.round(), (cols * 2).round() * -0.0
    elif values == "extremes":
        rows = torch.where(rows > 1, torch.inf, rows * 1e-42)
        cols = torch.where(cols < -1, -1e38, cols)
    found = [product_top_k(rows, cols, k, sub_k, how) for how in ("pruned", "full")]
    monkeypatch.setenv("MOE_ZOO_KERNELS", "torch")
    for how, one in zip(("pruned", "full"), found, strict=True):
        assert torch.equal(product_top_k(rows, cols, k, sub_k, how), one)


@pytest.mark.parametrize(("n", "k"), [(5, 2), (5, 5), (130, 33)])
def test_the_k_largest_come_best_first_and_of_equals_the_lower_index(n, k):
    scores = torch.randint(-3, 4, (200, n)).float()
    expected = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_ids(scores, k), expected)
    assert torch.equal(top_ids(torch.zeros(3, n), k), torch.arange(k).expand(3, -1))


@pytest.mark.parametrize(("k", "count"), [(16, 50), (32, 119), (64, 280), (128, 645)])
def test_pairs_that_can_be_among_the_best(k, count):
    i, j = pairs(k, k, "pruned")
    assert len(i) == len(j) == count
    assert len(pairs(k, k, "full")[0]) == k * k


@pytest.mark.parametrize("sub_k", [4, 6, 10])
def test_fewer_sub_keys_search_their_own_pairs_exactly(sub_k):
    rows, cols = torch.randn(2, 60, 12).unbind(0)
    found = product_top_k(rows, cols, 10, sub_k, "pruned")
    a, b = (torch.full_like(s, -torch.inf) for s in (rows, cols))
    for masked, s in ((a, rows), (b, cols)):
        ids = s.topk(sub_k).indices
        masked.scatter_(-1, ids, s.gather(-1, ids))
    assert torch.equal(found, exhaustive(a, b, 10))


def test_heads_have_keys_of_their_own_or_share_them():
    q = torch.randn(30, 6, 4)
    for shared in (False, True):
        keys = ProductKeys(ProductKeysConfig(heads=3, n_keys=9, d_key=4, top_k=5, shared=shared))
        hits = keys(q)
        assert hits.slots.shape == (30, 3, 5)
        assert hits.scores.shape == (30, 1, 3, 5)
        for h in range(3):
            k = keys.weight[0 if shared else h]
            sums = (q[:, 2 * h] @ k[0].T)[:, :, None] + (q[:, 2 * h + 1] @ k[1].T)[:, None]
            best, slots = sums.flatten(1).topk(5)
            assert torch.equal(hits.slots[:, h], slots)
            assert_close(hits.scores[:, 0, h], best)


def test_permuting_keys_renames_slots_and_nothing_else():
    keys = ProductKeys(ProductKeysConfig(heads=2, n_keys=9, d_key=4, top_k=5))
    q, order = torch.randn(30, 4, 4), torch.randperm(9)
    before = keys(q)
    with torch.no_grad():
        keys.weight[:, 0] = keys.weight[:, 0, order]
    after = keys(q)
    assert torch.equal(order[after.slots // 9] * 9 + after.slots % 9, before.slots)
    assert_close(after.scores, before.scores)


def tucker(**options):
    sizes = {"heads": 1, "n_keys": 24, "d_key": 8, "top_k": 12} | options
    return TuckerKeys(TuckerKeysConfig(**sizes))


def every_score(keys, q):
    """(G [T, H, n, n], u^T S_row, t^T S_col), exhaustively."""
    rows, cols = keys._projections(q)
    core = keys.cores.sum(0)
    u, t = leading_pair(core)
    s, z = torch.stack(tuple(rows), 2), torch.stack(tuple(cols), 2)  # [T, H, r, n]
    g = torch.einsum("thai,hab,thbj->thij", s, core, z)
    return g, torch.einsum("ha,thai->thi", u, s), torch.einsum("hb,thbj->thj", t, z)


def recall(found, g, k):
    best = g.flatten(2).topk(k).indices
    return (found[..., :, None] == best[..., None, :]).any(-1).float().mean().item()


def test_rank_one_finds_the_best_of_the_positive_quadrant_and_signed_of_all():
    q = torch.randn(100, 2, 8)
    keys = tucker(rank=1, n_cores=1)
    g, along_rows, along_cols = every_score(keys, q)
    positive = (along_rows > 0)[..., :, None] & (along_cols > 0)[..., None, :]
    best = g.masked_fill(~positive, -torch.inf).flatten(2).topk(12)
    enough = best.values.isfinite().all(-1)
    assert enough.sum() > 90
    assert torch.equal(keys(q).slots[enough], best.indices[enough])
    assert 0.35 < recall(keys(q).slots, g, 12) < 0.65  # the other half has two negative sides
    both = tucker(rank=1, n_cores=1, search="signed")
    both.load_state_dict(keys.state_dict())
    assert torch.equal(both(q).slots, g.flatten(2).topk(12).indices)


def test_recall_of_two_ranks():
    """On random data: about half of all, almost all where both projections are positive."""
    q = torch.randn(200, 4, 8)
    keys, both = tucker(n_keys=64), tucker(n_keys=64, search="signed")
    both.load_state_dict(keys.state_dict())
    g, along_rows, along_cols = every_score(keys, q)
    positive = (along_rows > 0)[..., :, None] & (along_cols > 0)[..., None, :]
    assert 0.4 < recall(keys(q).slots, g, 12) < 0.65
    assert recall(keys(q).slots, g.masked_fill(~positive, -torch.inf), 12) > 0.97
    assert recall(both(q).slots, g, 12) > 0.95


def test_signed_search_never_keeps_a_slot_twice():
    keys = tucker(n_keys=6, top_k=6, sub_top_k=5, search="signed")
    slots = keys(torch.randn(300, 4, 8)).slots.sort(-1).values
    assert (slots[..., 1:] != slots[..., :-1]).all()


def test_product_keys_are_a_special_case_of_the_core():
    """C = [[0, 1], [1, 0]], ranks (k, 1): s_row * 1 + 1 * s_col."""
    core = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    row, col, one = torch.randn(5, 1, 7), torch.randn(5, 1, 7), torch.ones(5, 1, 7)
    assert_close(rescore(core, [row, one], [col, one]), row + col)


def test_scores_by_core_add_up_to_what_was_chosen_by():
    keys, q = tucker(n_cores=3, heads=2), torch.randn(20, 4, 8)
    hits, (g, _, _) = keys(q), every_score(keys, q)
    assert_close(hits.scores.sum(1), g.flatten(2).gather(-1, hits.slots))
    assert (hits.scores.sum(1).diff(dim=-1) <= 1e-5).all()  # best first


@pytest.mark.parametrize("flips", [(1, 1), (-1, 1), (-1, -1)])
def test_the_sign_of_the_singular_vectors_is_not_the_librarys(monkeypatch, flips):
    core = torch.rand(2, 3, 3, dtype=torch.float64)
    core[1] -= 0.5
    svd, sign = torch.linalg.svd, torch.tensor(flips, dtype=torch.float64)[:, None, None]
    expected = leading_pair(core)
    monkeypatch.setattr(
        torch.linalg, "svd", lambda m: (svd(m)[0] * sign, svd(m)[1], svd(m)[2] * sign)
    )
    u, t = leading_pair(core)
    assert_close((u, t), expected, rtol=0, atol=0)
    assert (u.sum(-1) >= 0).all()
    lambdas = svd(core).S[:, :1]
    assert_close((core @ t[..., None])[..., 0], lambdas * u)
    even = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])  # u sums to 0: by its first entry
    assert leading_pair(even)[0][0, 0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_keys": 4, "top_k": 5}, "n_keys=4"),
        ({"n_keys": 9, "top_k": 5, "sub_top_k": 2}, "4 pairs, fewer than top_k=5"),
        ({"n_keys": 9, "top_k": 5, "combine": "some"}, "unknown combine"),
        ({"n_keys": 9, "top_k": 5, "norm": "batch"}, "unknown key_norm"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ProductKeysConfig(heads=2, d_key=4, **options)
