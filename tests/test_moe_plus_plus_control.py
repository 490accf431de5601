"""MoE++ steered to a wanted share of zero-computation experts, by tau or by a selection bias."""

import pytest
import torch
from recipe_toys import tiny_recipe
from safetensors.torch import load_file

import zoo
from recipes.train import train
from routers.pathway import TAU_RANGE, PathwayRouter, PathwayRouterConfig

SIZES = {"d_model": 8, "n_experts": 8, "n_constant": 2, "n_copy": 1, "n_zero": 1, "top_k": 2}


def router(**options):
    return PathwayRouter(PathwayRouterConfig(**SIZES, **options))


def test_the_paper_steers_nothing():
    plain = router()
    assert not plain.moves
    assert set(plain.state_dict()) == {"weight"}


def test_tau_rises_where_zero_computation_experts_are_used_too_much():
    steered = router(zero_computation_share=0.25, tau_step=0.5)
    counts = torch.zeros(12, dtype=torch.int64)
    counts[8:] = 10  # all of it
    steered.update(counts)
    assert steered.tau == pytest.approx(0.75 * 1.5)
    steered.update(torch.ones(12, dtype=torch.int64) * torch.tensor([9] * 8 + [1] * 4))
    assert steered.tau == pytest.approx(0.75)
    exact = torch.tensor([6] * 8 + [4] * 4)  # 16 of 64
    steered.update(exact)
    assert steered.tau == pytest.approx(0.75)
    for _ in range(100):
        steered.update(counts)
    assert steered.tau == TAU_RANGE[1]


def test_the_bias_moves_each_expert_towards_its_kinds_share():
    steered = router(zero_computation_share=0.5, steer="bias", bias_step=0.1)
    counts = torch.tensor([4] * 7 + [5] + [8] * 4)  # 65 in all: FFN 65 / 16 = 4.06, others 8.1
    steered.update(counts)
    assert steered.bias.tolist() == pytest.approx([0.1] * 7 + [-0.1] + [0.1] * 4)


def test_the_bias_chooses_but_does_not_weigh():
    steered = router(zero_computation_share=0.5, steer="bias")
    x = torch.randn(16, 8)
    p = torch.softmax(x @ steered.weight.t(), -1)
    with torch.no_grad():
        steered.bias[3] = 1.0
    routing = steered(x)
    assert (routing.experts == 3).any(-1).all()
    torch.testing.assert_close(routing.weights, p.gather(-1, routing.experts))


def test_tau_weighs_zero_computation_experts_in_the_loss():
    one, other = router(zero_computation_share=0.4), router(tau=0.3)
    other.weight.data.copy_(one.weight.data)
    one.tau.fill_(0.3)
    x = torch.randn(16, 8)
    assert torch.equal(one(x).losses["balance"], other(x).losses["balance"])


@pytest.mark.parametrize("steer", ["tau", "bias"])
def test_state_stays_float32_and_is_saved(steer):
    steered = router(zero_computation_share=0.4, steer=steer).to(torch.bfloat16)
    state = steered.state_dict()[steer]
    assert state.dtype == torch.float32


def test_the_designed_cost_follows_the_wanted_share():
    config = zoo.resolve("moe_plus_plus", zero_computation_share=0.4, **SIZES).config
    assert 4 * config.designed_share == pytest.approx(0.4)
    share = config.cost().items[0].active_units / config.top_k
    assert share == pytest.approx(0.6)


@pytest.mark.parametrize("steer", ["tau", "bias"])
@pytest.mark.parametrize("wanted", [0.2, 0.6])
def test_training_ends_near_the_wanted_share(steer, wanted, tmp_path):
    ffn = {"name": "moe_plus_plus", "n_experts": 4, "n_constant": 1, "d_expert": 16, "steer": steer,
           "zero_computation_share": wanted, "capacity_factor": None, "bias_step": 0.02,
           "tau_step": 0.1}  # fmt: skip
    recipe = tiny_recipe(ffn, "trainer.max_steps=80", "loss_weights.balance=0.1")
    result = train(recipe, tmp_path)
    found = [layer["zero_computation_share"] for layer in result["load"]]
    assert sum(found) / len(found) == pytest.approx(wanted, abs=0.12)
    assert f"blocks.0.ffn.router.{steer}" in load_file(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_computation_share": 1.0}, "zero_computation_share must be above 0, below 1"),
        ({"zero_computation_share": 0.9, "n_constant": 0, "n_copy": 0}, r"in \[0, 0.5\]"),
        ({"zero_computation_share": 0.4, "steer": "taus"}, "Did you mean 'tau'"),
        ({"zero_computation_share": 0.4, "tau_step": 0.0}, "tau_step must be positive"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.create("moe_plus_plus", **{**SIZES, **options})
