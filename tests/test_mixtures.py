"""Published mixtures: what their rows settle, and what they are said to cost before a run."""

import pytest
import torch

import zoo
from zoo.mixtures import MIXTURES

D, F = 32, 48


def ffn_flops(cost):
    return sum(item.flops for item in cost if item.role == "expert")


@pytest.mark.parametrize(
    ("options", "per_token"),
    [({}, 4 * 32 / 48), ({"ffn_per_token": 3.0}, 3.0), ({"n_copy": 0}, 4.0), ({"top_k": 6}, 4.0)],
)
def test_identity_moe_costs_what_its_bias_steers_to(options, per_token):
    """Even use of 32 experts and 16 identities, or what `ffn_per_token` says; built or not."""
    cost = zoo.cost("identity_moe", d_model=D, d_expert=F, **options)
    assert ffn_flops(cost) == pytest.approx(per_token * 2 * 3 * D * F)
    layer = zoo.create("identity_moe", d_model=D, d_expert=F, **options)
    assert ffn_flops(zoo.module_cost(layer)) == pytest.approx(ffn_flops(cost))


def test_what_was_measured_goes_before_what_is_designed():
    choice = zoo.resolve("identity_moe", d_model=D, d_expert=F)
    assert ffn_flops(choice.cost(assignments=1.5)) == pytest.approx(1.5 * 2 * 3 * D * F)
    choice = zoo.resolve("remoe", d_model=D, d_expert=F)
    assert ffn_flops(choice.cost()) == 2 * 3 * D * F  # the one expert that it aims at
    assert ffn_flops(choice.cost(assignments=4.0)) == 4 * 2 * 3 * D * F


def test_identity_experts_give_the_token_back():
    layer = zoo.create("identity_moe", d_model=D, d_expert=F, n_experts=2, n_copy=4, top_k=1)
    x = torch.randn(2, 16, D)
    out = layer.router(x.flatten(0, 1))
    alone = (out.experts >= 2)[:, 0]
    assert alone.any()
    assert not alone.all()
    y = layer(x).y.flatten(0, 1)
    torch.testing.assert_close(y[alone], (out.weights * x.flatten(0, 1))[alone])


def test_rows_settle_their_papers_choices():
    """The share of experts that runs, as the papers have it."""
    shares = {
        "deepseek_moe": 6 / 64, "deepseek_v2_moe": 6 / 160, "deepseek_v3_moe": 8 / 256,
        "gpt_oss_moe": 4 / 32, "granite_moe": 8 / 32, "llama4_moe": 1 / 16, "mixtral_moe": 2 / 8,
        "olmoe": 8 / 64, "qwen2_moe": 4 / 60, "qwen3_moe": 8 / 128, "remoe": 1 / 8, "vmoe": 2 / 32,
    }  # fmt: skip
    for name, share in shares.items():
        config = zoo.resolve(name, d_model=D).config
        assert config.top_k / config.n_experts == share, name
    router = zoo.resolve("deepseek_v3_moe", d_model=D).router_config
    assert (router.n_groups, router.top_groups, router.scale) == (8, 4, 2.5)
    assert zoo.resolve("qwen3_moe", d_model=D).router_config.balance_scope == "global_batch"


def test_rows_stand_in_the_order_of_their_names():
    names = [row.name for row in MIXTURES]
    assert names == sorted(names)


def test_a_biased_expert_keeps_its_bias_out_of_a_low_precision():
    """A bias counts as 16 bits where its matrix has 4, and a strict policy does not miss it."""
    bits = {i.name: i.bits for i in zoo.cost("gpt_oss_moe", d_model=D, precision="nvfp4")}
    assert bits["experts.down.weight"] == 4.5
    assert bits["experts.down.bias"] == bits["experts.gate_up.bias"] == 16
    experts = zoo.create("gpt_oss_moe", d_model=D).experts
    report = zoo.set_precision(torch.nn.ModuleDict({"mine": experts}), "nvfp4")  # counts no cost
    assert set(report.changed) == {"mine.gate_up.weight", "mine.down.weight"}
