"""Statistical top-k against its formula, its gradient in closed form and what theory says of it."""

import math
from statistics import NormalDist

import pytest
import torch
from torch.testing import assert_close

from layers.quantiles import quantile, quantile_here, quantile_table, quantiles
from layers.statistical_topk import above, exact_topk, statistical_topk

NORMAL = NormalDist()
OPERATORS = {"statistical": statistical_topk, "exact": exact_topk}
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def by_formula(row, k):
    """(max(x - theta, 0), theta) of one float64 row, by torch's own std and autograd."""
    theta = row.mean() + row.std(correction=0) * NORMAL.inv_cdf(1 - k / len(row))
    return (row - theta).clamp_min(0), theta


@pytest.mark.parametrize("share", [0.01, 0.08, 0.5, 0.8])
def test_is_the_formula_row_by_row_with_its_gradient(share):
    x = torch.randn(3, 5, 200, dtype=torch.float64).requires_grad_()
    probe = torch.randn_like(x)
    k = share * 200
    expected = torch.stack([by_formula(row, k)[0] for row in x.flatten(0, 1)]).view_as(x)
    (want,) = torch.autograd.grad((expected * probe).sum(), x)
    y = statistical_topk(x, k)
    (got,) = torch.autograd.grad((y * probe).sum(), x)
    assert_close(y, expected)
    assert_close(got, want)
    single = x.detach().float().requires_grad_()
    y = statistical_topk(single, k)
    (got,) = torch.autograd.grad((y * probe.float()).sum(), single)
    assert_close(y, expected.float(), atol=2e-6, rtol=0)
    assert_close(got, want.float(), atol=2e-6, rtol=0)


def test_gradient_is_the_closed_form_and_reaches_every_entry():
    x = torch.randn(40, dtype=torch.float64).requires_grad_()
    g = torch.randn(40, dtype=torch.float64)
    (got,) = torch.autograd.grad((statistical_topk(x, 6) * g).sum(), x)
    theta, z = by_formula(x.detach(), 6)[1], NORMAL.inv_cdf(1 - 6 / 40)
    active = (x > theta).double()
    s = (active * g).sum()
    spread = (x - x.mean()) / (40 * x.std(correction=0))
    assert_close(got, active * g - s / 40 - s * z * spread)
    assert (got != 0).all()
    (held,) = torch.autograd.grad((statistical_topk(x, 6, detach_threshold=True) * g).sum(), x)
    assert_close(held, active * g)


