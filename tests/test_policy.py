"""The precision policy: what matches, what is reported, what is refused, what YAML can hold."""

import json

import pytest
from omegaconf import OmegaConf
from torch import nn

import zoo
from layers.linear import Linear
from layers.precision import PRESETS, LeafPrecision, PrecisionPolicy, Rule, apply_policy
from layers.precision.operands import OPERANDS


class Blocks(nn.Module):
    """Four blocks of two leaves, and a head: the shape of a model, without one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": Linear(8, 8, role="ffn"), "qkv": Linear(8, 8, role="attention")})
            for _ in range(4)
        )
        self.head = Linear(8, 8, role="head")


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_round_trip_through_yaml_and_json(name):
    policy = PRESETS[name]
    text = OmegaConf.to_yaml(OmegaConf.create(policy.to_plain()))
    again = PrecisionPolicy.of(OmegaConf.to_container(OmegaConf.create(text)))
    assert again == policy
    assert PrecisionPolicy.of(json.loads(json.dumps(policy.to_plain()))) == policy


def test_six_operands_round_trip():
    leaf = LeafPrecision.of({"all": "mxfp4", "dgrad_dy": "bf16", "compute": "fp32"})
    assert leaf.dgrad_dy.format == "bf16"
    assert {getattr(leaf, o).format for o in OPERANDS} == {"bf16", "mxfp4"}
    assert LeafPrecision.of(leaf.to_plain()) == leaf


def test_head_stays_high_and_the_rest_is_low():
    report = apply_policy(Blocks(), PRESETS["mxfp4"])
    formats = {p.name: p.format for p in report.parameters}
    assert formats["head.weight"] == "bf16"
    assert all(f == "bf16" for n, f in formats.items() if n.startswith("blocks.3."))  # the tail
    assert report.weight_share() == pytest.approx({"mxfp4": 6 / 9, "bf16": 3 / 9})
    assert not report.untouched


def test_the_first_rule_that_matches_wins():
    policy = PrecisionPolicy.of({
        "default": "mxfp4",
        "rules": [
            {"layers": "-1:", "use": "bf16"},
            {"roles": "attention", "name": "blocks.0.*", "use": "fp32"},
            {"roles": ["attention", "head"], "use": "nvfp4"},
        ],
    })  # fmt: skip
    report = apply_policy(Blocks(), policy)
    got = {p.name: (p.format, p.rule) for p in report.parameters}
    assert got["blocks.3.up.weight"] == ("bf16", 0)
    assert got["blocks.0.qkv.weight"] == ("fp32", 1)
    assert got["blocks.1.qkv.weight"] == ("nvfp4", 2)
    assert got["head.weight"] == ("nvfp4", 2)
    assert got["blocks.0.up.weight"] == ("mxfp4", None)


def test_a_rule_for_blocks_that_do_not_exist_is_refused():
    policy = PrecisionPolicy.of({"default": "mxfp4", "rules": [{"layers": 4, "use": "bf16"}]})
    with pytest.raises(ValueError, match="layers=4 is out of range for n_layers=4"):
        apply_policy(Blocks(), policy)


def test_where_touches_only_what_it_names():
    model = Blocks()
    report = apply_policy(model, PRESETS["nvfp4"], where="blocks.1.*")
    assert report.changed == ("blocks.1.up.weight", "blocks.1.qkv.weight")
    assert model.blocks[0]["up"].precision is None


def test_where_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"matches no leaf.*blocks\.0\.up"):
        apply_policy(Blocks(), PRESETS["nvfp4"], where="layers.*")


def test_strict_refuses_a_matrix_that_no_leaf_owns():
    model = Blocks()
    model.stray = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"no leaf owns stray\.weight"):
        apply_policy(model, PRESETS["nvfp4"])
    assert model.head.precision is None  # refused before anything was set
    lax = PrecisionPolicy(name="lax", default=PRESETS["nvfp4"].default, strict=False)
    assert "stray.weight" in apply_policy(model, lax).untouched


def test_strict_refuses_a_rule_that_matches_nothing():
    rule = Rule(use=PRESETS["bf16"].default, name="block.*")
    policy = PrecisionPolicy(name="typo", default=PRESETS["nvfp4"].default, rules=(rule,))
    with pytest.raises(ValueError, match=r"rule 0.*matches no leaf"):
        apply_policy(Blocks(), policy)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["expert"], r"rule 0.*matches no leaf"),
        (["head", "attenton"], r"unknown role 'attenton'. Did you mean 'attention'"),
    ],
)
def test_strict_refuses_roles_that_match_nothing(roles, message):
    given = {"default": "nvfp4", "rules": [{"roles": roles, "use": "bf16"}]}
    with pytest.raises(ValueError, match=message):
        apply_policy(Blocks(), PrecisionPolicy.of(given))
    apply_policy(Blocks(), PrecisionPolicy.of({**given, "strict": False}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nvfp5", "unknown precision 'nvfp5'. Did you mean 'nvfp4'"),
        (3, "must be a preset's name or a mapping"),
        ({"rules": []}, "needs 'default'"),
        ({"default": "mxfp5"}, "Did you mean 'mxfp4'"),
        ({"default": {"fprop_x": "mxfp4"}}, "lacks fprop_w"),
        ({"default": {"all": "mxfp4", "fprop_y": "bf16"}}, "Did you mean 'fprop_"),
        ({"default": {"all": {"format": "mxfp4", "scale_rule": "flor"}}}, "Did you mean 'floor'"),
        ({"default": {"all": {"format": "mxfp4", "rule": "floor"}}}, "rule"),
        ({"default": "mxfp4", "rules": [{"use": "bf16", "role": "head"}]}, "Did you mean 'roles'"),
        ({"default": "mxfp4", "rules": [{"roles": "head"}]}, "needs 'use'"),
        ({"default": "mxfp4", "rules": [{"use": "bf16", "layers": "end"}]}, "layers must be"),
        ({"default": "mxfp4", "colour": 1}, "field of a precision policy"),
        ({"default": {"all": "mxfp4", "compute": "fp8"}}, "compute dtype"),
    ],
)  # fmt: skip
def test_wrong_policies_are_refused_at_the_door(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        PrecisionPolicy.of(given)
    assert "\n" not in str(caught.value)


def test_a_tied_head_follows_the_policy_and_counts_once():
    config = {"d_model": 32, "n_layers": 1, "n_heads": 2, "ffn": "swiglu"}
    model = zoo.build({"model": config})
    report = zoo.set_precision(model, "mxfp4")
    assert model.head.precision == PRESETS["bf16"].default
    rows = {p.name: p for p in report.parameters}
    assert (rows["head.weight"].format, rows["head.weight"].params) == ("bf16", 0)
    assert rows["head.weight"].flops
    assert rows["embedding.weight"].role == "embedding"
    assert sum(p.params for p in report.parameters) == sum(p.numel() for p in model.parameters())
    assert sum((report.flops_share() or {}).values()) == pytest.approx(1)


def test_flops_and_weights_are_reported_for_a_variant():
    ffn = zoo.create("moe", d_model=32, n_experts=4)
    report = zoo.set_precision(ffn, "nvfp4")
    rows = {p.name: p for p in report.parameters}
    assert rows["router.weight"].format == "untouched"
    assert rows["router.weight"].role == "router"
    assert rows["experts.gate_up.weight"].format == "nvfp4"
    assert sum(p.params for p in report.parameters) == sum(p.numel() for p in ffn.parameters())
    assert "gate_up.weight" in str(report)
