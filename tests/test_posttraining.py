"""Post-training quantisation against brute force, closed forms and exact re-parametrisations."""

import itertools
import math

import pytest
import torch
from recipe_toys import refused
from torch.testing import assert_close

from layers.posttraining import (
    SearchOptions,
    SmallFloat,
    channel_shift,
    fold,
    formats,
    search,
)
from layers.posttraining.candidates import GAMMAS, SCALINGS, MatrixSearch
from layers.precision.grids import E2M1, to_grid

F64 = {"dtype": torch.float64}
E1M2, E2M1_, E3M0 = SmallFloat(4, 2), SmallFloat(4, 1), SmallFloat(4, 0)
EVERY = [fmt for bits in range(3, 9) for fmt in formats(bits)]


def values(fmt, bias):
    """Every value of a format, from the fields and a bias, as precision.md section 1 has them."""
    m, found = fmt.mantissa_bits, {0.0}
    for exponent, mantissa in itertools.product(range(2**fmt.exponent_bits), range(2**m)):
        size = 2.0 ** (max(exponent, 1) - bias) * ((exponent > 0) + mantissa / 2**m)
        found |= {size, -size}
    return torch.tensor(sorted(found), **F64)


def spread_layer(n_rows=64, n_in=96, n_out=48):
    """A layer whose input channels differ by orders of magnitude, as in a language model."""
    spread = torch.exp(1.2 * torch.randn(n_in, **F64))
    return torch.randn(n_out, n_in, **F64), torch.randn(n_rows, n_in, **F64) * spread


def relative(x, w, x_hat, w_hat):
    """||Y - Y^|| / ||Y||."""
    return ((x @ w.T - x_hat @ w_hat.T).norm() / (x @ w.T).norm()).item()


# The quantiser


@pytest.mark.parametrize("fmt", EVERY, ids=lambda f: f.name)
def test_a_format_never_has_more_levels_than_its_codes(fmt):
    """The released code's integer powers gave E2M1 a seventeenth level."""
    bias = torch.tensor(fmt.standard_bias + 0.37, **F64)
    top = float(fmt.largest(bias))
    own = values(fmt, fmt.standard_bias) * fmt.scale_of(bias)
    small = top * torch.exp2(-torch.rand(5000, **F64) * 2**fmt.exponent_bits)
    x = torch.cat([own, torch.linspace(-1.5 * top, 1.5 * top, 5001, **F64), small, -small])
    assert torch.equal(fmt.quantize(x, bias).unique(), own.unique())
    assert own.unique().numel() == 2**fmt.bits - 1
    assert own.max().item() == pytest.approx(top, rel=1e-12)


