"""GPTQ, scales that FP8 can shift by, low-rank compensation: against closed forms."""

import pytest
import torch
from recipe_toys import refused
from torch.testing import assert_close

from layers.posttraining import (
    SmallFloat,
    fit_scales,
    gptq,
    group_fit,
    hessian,
    low_rank,
    round_groups,
)

F64 = {"dtype": torch.float64}
E2M1 = SmallFloat(4, 1)


def relative(x, w, w_hat):
    """||Y - Y^|| / ||Y||."""
    return ((x @ (w - w_hat).T).norm() / (x @ w.T).norm()).item()


@pytest.mark.parametrize("constraint", ["free", "m1", "m2", "m2_up"])
def test_gptq_loses_less_than_nearest(constraint):
    x = torch.randn(200, 24, **F64) @ torch.randn(24, 24, **F64)  # correlated inputs
    w = torch.randn(10, 24, **F64)
    fit = group_fit(E2M1, constraint)
    nearest = round_groups(w, fit, 8)
    compensated = gptq(w, hessian(x), fit, group=8)
    assert relative(x, w, compensated) < 0.9 * relative(x, w, nearest)


def test_gptq_solves_each_step_as_least_squares_does():
    """Brute force: after a column is fixed, the rest move to where the output error is least."""
    x, w = torch.randn(50, 5, **F64), torch.randn(2, 5, **F64)
    damping = 1e-9
    fit = group_fit(E2M1)
    scale = fit_scales(w, E2M1)
    left, target = w.clone(), x @ w.T
    expected = torch.zeros_like(w)
    for j in range(5):
        expected[:, j : j + 1] = E2M1.round_to(left[:, j : j + 1], scale)
        missing = target - x[:, : j + 1] @ expected[:, : j + 1].T
        if j < 4:
            left[:, j + 1 :] = torch.linalg.lstsq(x[:, j + 1 :], missing).solution.T
    assert_close(gptq(w, hessian(x), fit, group=5, damping=damping), expected)


def test_gptq_without_correlation_rounds_to_nearest():
    w = torch.randn(6, 20)
    fit = group_fit(E2M1)
    alone = gptq(w, hessian(torch.zeros(0, 20)), fit, group=8)
    assert torch.equal(alone, round_groups(w, fit, 8))
    x = torch.randn(40, 20)
    x[:, 3] = 0
    assert gptq(w, hessian(x), fit, group=8).isfinite().all()


def test_scales_are_powers_of_two_or_have_such_ratios():
    w = torch.randn(9, 16) * torch.exp(2 * torch.randn(9, 1))
    w[4] = 0
    free = fit_scales(w, E2M1)
    m1, m2, up = (fit_scales(w, E2M1, c, rows=9) for c in ("m1", "m2", "m2_up"))
    assert (torch.frexp(m1)[0] == 0.5).all()
    real = torch.arange(9) != 4
    assert ((m1 >= free) & (m1 < 2 * free))[real].all()
    for scales in (m2, up):
        assert (torch.frexp(scales.max() / scales)[0] == 0.5).all()
    assert ((m2 <= free * (1 + 1e-6)) & (m2 > free / 2))[real].all()
    assert ((up >= free * (1 - 1e-6)) & (up < 2 * free))[real].all()
    parts = fit_scales(w, E2M1, "m2", rows=3)
    assert_close(parts.view(3, 3).amax(1), free.view(3, 3).amax(1))
    assert (fit_scales(torch.zeros(2, 4), E2M1, "m2") == 1).all()


def test_m1_keeps_an_exact_power_of_two():
    w = torch.tensor([[6.0, 1.0], [12.0, 1.0], [12.1, 1.0]])
    assert fit_scales(w, E2M1, "m1").flatten().tolist() == [1, 2, 4]


def test_lorc_leaves_exactly_the_tail_of_the_singular_values():
    error = torch.randn(3, 10, 14, **F64)
    for rank in (1, 4, 10, 99):
        a, b = low_rank(error, rank)
        assert a.shape == (3, min(rank, 10), 14)
        tail = torch.linalg.svdvals(error)[:, rank:].square().sum(1)
        assert_close((error - b @ a).square().sum((1, 2)), tail)
        assert_close(a.square().sum((1, 2)), b.square().sum((1, 2)))  # the root on either side


def test_wrong_arguments_are_one_line():
    w = torch.randn(1, 4, 8)
    with refused("unknown constraint on scales 'm3'"):
        fit_scales(w[0], E2M1, "m3")
    with refused("hess must be [8, 8], got [4, 4]"):
        gptq(w[0], torch.eye(4), group_fit(E2M1), group=4)
    with refused("damping must be positive"):
        gptq(w[0], torch.eye(8), group_fit(E2M1), group=4, damping=0)
    with refused("rank must be positive"):
        low_rank(w, 0)
