"""FactorLLM against the words of its paper and code, token by token in float64 (moe.md 10)."""

import math
from dataclasses import replace

import pytest
import torch
from recipe_toys import evaluate_briefly, killed_after, refused, rows, timeless, tiny_recipe
from safetensors.torch import load_file
from torch.testing import assert_close

import zoo
from recipes import load
from recipes.convert import convert_run
from recipes.data import TextData
from recipes.metrics import evaluate
from recipes.prior import prior_callbacks
from recipes.quantize import read_model
from recipes.train import train
from routers.factor_llm import FactorLLMRouter, FactorLLMRouterConfig, chosen_share
from zoo.conversion import convert_ffn, layer_pa_loss, options_for

pytestmark = pytest.mark.parity

D, WIDTH = 6, 24


def dense():
    return zoo.create("swiglu", d_model=D, d_ff=WIDTH).double()


def converted(n_experts, top_k, straight_through=True):
    """A layer and the FFN that it came from; the router with a bias and a will of its own."""
    ffn = dense()
    said = {"n_experts": n_experts, "top_k": top_k, "straight_through": straight_through}
    layer = convert_ffn(ffn, "factor_llm", router_std=1.0, **said)
    torch.nn.init.normal_(layer.router.logit_bias)
    return ffn, layer


def neurons(ffn, x, which):
    """The part of the dense FFN that some neurons make, from the dense weights alone."""
    gate, up = ffn.gate_up.weight[which], ffn.gate_up.weight[WIDTH:][which]
    h = gate @ x
    return ffn.down.weight[:, which] @ (h / (1 + torch.exp(-h)) * (up @ x))


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (4, 2), (4, 3), (3, 2), (6, 6)])
def test_the_converted_layer_is_chosen_neurons_of_the_dense_ffn(n_experts, top_k):
    ffn, layer = converted(n_experts, top_k)
    x, size = torch.randn(1, 9, D, dtype=torch.float64), WIDTH // n_experts
    for token, y in zip(x[0], layer(x).y[0], strict=True):
        z = layer.router.weight @ token + layer.router.logit_bias
        chosen = sorted(range(n_experts), key=lambda e: -z[e].item())[:top_k]
        which = [i for e in chosen for i in range(e * size, (e + 1) * size)]
        assert_close(y, n_experts / top_k * neurons(ffn, token, which))


@pytest.mark.parametrize("straight_through", [True, False])
def test_the_tasks_gradient_reaches_the_router_straight_through_alone(straight_through):
    """d loss / d p_e = N / K * <d loss / d y, expert_e(x)> at the chosen, and then the softmax."""
    ffn, layer = converted(4, 2, straight_through)
    x, probe = torch.randn(1, 7, D, dtype=torch.float64), torch.randn(7, D, dtype=torch.float64)
    (layer(x).y[0] * probe).sum().backward()
    router = layer.router
    if not straight_through:
        assert router.weight.grad is None
        assert router.logit_bias.grad is None
        assert layer.experts.down.weight.grad.any()
        return
    expected = torch.zeros_like(router.logit_bias)
    for token, d_y in zip(x[0], probe, strict=True):
        z = router.weight @ token + router.logit_bias
        p = torch.exp(z) / torch.exp(z).sum()
        chosen = sorted(range(4), key=lambda e: -z[e].item())[:2]
        for e in chosen:
            d_p = 4 / 2 * d_y @ neurons(ffn, token, list(range(e * 6, e * 6 + 6)))
            for j in range(4):
                expected[j] += (d_p * p[e] * (float(e == j) - p[j])).detach()
    assert expected.any()
    assert_close(router.logit_bias.grad, expected)


def test_the_balance_term_is_the_published_mean_over_tokens_and_experts():
    router = FactorLLMRouter(FactorLLMRouterConfig(d_model=D, n_experts=5, top_k=2)).double()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(8, D, dtype=torch.float64)
    published = 0.0
    for token in x:
        p = [math.exp((w @ token).item()) for w in router.weight]
        published += sum(sorted(v / sum(p) for v in p)[-2:]) / (8 * 5)
    found = router(x).losses["balance"]
    assert found.item() == pytest.approx(published * 5**2 / 2, rel=1e-6)
    weight = options_for("factor_llm", {"n_experts": 5, "top_k": 2}).loss_weights(7)["balance"]
    assert weight * found.item() == pytest.approx(0.01 * 7 * published, rel=1e-6)
    torch.nn.init.zeros_(router.weight)
    assert router(x).losses["balance"].item() == pytest.approx(1)
    assert chosen_share(torch.tensor([[1.0, 0.0]]), 4) == 2  # most certain: N / K


def test_refuses_what_it_cannot_be():
    with refused("top_k must be at most n_experts=2, got 3"):
        FactorLLMRouterConfig(d_model=D, n_experts=2, top_k=3)


# Training with the dense model as teacher


