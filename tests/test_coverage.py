"""What a policy reaches, for every row of the catalogue in every preset."""

import pytest
import torch
from recipe_toys import tiny_recipe
from torch import nn

import zoo
from layers.linear import Linear
from layers.precision import PrecisionPolicy, apply_policy
from layers.precision.policy import HIGH_ROLES
from recipes.train import train
from zoo.catalogue import FFNS

N_LAYERS = 7  # of which the last 15% are one
every_variant = pytest.mark.parametrize("entry", FFNS, ids=lambda entry: entry.name)
every_precision = pytest.mark.parametrize("precision", zoo.precisions())


def model_of(entry):
    options = {k: v for k, v in entry.tiny.items() if k != "d_model"}
    ffn = {"name": entry.name, **options}
    config = {"d_model": entry.tiny["d_model"], "n_layers": N_LAYERS, "n_heads": 2, "ffn": ffn}
    config["allow_noncausal"] = True
    with torch.device("meta"):
        return zoo.build({"model": config})


def expected_format(name, role, precision):
    """By the words of the presets: high roles, a high tail, the rest low."""
    policy = zoo.policy_of(precision)
    if precision in ("fp32", "bf16"):
        return precision
    in_tail = precision != "w4a8" and name.startswith(f"blocks.{N_LAYERS - 1}.")
    return "bf16" if role in HIGH_ROLES or in_tail else policy.default.label


@every_variant
@every_precision
def test_invariant_18_coverage_is_what_the_policy_says_and_adds_up(entry, precision):
    model = model_of(entry)
    report = zoo.set_precision(model, precision)
    rows = {row.name: row for row in report.parameters}
    assert rows.keys() == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert sum(row.params for row in rows.values()) == sum(p.numel() for p in model.parameters())
    flops = {item.name: item.flops for item in zoo.module_cost(model)}
    low_params = low_flops = 0.0
    for name, row in rows.items():
        if row.precision is None:
            assert row.role in HIGH_ROLES or name.endswith(".bias"), name
            continue
        assert row.format == expected_format(name, row.role, precision), name
        if row.format not in ("fp32", "bf16"):
            low_params += row.params
            low_flops += flops[name]
    for found, low, whole in (
        (report.weight_share(), low_params, sum(p.numel() for p in model.parameters())),
        (report.flops_share(), low_flops, sum(flops[name] for name in rows)),
    ):
        assert sum(found.values()) == pytest.approx(1)
        share = sum(v for k, v in found.items() if k not in ("fp32", "bf16", "untouched"))
        assert share == pytest.approx(low / whole)
        assert (share > 0) == (precision not in ("fp32", "bf16"))


def test_invariant_18_bytes_are_those_of_the_formats():
    model = model_of(FFNS[1])
    cost = zoo.cost(FFNS[1].name, **FFNS[1].tiny, precision="nvfp4")
    numbers = sum(item.params for item in cost)
    assert sum(item.params * item.bits / 8 for item in cost) == numbers * 4.5 / 8
    assert zoo.set_precision(model, "nvfp4").weight_share()["nvfp4"] > 0.5


def test_invariant_18_strict_mode_fails_on_a_renamed_layer():
    class Renamed(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({name: Linear(8, 8, role="ffn")})])

    rule = {"name": "blocks.*.down", "use": "mxfp4"}
    policy = PrecisionPolicy.of({"default": "bf16", "rules": [rule]})
    apply_policy(Renamed("down"), policy)
    with pytest.raises(ValueError, match=r"rule 0 .* matches no leaf"):
        apply_policy(Renamed("lower"), policy)
    scheduled = PrecisionPolicy.of(
        {"default": "mxfp4", "schedule": [{"at": 0.5, "use": "bf16", "name": "blocks.*.down"}]}
    )
    apply_policy(Renamed("down"), scheduled)
    with pytest.raises(ValueError, match=r"switch 0 .* matches no leaf"):
        apply_policy(Renamed("lower"), scheduled)


@pytest.mark.slow
def test_invariant_19_nvfp4_trains_within_a_few_percent_of_bf16(tmp_path):
    """An experiment, not a bound on the method: 100 steps of a small model, one seed."""
    finals = {}
    for precision in ("bf16", "nvfp4"):
        recipe = tiny_recipe(
            {"name": "swiglu"}, "trainer.max_steps=100", "model.n_layers=4",
            f"precision={precision}",
        )  # fmt: skip
        finals[precision] = train(recipe, tmp_path / precision)["final"]["bpb"]
    assert finals["nvfp4"] < 1.04 * finals["bf16"]
