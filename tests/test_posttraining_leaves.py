"""Calibration, corrections, and what a method makes of one leaf."""

from copy import deepcopy

import pytest
import torch
from recipe_toys import refused

from layers.linear import ExpertLinear, Linear, ValueTable
from layers.posttraining.calibration import collect, share_rows
from layers.posttraining.correction import Correction
from layers.posttraining.methods import METHODS, method_of
from layers.posttraining.options import LlmFp4, Rtn, ZeroQuantFp
from layers.posttraining.outcome import (
    is_table,
    output_error,
    policy_of_outcomes,
    put,
    weight_of,
)
from layers.posttraining.search import search
from layers.precision import Leaf, LeafPrecision, PrecisionPolicy, fake_quantize


def test_collect_keeps_rows_of_each_matrix_evenly_and_no_more_than_asked():
    dense, experts = Linear(4, 3, role="ffn"), ExpertLinear(3, 4, 2, role="expert")
    table = ValueTable(6, 4, role="memory_values")
    counts = torch.tensor([5, 0, 2])
    batches = [torch.randn(7, 4) for _ in range(3)]

    def forward(x):
        dense(x[None])
        experts(x, counts)
        table(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))

    found = collect(forward, batches, {"d": dense, "e": experts, "t": table}, rows=8)
    assert [len(x) for x in found["d"]] == [8]
    assert [len(x) for x in found["e"]] == [8, 0, 6]
    assert [len(x) for x in found["t"]] == [0]
    assert torch.equal(found["d"][0][:3], batches[0][[1, 3, 5]])  # of 7, 3 evenly
    assert torch.equal(found["e"][2][2:4], batches[1][5:])
    assert not dense._forward_pre_hooks
    shared = share_rows(found["e"])
    assert torch.equal(shared[1], torch.cat(found["e"]))
    with refused("no calibration batch reached this layer"):
        share_rows([torch.zeros(0, 4)])


def test_corrections_of_experts_are_those_of_each():
    shift = torch.exp2(torch.randint(0, 3, (3, 4)).float())
    a, b = torch.randn(3, 2, 4), torch.randn(3, 5, 2)
    whole, counts = Correction(shift=shift, a=a, b=b), torch.tensor([2, 0, 3])
    x, y = torch.randn(5, 4), torch.randn(5, 5)
    got_x, got_y = whole.shifted(x, counts), whole.corrected(y, x, counts)
    start = 0
    for e, n in enumerate(counts.tolist()):
        rows = slice(start, start + n)
        one = whole.of(e)
        assert torch.equal(got_x[rows], x[rows] * shift[e])
        assert torch.equal(one.shifted(x[rows]), x[rows] * shift[e])
        torch.testing.assert_close(got_y[rows], y[rows] + x[rows] @ a[e].T @ b[e].T)
        torch.testing.assert_close(one.corrected(y[rows], x[rows]), got_y[rows])
        start += n
    with refused("come in pairs"):
        Correction(a=a)


def test_a_leaf_computes_with_its_correction():
    leaf, experts = Linear(4, 5, role="ffn"), ExpertLinear(3, 4, 5, role="expert")
    x, counts = torch.randn(5, 4), torch.tensor([2, 0, 3])
    leaf.correction = Correction(shift=torch.full((4,), 2.0), a=torch.ones(1, 4),
                                 b=torch.ones(5, 1))  # fmt: skip
    plain = x @ leaf.weight.T
    torch.testing.assert_close(leaf(x), 2 * plain + x.sum(1, keepdim=True))
    experts.correction = Correction(a=torch.randn(3, 2, 4), b=torch.randn(3, 5, 2))
    y = experts(x, counts)
    torch.testing.assert_close(experts.one(x[2:], 2), y[2:])
    leaf.correction = None
    torch.testing.assert_close(leaf(x), plain)


@pytest.mark.parametrize("stacked", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("name", ["llm_fp4", "zeroquant_fp"])
def test_a_leaf_computes_what_the_method_measured(name, stacked):
    leaf = ExpertLinear(2, 16, 8, role="expert") if stacked else Linear(16, 8, role="ffn")
    leaf.precision = LeafPrecision.of("fp32")
    spread = torch.exp(torch.randn(16))
    rows = [torch.randn(30 + e, 16) * spread for e in range(2 if stacked else 1)]
    row, options = method_of(name), {"rank": 6} if name == "zeroquant_fp" else {}
    outcome = row.quantize(weight_of(leaf), rows, row.options(**options), False)
    made, base = deepcopy(leaf), PrecisionPolicy(name="b", default=leaf.precision)
    made.precision = policy_of_outcomes(base, {"x": leaf}, {"x": outcome}, "q").rules[0].use
    put(outcome, made)
    stack = weight_of(leaf) if stacked else weight_of(leaf)[None]
    if name == "llm_fp4":
        assert made.correction is not None
        expected = search(stack, rows, LlmFp4().options()).error ** 0.5
    else:  # the scale of each token, and the low-rank part of the input as it came
        assert made.correction is not None
        lost = total = 0.0
        c, values = made.correction, outcome.weight if stacked else outcome.weight[None]
        for e, x in enumerate(rows):
            x_hat = fake_quantize(x, "fp8_e4m3", scope="row")
            a, b = (t[e] if stacked else t for t in (c.a.float(), c.b.float()))
            y = x @ stack[e].T
            assert (values[e] + b @ a - stack[e]).norm() < 0.5 * (values[e] - stack[e]).norm()
            lost += (x_hat @ values[e].T + x @ a.T @ b.T - y).square().sum().item()
            total += y.square().sum().item()
        expected = (lost / total) ** 0.5
    assert output_error(leaf, made, rows) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", [row.name for row in METHODS])
def test_a_table_is_rounded_row_by_row(name):
    table = torch.randn(5, 32) * torch.exp(3 * torch.randn(5, 1))
    row = method_of(name)
    outcome = row.quantize(table, [torch.zeros(0, 32)], row.options(), True)
    assert (outcome.inputs, outcome.correction) == (None, None)
    for i in range(5):
        alone = row.quantize(table[i : i + 1], [torch.zeros(0, 32)], row.options(), True)
        if name == "rtn":  # the others share a format, or a scale, among rows
            assert torch.equal(outcome.weight[i], alone.weight[0])
        error = (outcome.weight[i] - table[i]).norm() / table[i].norm()
        assert error < 0.2


def test_a_new_kind_of_leaf_is_refused():
    class Odd(Leaf):
        role = "ffn"

    with refused("no method quantises a Odd"):
        is_table(Odd())


def test_options_of_methods():
    assert Rtn(format="mxfp4").input_spec.format == "mxfp4"
    assert ZeroQuantFp().input_spec.scope == "row"
    assert len(LlmFp4(activations="bf16").options().weight_formats) == 3
    assert LlmFp4(activations="bf16").options().input_formats == ()