@each_operator
@pytest.mark.parametrize("huber", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(operator, huber, masked):
    x = torch.randn(3, 30, dtype=torch.float64).requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(3, 30) > 0.4
        mask[1, 4:] = False  # a row that stays whole
    assert torch.autograd.gradcheck(lambda x: operator(x, 5, huber=huber, mask=mask), x)


@each_operator
def test_detached_gradient_is_that_of_the_kept(operator):
    x = torch.randn(4, 50).requires_grad_()
    y = operator(x, 9, detach_threshold=True)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert_close(got, (y > 0).float())


@pytest.mark.parametrize("k", [5, 25, 40])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_deviation_gives_zeros_and_no_gradient(k, value, dtype):
    x = torch.full((2, 50), value, dtype=dtype, requires_grad=True)
    y = statistical_topk(x, k)
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert not x.grad.any()
    kept = statistical_topk(x.detach(), k, form="-inf", keep_argmax=True)
    assert_close(kept, x.detach())  # all are the largest


@pytest.mark.parametrize(("n", "sd"), [(1024, 5.51), (8192, 15.6)])
def test_counts_of_normal_rows_have_the_mean_and_deviation_of_theory(n, sd):
    rows, p = 600, 0.08
    z = quantile(p * n, n)
    theory = math.sqrt(n * (p * (1 - p) - NORMAL.pdf(z) ** 2 * (1 + z**2 / 2)))
    assert theory == pytest.approx(sd, rel=0.01)
    counts = (statistical_topk(torch.randn(rows, n), p * n) > 0).sum(-1).double()
    assert abs(counts.mean() - p * n) < 5 * theory / math.sqrt(rows) + 0.5
    assert abs(counts.std() / theory - 1) < 5 / math.sqrt(2 * rows)
    assert theory < 0.7 * math.sqrt(n * p * (1 - p))  # less than independent draws


def test_almost_the_entries_of_exact_top_k_and_its_shift():
    x = torch.randn(20, 8192)
    found, exact = statistical_topk(x, 655), exact_topk(x, 655)
    both = ((found > 0) & (exact > 0)).sum() / (exact > 0).sum()
    assert both > 0.97
    assert (exact > 0).sum(-1).eq(655).all()
    assert abs(found.sum() / exact.sum() - 1) < 0.02  # the same shift, so the same scale


def test_scales_with_its_input_and_ignores_a_shift():
    x = torch.randn(6, 300, dtype=torch.float64)
    assert_close(statistical_topk(3.7 * x - 11, 20), 3.7 * statistical_topk(x, 20))


@pytest.mark.parametrize("huber", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_single_row_without_gradients_is_the_row_of_many(huber, dtype):
    x = torch.randn(3, 300).to(dtype)
    with torch.no_grad():
        many = statistical_topk(x, 20, huber=huber)
        for row, y in zip(x, many, strict=True):
            got = statistical_topk(row.view(1, 1, 300), 20, huber=huber)
            assert got.dtype == dtype
            assert_close(got[0, 0], y)
        for flat in (0.0, 0.1, -3e4):
            assert not statistical_topk(torch.full((1, 50), flat), 7).any()
        assert statistical_topk(torch.full((1, 50), math.nan), 7).isnan().all()


@each_operator
def test_relabelling_entries_changes_nothing(operator):
    x, order = torch.randn(6, 300), torch.randperm(300)
    assert_close(operator(x[:, order], 20), operator(x, 20)[:, order])


def test_half_keeps_what_is_above_the_mean():
    x = torch.randn(6, 301)
    assert_close(statistical_topk(x, 150.5), (x - x.mean(-1, keepdim=True)).clamp_min(0))


@each_operator
@pytest.mark.parametrize("form", ["soft", "hard", "-inf"])
def test_all_of_a_row_is_the_row(operator, form):
    x = torch.randn(3, 20)
    assert operator(x, 20, form=form) is x
    assert operator(x, 21, form=form) is x


@each_operator
def test_forms_keep_the_same_entries(operator):
    x = torch.randn(6, 300)
    soft, hard, low = (operator(x, 20, form=form) for form in ("soft", "hard", "-inf"))
    kept = soft > 0
    assert 0 < kept.sum() < x.numel()
    assert_close(hard, torch.where(kept, x, 0))
    assert_close(low, torch.where(kept, x, -torch.inf))
    # a softmax ignores a shift
    shifted = torch.where(kept, soft, -torch.inf)
    assert_close(low.softmax(-1), shifted.softmax(-1))
    for form in ("hard", "-inf"):
        probe = x.clone().requires_grad_()
        torch.where(kept, operator(probe, 20, form=form), 0).sum().backward()
        assert_close(probe.grad, kept.float())


@each_operator
@pytest.mark.parametrize("form", ["soft", "hard", "-inf"])
def test_a_mask_of_ones_is_no_mask(operator, form):
    x = torch.randn(4, 60)
    got = operator(x, 7, form=form, mask=torch.ones(60, dtype=torch.bool))
    assert_close(got, operator(x, 7, form=form), atol=2e-6, rtol=0)


@each_operator
@pytest.mark.parametrize("form", ["soft", "hard", "-inf"])
def test_masked_rows_are_their_valid_entries_alone(operator, form):
    x = torch.randn(6, 40)
    mask = torch.rand(6, 40) > 0.3
    mask[0], mask[1] = False, torch.arange(40) < 5  # none, and no more than k
    other = torch.where(mask, x, torch.nan).requires_grad_()
    got = operator(other, 5, form=form, mask=mask)
    kept = torch.where(mask, got, 0)
    kept = torch.where(kept.isinf(), 0, kept)
    (grad,) = torch.autograd.grad(kept.sum(), other)
    assert grad.isfinite().all()
    assert not grad[~mask].any()
    fill = -torch.inf if form == "-inf" else 0.0
    for row, valid, y in zip(x, mask, got.detach(), strict=True):
        assert (y[~valid] == fill).all()
        assert_close(y[valid], operator(row[valid], 5, form=form), atol=2e-6, rtol=0)
    assert_close(got[1, :5], x[1, :5])  # rows of at most k entries stay whole


def test_a_table_holds_the_quantiles_of_every_length():
    table = quantile_table(16, 300)
    assert table.shape == (301,)
    assert table[:17].isneginf().all()
    for n in (17, 32, 200, 300):
        assert table[n].item() == pytest.approx(NORMAL.inv_cdf(1 - 16 / n), abs=1e-6)
    x, mask = torch.randn(4, 300), torch.rand(4, 300) > 0.5
    assert_close(
        statistical_topk(x, 16, mask=mask, table=table), statistical_topk(x, 16, mask=mask)
    )
    assert_close(statistical_topk(x, 16, table=table), statistical_topk(x, 16))
    known = {0.5: 0.0, 0.85: 1.036433, 0.92: 1.405072, 0.95: 1.644854, 0.99: 2.326348}
    for sparsity, z in known.items():
        assert quantile(100 * (1 - sparsity), 100) == pytest.approx(z, abs=1e-6)
    assert quantiles(8, torch.tensor([0, 8, 100])).tolist()[:2] == [-math.inf, -math.inf]


def test_a_bounded_row_keeps_its_largest_where_told():
    row = torch.linspace(-1, 1, 200)[None]  # the most is the mean and 1.73 deviations
    assert statistical_topk(row, 4, form="-inf").isneginf().all()
    kept = statistical_topk(row, 4, form="-inf", keep_argmax=True)
    assert kept.isfinite().sum() == 1
    assert kept[0, -1] == 1
    mask = torch.arange(200)[None] < 150
    kept = statistical_topk(row, 3, form="-inf", keep_argmax=True, mask=mask)
    assert kept.isfinite().nonzero().tolist() == [[0, 149]]


@pytest.mark.parametrize("dim", [0, 1, -2])
@each_operator
def test_any_dimension(operator, dim):
    x = torch.randn(12, 13, 14)
    mask = torch.rand_like(x) > 0.2
    for given in (None, mask):
        got = operator(x, 4, dim=dim, mask=given)
        moved = None if given is None else given.movedim(dim, -1)
        assert_close(got, operator(x.movedim(dim, -1), 4, mask=moved).movedim(-1, dim))


def test_a_mask_that_broadcasts():
    x = torch.randn(3, 4, 30)
    mask = torch.ones(30, 30, dtype=torch.bool).tril()[[5, 12, 20, 29]]
    expected = torch.stack([statistical_topk(part, 8, mask=mask) for part in x])
    assert_close(statistical_topk(x, 8, mask=mask), expected)
    assert_close(statistical_topk(x, 8, mask=mask, dim=2), expected)
    columns = statistical_topk(x, 2, mask=torch.ones(4, 1, dtype=torch.bool), dim=1)
    assert_close(columns, statistical_topk(x, 2, dim=1), atol=2e-6, rtol=0)


@each_operator
def test_smooth_form_converges_and_has_no_kink(operator):
    x = torch.randn(4, 400, dtype=torch.float64)
    soft = operator(x, 40)
    gaps = [(operator(x, 40, huber=delta) - soft).abs().max() for delta in (0.1, 0.01, 0.001)]
    assert gaps[0] <= 0.05 + 1e-12
    assert gaps[2] <= 5e-4 + 1e-12
    line = torch.linspace(-1, 1, 2001, dtype=torch.float64).requires_grad_()
    slopes = torch.autograd.grad(operator(line, 400, huber=0.2, detach_threshold=True).sum(), line)[
        0
    ]
    assert slopes.diff().abs().max() < 0.01  # steps of 0.001 in 0.2
    assert slopes[-1] == 1


def test_statistics_are_of_float32_in_a_half_precision_input():
    x = torch.randn(64, 8192) + 5
    low = x.bfloat16()
    y = statistical_topk(low, 655)
    assert y.dtype == torch.bfloat16
    assert_close(y, statistical_topk(low.float(), 655).bfloat16())
    assert abs((y > 0).sum(-1).float().mean() / 655 - 1) < 0.02
    far = (x + 500).bfloat16().float()  # rounding to steps of 4 leaves few levels, not wrong ones
    assert statistical_topk(far, 655).isfinite().all()


def test_z_as_a_tensor_of_each_row():
    x = torch.randn(3, 50).requires_grad_()
    z = torch.tensor([[-torch.inf], [0.0], [1.2]])
    y = above(x, z)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_close(y[0], x[0])
    assert_close(grad[0], torch.ones(50))
    for i in (1, 2):
        row = x[i].detach().clone().requires_grad_()
        alone = above(row, z[i].item())
        assert_close(y[i], alone)
        assert_close(grad[i], torch.autograd.grad(alone.sum(), row)[0])
    assert_close(above(x, z[2, 0]), above(x, z[2].item()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_length_known_to_the_compiler_has_its_quantile_as_a_number(dynamic):
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def run(x):
        z = quantile_here(8, x.shape[-1], x.device), quantile_here(70, x.shape[-1], x.device)
        return x * z[0] + z[1]

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (71, 100, 139, 100_000):
        expected = NORMAL.inv_cdf(1 - 8 / n) * torch.ones(2, n) + NORMAL.inv_cdf(1 - 70 / n)
        assert_close(compiled(torch.ones(2, n)), expected)
    assert len(graphs) == (1 if dynamic else 4)  # one for each length
    assert all(("special_ndtri" in " ".join(graph)) == dynamic for graph in graphs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_to_the_same_numbers(masked, backend):
    x = torch.randn(4, 128).requires_grad_()
    probe = torch.randn_like(x)
    mask = torch.rand(4, 128) > 0.2 if masked else None

    def run(x):
        soft = statistical_topk(x, 10, mask=mask)
        low = statistical_topk(x, 10, mask=mask, form="-inf", keep_argmax=True)
        return soft + low.softmax(-1)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    got = compiled(x)
    (got_grad,) = torch.autograd.grad((got * probe).sum(), x)
    want = run(x)
    (want_grad,) = torch.autograd.grad((want * probe).sum(), x)
    assert_close(got, want)
    assert_close(got_grad, want_grad)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0.5}, "k must be at least 1, got 0.5"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 4, "form": "sofd"}, "Did you mean 'soft'"),
        ({"k": 4, "huber": -1.0}, "huber must be at least 0"),
        ({"k": 4, "huber": 0.1, "form": "hard"}, "huber=0.1 smoothes the soft form"),
        ({"k": 4, "keep_argmax": True}, "keep_argmax is for"),
    ],
)
def test_says_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        statistical_topk(torch.randn(2, 20), **options)