@pytest.mark.parametrize("fmt", formats(4) + formats(6), ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_rounds_to_the_nearest_value(fmt, dtype):
    bias = torch.tensor(1.0 if fmt.exponent_bits < 4 else 7.0, dtype=dtype)
    grid = values(fmt, bias.item()).to(dtype)
    x = torch.randn(4000, dtype=dtype) * grid.max() / 2
    expected = (x[:, None] - grid).abs().amin(1)
    assert torch.equal((x - fmt.quantize(x, bias)).abs(), expected)
    middles = (grid[1:] + grid[:-1]) / 2
    code = (torch.searchsorted(grid, fmt.quantize(middles, bias)) - len(grid) // 2).abs()
    if fmt.mantissa_bits:  # ties go to the even code
        assert (code % 2 == 0).all()
    else:  # between powers of two to the larger one, which is two steps
        low = torch.arange(len(grid) // 2)
        assert torch.equal(code[len(grid) // 2 :], torch.where(low == 0, 0, low + 1))


def test_e2m1_is_the_policy_layers_grid_and_scales_are_biases():
    x = torch.randn(5000) * 3
    one = torch.ones(())
    assert torch.equal(E2M1_.round_to(x, one), to_grid(x, E2M1) + 0.0)
    assert (E2M1_.standard_largest, E1M2.standard_largest, E3M0.standard_largest) == (6, 1.75, 16)
    bias = torch.tensor(2.3, **F64)
    assert_close(E2M1_.bias_of(E2M1_.largest(bias)), bias)
    assert_close(E2M1_.largest(bias), 6 * 2 ** (1 - bias))
    assert E2M1_.name == "fp4_e2m1"


def test_zero_has_no_bias_but_stays_zero():
    bias = E2M1_.bias_of(torch.zeros(()))
    assert bias == math.inf
    assert torch.equal(E2M1_.quantize(torch.zeros(3), bias), torch.zeros(3))


# The search


@pytest.mark.parametrize("scaling", SCALINGS)
def test_search_finds_the_optimum_of_an_exhaustive_loop(scaling):
    w, x = torch.randn(3, 8, **F64), torch.randn(12, 8, **F64)
    layer = MatrixSearch(w, x, SearchOptions(scaling=scaling, shift="none"))
    x_start = E2M1_.quantize(x, E2M1_.bias_of(x.abs().max()))
    y = x @ w.T

    def biases(fmt, largest):
        for gamma in torch.linspace(*GAMMAS, **F64):
            of_max = fmt.bias_of(largest * (gamma if scaling == "max" else 1))
            yield of_max * (gamma if scaling == "release" else 1)

    layer.search_weight_bias()
    for i, fmt in enumerate(formats(4)):
        for n in range(3):
            errors = {
                bias.item(): (x_start @ fmt.quantize(w[n], bias) - y[:, n]).square().sum().item()
                for bias in biases(fmt, w[n].abs().max())
            }
            found = layer.weight_bias[i][n]
            assert errors[min(errors, key=lambda b: abs(b - found.item()))] == pytest.approx(
                min(errors.values()), rel=1e-9
            )
    layer.search_input_bias()
    w_hat = E2M1_.quantize(w, layer.weight_bias[1][:, None])
    for i, fmt in enumerate(formats(4)):
        errors = [
            ((fmt.quantize(x, bias) @ w_hat.T - y).square().sum().item(), bias.item())
            for bias in biases(fmt, x.abs().max())
        ]
        assert layer.input_bias[i].item() == pytest.approx(min(errors)[1])
        assert layer.input_format_errors()[i].item() == pytest.approx(min(errors)[0])


def test_formats_are_the_best_of_all_and_more_rounds_are_never_worse():
    w, x = spread_layer()
    once = search(w[None], [x], SearchOptions(rounds=1))
    errors = [search(w[None], [x], SearchOptions(rounds=r)).error for r in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    layer = MatrixSearch(w, x, SearchOptions())
    layer.search_weight_bias()
    layer.search_input_bias()
    layer.chosen_weight = int(layer.weight_format_errors().argmin())
    layer.chosen_input = int(layer.input_format_errors().argmin())
    assert once.error == pytest.approx(float(layer.error() / layer.y.square().sum()))
    assert once.weight_format == formats(4)[layer.chosen_weight]


def test_the_order_of_the_paper_holds_where_channels_spread():
    """min-max E1M2 > min-max E2M1 > searched > searched and shifted (precision.md 13.1)."""
    w, x = spread_layer()

    def min_max(fmt):
        rows = fmt.bias_of(w.abs().amax(1, keepdim=True))
        return relative(x, w, fmt.quantize(x, fmt.bias_of(x.abs().max())), fmt.quantize(w, rows))

    searched = [
        math.sqrt(search(w[None], [x], SearchOptions(shift=shift)).error)
        for shift in ("none", "channel")
    ]
    errors = [min_max(E1M2), min_max(E2M1_), *searched]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.7 * errors[-2]


def test_pre_shift_is_exactly_a_reparametrisation():
    w, x = spread_layer()
    found = search(w[None], [x], SearchOptions())
    fmt, rho, shift = found.input_format, found.input_bias, found.shift
    assert fmt is not None
    assert shift.unique().numel() > 1
    assert torch.equal(shift, channel_shift(fmt, x.abs().amax(0)[None], rho))
    per_channel = fmt.quantize(x, rho[0] + shift[0])  # a bias for each channel
    one_scale = fmt.quantize(x * torch.exp2(shift[0]), rho[0])  # as at run time
    assert torch.equal(per_channel * torch.exp2(shift[0]), one_scale)
    folded = fold(found.weight, shift)[0]
    y = (per_channel[:, None] * found.weight[0]).sum(-1)
    assert torch.equal((one_scale[:, None] * folded).sum(-1), y)
    assert relative(x, w, one_scale, folded) ** 2 == pytest.approx(found.error)


def test_experts_share_formats_and_nothing_else():
    stack = torch.randn(3, 6, 16, **F64)
    rows = [torch.randn(t, 16, **F64) * scale for t, scale in ((5, 0.1), (20, 1.0), (9, 30.0))]
    both = {"weight_formats": (E2M1_,), "input_formats": (E2M1_,)}
    found = search(stack, rows, SearchOptions(**both))
    for e, (w, x) in enumerate(zip(stack, rows, strict=True)):
        alone = search(w[None], [x], SearchOptions(**both))
        assert torch.equal(found.weight[e], alone.weight[0])
        assert torch.equal(found.input_bias[e], alone.input_bias[0])
        assert torch.equal(found.shift[e], alone.shift[0])
    free = search(stack, rows, SearchOptions())
    assert free.weight.shape == stack.shape
    assert free.error <= found.error * 1.05


def test_zero_rows_channels_and_inputs_give_zeros_not_nan():
    w, x = torch.randn(1, 4, 8), torch.randn(6, 8)
    w[0, 1], x[:, 2] = 0, 0
    found = search(w, [x], SearchOptions())
    assert found.weight.isfinite().all()
    assert (found.weight[0, 1] == 0).all()
    assert found.shift.isfinite().all()
    blank = search(w, [torch.zeros(6, 8)], SearchOptions())
    assert blank.weight.isfinite().all()
    assert blank.shift.isfinite().all()
    assert blank.error == 0


def test_weights_alone():
    w, x = spread_layer()
    found = search(w[None], [x], SearchOptions(input_formats=()))
    assert found.input_format is None
    assert (found.shift == 0).all()
    assert found.error < search(w[None], [x], SearchOptions()).error


def test_wrong_arguments_are_one_line():
    w, x = torch.randn(1, 4, 8), torch.randn(6, 8)
    with refused("mantissa_bits must be 0 to bits - 2 = 2, got 3"):
        SmallFloat(4, 3)
    with refused("bits must be 3 to 8, got 2"):
        SmallFloat(2, 0)
    with refused("unknown scaling of candidates 'maxx'. Did you mean 'max'?"):
        SearchOptions(scaling="maxx")
    with refused("unknown shift"):
        SearchOptions(shift="tensor")
    with refused("weight_formats is empty"):
        SearchOptions(weight_formats=())
    with refused("rows for each of E"):
        search(w, [], SearchOptions())
    with refused("rows of matrix 0 must be [T >= 1, 8], got [0, 8]"):
        search(w, [x[:0]], SearchOptions())
    with refused("not finite"):
        search(w, [x / 0], SearchOptions())
