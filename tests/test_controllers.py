"""Router state that moves between steps: rules, what is counted, runs that are cut and go on."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recipe_toys import evaluate_briefly, killed_after, rows, timeless, tiny_recipe
from safetensors.torch import load_file
from torch.testing import assert_close

from layers.dispatch import count_experts
from recipes.controllers import RouterController, controller_callbacks
from recipes.train import train
from routers.deepseek_v3 import DeepSeekV3Router, DeepSeekV3RouterConfig
from routers.longcat import LongCatRouter, LongCatRouterConfig
from routers.remoe import ReMoERouter, ReMoERouterConfig
from routers.state import BiasControl, SelectionBias, bias_move
from routers.top_k import TopKRouter, TopKRouterConfig

D = 16


# Rules


def test_a_bias_moves_by_u_against_its_excess():
    counts = torch.tensor([10, 2, 6, 6])
    control = BiasControl(bias_step=0.5)
    assert bias_move(counts, control).tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert bias_move(torch.tensor([1, 1, 1]), control).tolist() == [0.0] * 3  # a third is no float
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    assert bias_move(counts, control, shares).tolist() == [0.5, 0.5, 0.0, -0.5]


def test_inv20_the_centred_rule_does_not_drift():
    counts = torch.tensor([10, 1, 1, 1])
    centred = bias_move(counts, BiasControl(bias_rule="centred"))
    plain = bias_move(counts, BiasControl())
    assert_close(centred.sum().item(), 0.0, atol=1e-12, rtol=0)
    assert_close(centred - centred[0], plain - plain[0])
    assert plain.sum() > 0


@pytest.mark.parametrize("rule", ["sign", "centred"])
def test_inv20_load_evens_out_under_fixed_logits(rule):
    router = DeepSeekV3Router(DeepSeekV3RouterConfig(
        d_model=D, bias_rule=rule, bias_step=0.01, balance_scope="micro_batch"))  # fmt: skip
    x = torch.randn(1024, D)
    x[:, 0] = 1
    with torch.no_grad():
        router.weight.normal_(std=0.3)
        router.weight[:, 0] = torch.linspace(-2, 2, 8)
    variation = []
    for _ in range(120):
        counts = count_experts(router(x).experts, 8)
        variation.append((counts.double().std() / counts.double().mean()).item())
        router.update(counts)
    assert variation[0] > 0.8
    assert max(variation[-20:]) < 0.15
    assert router.weight.grad is None


def test_a_bias_stands_still_after_its_share_of_the_run():
    router = DeepSeekV3Router(DeepSeekV3RouterConfig(d_model=D, bias_until=0.5))
    counts = torch.arange(8)
    router.update(counts, progress=0.49)
    moved = router.bias.clone()
    assert moved.abs().sum() > 0
    router.update(counts, progress=0.5)
    assert torch.equal(router.bias, moved)
    still = DeepSeekV3Router(DeepSeekV3RouterConfig(d_model=D, bias_step=0.0))
    still.update(counts)
    assert still.bias.abs().sum() == 0


def test_longcat_steers_to_the_wanted_number_of_ffn_experts():
    config = LongCatRouterConfig(
        d_model=D, n_experts=8, n_copy=4, top_k=3, ffn_per_token=1.5, bias_step=0.002
    )
    router = LongCatRouter(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    assert_close(router.shares.sum().item(), 1.0)
    x = torch.randn(1024, D)
    for _ in range(300):
        counts = count_experts(router(x).experts, 12)
        router.update(counts)
    assert abs(counts[:8].sum() / 1024 - 1.5) < 0.1
    assert (counts[:8] / counts[:8].float().mean() - 1).abs().max() < 0.2


def test_inv21_lambda_moves_by_exactly_1_2():
    router = ReMoERouter(ReMoERouterConfig(d_model=D, n_experts=8, top_k=2))
    assert router.strength == torch.tensor(1e-8)
    router.update(0.74)  # below 1 - 2 / 8: too dense
    assert_close(router.strength.item(), 1.2e-8, rtol=1e-6, atol=0)
    for sparsity in (0.75, 0.9):
        before = router.strength.item()
        router.update(sparsity)
        assert_close(router.strength.item(), before / 1.2, rtol=1e-6, atol=0)


def test_lambda_brings_gates_to_their_target():
    router = ReMoERouter(ReMoERouterConfig(d_model=D, n_experts=8, top_k=2, penalty=1e-3))
    torch.nn.init.normal_(router.weight, std=0.3)
    x, active = torch.randn(512, D), []
    x[:, 0] = 2  # without a constant a gate cannot be closed more than half of the time
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    for _ in range(300):
        routing = router(x)
        task = (routing.weights.sum(-1) - 1).square().mean()  # wants gates open
        optimizer.zero_grad()
        (task + routing.losses["l1"]).backward()
        optimizer.step()
        active.append(routing.keep.double().sum(-1).mean().item())
        router.update(1 - active[-1] / 8)
    assert active[0] > 3
    assert abs(sum(active[-100:]) / 100 - 2) < 0.3


# What is counted


def controlled(routers, *, accumulate=1, max_steps=10):
    """A controller of a model with these routers, and what feeds it a micro-batch."""
    blocks = [SimpleNamespace(ffn=SimpleNamespace(router=router)) for router in routers]
    task = SimpleNamespace(model=SimpleNamespace(blocks=blocks))
    trainer = SimpleNamespace(accumulate_grad_batches=accumulate, global_step=0)
    controller = RouterController(max_steps)
    controller.on_fit_start(trainer, task)

    def feed(batch_idx, counts, mask=None, n_tokens=8):
        batch = SimpleNamespace(tokens=torch.zeros(1, n_tokens), mask=mask)
        stats = [{} if c is None else {"counts": torch.tensor(c)} for c in counts]
        controller.on_train_batch_start(trainer, task, batch, batch_idx)
        if (batch_idx + 1) % accumulate == 0:
            trainer.global_step += 1
        controller.on_train_batch_end(trainer, task, {"stats": stats}, batch, batch_idx)

    return feed


def v3(**options):
    sizes = {"d_model": D, "n_experts": 4, "bias_step": 1.0, "balance_scope": "micro_batch"}
    return DeepSeekV3Router(DeepSeekV3RouterConfig(**sizes | options))


def test_a_bias_moves_once_a_step_by_the_sum_over_micro_batches():
    router = v3()
    feed = controlled([None, router], accumulate=2)
    feed(0, [None, [9, 1, 1, 1]])
    assert router.bias.tolist() == [0.0] * 4  # a micro-batch is no step
    feed(1, [None, [0, 9, 1, 2]])  # in all 9, 10, 2, 3
    assert router.bias.tolist() == [-1.0, -1.0, 1.0, 1.0]
    feed(2, [None, [0, 0, 8, 4]])
    feed(3, [None, [0, 0, 0, 4]])  # the step before counts no more
    assert router.bias.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_progress_is_of_the_run():
    router = v3(bias_until=0.5)
    feed = controlled([router], max_steps=4)
    for step in range(4):
        feed(step, [[9, 1, 1, 1]])
    assert router.bias[1] == 2


def test_lambda_moves_by_the_mean_sparsity_of_all_layers_and_real_tokens():
    config = ReMoERouterConfig(d_model=D, n_experts=4, top_k=2, penalty=1.0)
    dense, sparse = ReMoERouter(config), ReMoERouter(config)
    feed = controlled([dense, sparse])
    mask = torch.tensor([[True] * 4 + [False] * 4])
    feed(0, [[4, 4, 4, 2], [1, 0, 0, 0]], mask)  # 15 of 32 gates
    assert dense.strength == sparse.strength
    assert_close(dense.strength.item(), 1 / 1.2)
    feed(1, [[4, 4, 4, 4], [1, 0, 0, 0]], mask)  # 17 of 32
    assert_close(dense.strength.item(), 1.0)


def test_a_global_balance_loss_sees_the_steps_earlier_micro_batches():
    router = TopKRouter(TopKRouterConfig(d_model=D, n_experts=4, balance_scope="global_batch"))
    feed = controlled([router], accumulate=3)
    feed(0, [[3, 1, 0, 0]])
    assert router.balance.seen.tolist() == [3, 1, 0, 0]
    feed(1, [[0, 0, 4, 0]])
    assert router.balance.seen.tolist() == [3, 1, 4, 0]
    feed(2, [[0, 0, 4, 0]])
    feed(3, [[1, 1, 1, 1]])
    assert router.balance.seen.tolist() == [1, 1, 1, 1]


def test_nothing_to_move_needs_no_controller():
    def callbacks(router):
        return controller_callbacks(tiny_recipe({"name": "moe", "router": router}))

    assert callbacks("top_k") == callbacks("vmoe") == []
    assert controller_callbacks(tiny_recipe("mlp")) == []
    for router in ("deepseek_v3", "remoe", {"name": "top_k", "balance_scope": "global_batch"}):
        assert len(callbacks(router)) == 1


RANKS = """
import sys
import torch
import torch.distributed as dist
from routers.balance import BalanceLoss, balance_loss, over_ranks

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
probs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
experts = probs.topk(2).indices
mine = slice(20 * rank, 20 * rank + 20)
loss = BalanceLoss("global_batch", 6)(probs[mine], experts[mine], None)
dist.all_reduce(loss)
torch.testing.assert_close(loss / 2, balance_loss(probs, experts))
counts = torch.tensor([rank, 5])
assert over_ranks(counts).tolist() == [1, 10]
assert counts.tolist() == [rank, 5]  # what was given is left as it was
dist.barrier()
dist.destroy_process_group()  # else the rank that ends first may abort the other
"""


def test_two_ranks_balance_as_one(tmp_path):
    """inv19: the mean of the ranks' losses with global f is the loss of the whole batch."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", RANKS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=root)
        for rank in range(2)
    ]
    assert [rank.wait(60) for rank in ranks] == [0, 0]


