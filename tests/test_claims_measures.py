"""What a test of a claim reads off a run."""

from dataclasses import replace
from math import isfinite, isnan

import pytest
import report_data

from recipes.claiming.measures import MEASURES, value_of
from recipes.report.records import Point, Run
from recipes.report.strict import read_as


def record_of(**keys):
    """A run with more in its record."""
    plain = report_data.run("moe_plus_plus", "bf16", 0, steps=200)
    return read_as(Run, {**plain, **keys}, "run")


def test_measures_read_what_a_run_keeps():
    run = record_of(
        density=[{"layer": i, "n_neurons": 10, "target": 0.1, "active": x}
                 for i, x in enumerate((0.1, 0.3))],
        loops=[{"layer": 0, "counts": [1.0, 0.0, 3.0]}],
        widths=[{"widths": [8, None, 8], "trained": True, "params": 7, "active_params": 5.0,
                 "nonembedding_params": 3, "flops_per_token": 11.0, "bpb": 2.5, "agreement": 1.0,
                 "kl": 0.0}],
    )  # fmt: skip

    def value(measure, width=None, tokens=1):
        return value_of(run, measure, width, tokens)

    assert value("bpb") == run.final.bpb
    assert value("density") == pytest.approx(0.2)
    assert value("loops") == pytest.approx(2.5)
    assert (value("bpb", 8), value("params", 8), value("flops_per_token", 8)) == (2.5, 7, 11.0)
    assert value("bpb", 16) is None
    assert value("weight_bytes_per_token", tokens=16) == run.cost.weight_bytes_per_token["16"]
    assert value("weight_bytes_per_token", tokens=3) is None
    shares = [layer.zero_computation_share for layer in run.load]
    assert value("zero_computation_share") == pytest.approx(sum(shares) / len(shares))
    violations = [layer.max_violation for layer in run.load]
    assert value("max_violation") == pytest.approx(sum(violations) / len(violations))
    assert value("training_flops") == run.curve[-1].flops
    assert value("accuracy") is None
    assert value("dropped") is None
    point = {**report_data.run("moe", "bf16", 0, steps=200)["curve"][-1]}
    dropping = record_of(curve=[{**point, "router": {"load/dropped": x}} for x in (0.6, 0.1)])
    assert value_of(dropping, "dropped", None, 1) == 0.1
    starting = record_of(curve=[{**point, "step": 0, "eval_bpb": 7.5}, point])
    assert value_of(starting, "start_bpb", None, 1) == 7.5


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_every_measure_may_be_missing_but_never_fails(name):
    bare = record_of(curve=[], load=[])
    value = value_of(bare, name, None, 1)
    assert value is None or format(value, MEASURES[name].form)
    assert value_of(bare, name, 64, 1) is None


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_a_run_that_diverged_is_not_left_out(name):
    """What it did not record counts as NaN, but for what was known before its first step."""
    lost = record_of(
        load=[], diverged=True, diverged_step=20,
        final={"bpb": None, "nats_per_token": None, "eval_bytes": 10, "eval_tokens": 10},
    )  # fmt: skip
    point = {**report_data.run("moe", "bf16", 0, steps=200)["curve"][0], "step": 0}
    lost = replace(lost, curve=(read_as(Point, {**point, "eval_bpb": 7.5}, "point"),))
    value = value_of(lost, name, None, 1)
    assert value is not None
    known = {"start_bpb", "flops_per_token", "params", "active_params", "weight_bytes_per_token"}
    assert isfinite(value) == (name in known)
    if name in ("bpb", "accuracy"):
        assert isnan(value_of(lost, name, 64, 1) or 0.0)  # of a submodel too