def short(task, data):
    return evaluate(task.model, data.val_dataloader(), data.domains)


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    evaluate_briefly(monkeypatch)
    monkeypatch.setattr("recipes.convert.final_evaluation", short)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dense run, and its conversion beside it."""
    out = tmp_path_factory.mktemp("runs") / "dense"
    with pytest.MonkeyPatch.context() as patch:
        evaluate_briefly(patch)
        patch.setattr("recipes.convert.final_evaluation", short)
        said = ["precision=fp32", "trainer.max_steps=6", "data.batch_size=4"]
        recipe = tiny_recipe({"name": "swiglu", "d_ff": 48}, *said)
        train(replace(recipe, loss_weights={}), out)  # a dense run has none
        convert_run(out, to="factor_llm", router_std=0.5)
    return out


def recipe_of(run, *overrides):
    return load.load(run.with_name("dense-factor_llm") / "recipe.yaml", overrides)


def test_a_run_with_a_teacher_is_the_sum_of_three_losses(run, tmp_path):
    """The loss `prior` of the first step is that of the frozen FFNs at the student's inputs."""
    recipe = recipe_of(run, "trainer.max_steps=1", "trainer.log_every_steps=1")
    assert recipe.loss_weights == {"prior": 0.05 * 2, "balance": 0.01 * 2 * 2 / 4**2}
    train(recipe, tmp_path / "taught")
    header, *lines = (tmp_path / "taught" / "metrics.csv").read_text().splitlines()
    logged = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    teacher, student = (read_model(p).model for p in (run, run.with_name("dense-factor_llm")))
    batch = next(iter(TextData(recipe.data, recipe.seed, 1).train_dataloader()))
    inputs = []
    for block in student.blocks:
        block.ffn.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    student(batch.tokens)
    each = [
        layer_pa_loss(new.ffn, old.ffn, x).item()
        for new, old, x in zip(student.blocks, teacher.blocks, inputs, strict=True)
    ]
    assert len(each) == 2
    assert float(logged["loss/prior"]) == pytest.approx(sum(each) / 2, rel=1e-4)


def test_labels_lower_their_loss_and_hard_masks_alone_teach_nothing(run, tmp_path):
    """Without straight-through, labels or balance a router stays as it was drawn."""

    def last(path, column="loss/prior"):
        header, *lines = (path / "metrics.csv").read_text().splitlines()
        values = [line.split(",")[header.split(",").index(column)] for line in lines]
        return [float(v) for v in values if v]

    steps = ["trainer.max_steps=30", "loss_weights.prior=5", "optim.lr=3e-3"]
    train(recipe_of(run, *steps), tmp_path / "taught")
    losses = last(tmp_path / "taught")
    assert losses[-1] < 0.9 * losses[0]

    hard = ["prior_teacher=null", "loss_weights.balance=0", "trainer.max_steps=3"]
    hard += ["model.ffn.router.straight_through=false"]
    train(recipe_of(run, *hard), tmp_path / "hard")
    start = load_file(run.with_name("dense-factor_llm") / "weights.safetensors")
    end = load_file(tmp_path / "hard" / "weights.safetensors")
    routers = [name for name in start if ".router." in name]
    assert len(routers) == 4
    assert all(torch.equal(start[name], end[name]) for name in routers)
    taught = load_file(tmp_path / "taught" / "weights.safetensors")
    assert not any(torch.equal(start[name], taught[name]) for name in routers)


def test_a_run_with_a_teacher_that_was_cut_is_the_whole(run, tmp_path, monkeypatch):
    recipe = recipe_of(run, "trainer.max_steps=6")
    expected = train(recipe, tmp_path / "whole")
    with killed_after(monkeypatch, 4):
        train(recipe, tmp_path / "cut")
    assert timeless(train(recipe, tmp_path / "cut")) == timeless(expected)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_teacher_that_is_none_is_one_line(run, tmp_path):
    def out(name, *overrides):
        train(recipe_of(run, "trainer.max_steps=1", *overrides), tmp_path / name)

    with refused(f"prior_teacher={tmp_path}: no recipe.yaml and weights.safetensors there"):
        out("a", f"prior_teacher={tmp_path}")
    with refused("prior_teacher works in eager mode only"):
        out("b", "trainer.compile=true")
    with refused("prior_teacher reads whole experts"):
        prior_callbacks(recipe_of(run, "trainer.strategy=fsdp2"))
    with refused("none of its dense layers is a mixture in this model"):
        out("c", f"prior_teacher={run.with_name('dense-factor_llm')}")
    convert_run(run, to="upcycle", out=tmp_path / "up", n_experts=2)
    with refused("2 experts of 48 neurons are no split of its FFN of 48"):
        said = [f"prior_teacher={run}", "trainer.max_steps=1"]
        train(load.load(tmp_path / "up" / "recipe.yaml", said), tmp_path / "d")