# Runs

V3 = {"name": "deepseek_v3", "balance_scope": "micro_batch", "bias_step": 0.01}
CONTROLLED = {
    "bias": (V3, ()),
    "lambda": ("remoe", ("loss_weights.l1=1.0",)),
    "running counts": ({"name": "top_k", "balance_scope": "global_batch"}, ()),
}


def recipe_of(router, *overrides):
    ffn = {"name": "moe", "n_experts": 4, "d_expert": 32, "router": router}
    return tiny_recipe(ffn, "data.batch_size=4", "data.seq_len=64", *overrides)


@pytest.mark.parametrize("overrides", [(), ("trainer.activation_checkpointing=true",)])
def test_counts_are_of_a_steps_training_tokens_once(overrides, tmp_path, monkeypatch):
    evaluate_briefly(monkeypatch)
    found, update = [], SelectionBias.update

    def spy(self, counts, *, progress=0.0):
        found.append((counts.sum().item(), round(progress * 4)))
        update(self, counts, progress=progress)

    monkeypatch.setattr(SelectionBias, "update", spy)
    sizes = ["trainer.max_steps=4", "trainer.eval_every_steps=2", "trainer.accumulate=2"]
    train(recipe_of(V3, *sizes, *overrides), tmp_path)
    tokens = 2 * 4 * 64
    assert found == [(2 * tokens, step) for step in range(4) for _ in range(2)]


@pytest.mark.parametrize("case", CONTROLLED)
def test_a_cut_run_leaves_what_a_whole_one_leaves(case, tmp_path, monkeypatch):
    evaluate_briefly(monkeypatch)
    router, overrides = CONTROLLED[case]
    sizes = ["trainer.max_steps=4", "trainer.checkpoint_every_steps=2", "trainer.accumulate=2"]
    recipe = recipe_of(router, *sizes, *overrides)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = train(recipe, whole)
    with killed_after(monkeypatch, 3):
        train(recipe, cut)
    assert timeless(train(recipe, cut)) == timeless(expected)
    assert rows(cut) == rows(whole)
    weights = [load_file(run / "weights.safetensors") for run in (whole, cut)]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    state = {"bias": "bias", "lambda": "strength"}.get(case)
    if state:
        moved = weights[0][f"blocks.1.ffn.router.{state}"]
        assert not torch.equal(moved, torch.full_like(moved, 1e-8 if state == "strength" else 0))
