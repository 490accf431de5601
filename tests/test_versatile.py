"""VersatileFFN: what must hold whatever its weights are (adaptive_ffn.md 5.10), and its state."""

import pytest
import torch
from recipe_toys import evaluate_briefly, killed_after, refused, tiny_recipe
from test_every_variant import loss_of
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import zoo
from layers import loop_predictor
from layers.loop_predictor import Annealing
from layers.swiglu import glu
from recipes.train import train
from zoo.conversion import convert, convert_ffn

D, WIDTH, T = 8, 32, 40


def small(dtype=torch.float64, **options):
    """A layer whose logits tell tokens apart."""
    sizes = {"d_model": D, "d_ff": WIDTH, "n_experts": 4, "top_k": 2, "max_loops": 4}
    layer = zoo.create("versatile", **{**sizes, **options}).to(dtype)
    for head in (layer.router, layer.loop_predictor):
        if head is not None:
            torch.nn.init.normal_(head.weight, std=0.5)
    return layer


def inputs(dtype=torch.float64, **kwargs):
    return torch.randn(2, T // 2, D, dtype=dtype, **kwargs)


def step_of(layer, h):
    """F(h), one dense step."""
    return layer.down(glu(layer.gate_up(layer.norm(h)), layer.config.activation))


def force_loops(layer, loops):
    """Every token loops so often: a row that every other loses to, whatever the token is."""

    def forward(x):
        choice = torch.full((len(x), 1), loops - 1)
        one_hot = torch.zeros(len(x), layer.config.max_loops, dtype=x.dtype).scatter(1, choice, 1)
        return loop_predictor.Loops(choice, one_hot)

    layer.loop_predictor.forward = forward


def fixed_noise(monkeypatch, noise):
    monkeypatch.setattr(loop_predictor, "gumbel_noise", lambda like: noise.to(like))


# What is computed


def test_1_and_2_experts_add_up_to_the_dense_step():
    layer, x = small(path="width", top_k=4).eval(), inputs()
    torch.nn.init.zeros_(layer.router.weight)  # equal logits: weights of 1 / N
    assert_close(4 * layer(x).y, step_of(layer, x))


@pytest.mark.parametrize("training", [False, True])
def test_3_and_4_forced_loops(training):
    layer, x = small().train(training), inputs()
    force_loops(layer, 4)
    h = x
    for _ in range(4):
        h = h + step_of(layer, h)
    y = layer(x).y
    assert_close(y, h - x)
    torch.nn.init.normal_(layer.router.weight)  # not read where lambda is 0
    assert torch.equal(layer(x).y, y)
    force_loops(layer, 1)
    width = small(path="width").eval()
    width.load_state_dict({k: v for k, v in layer.state_dict().items() if "loop" not in k})
    assert_close(layer(x).y, 0.75 * width(x).y + 0.25 * step_of(layer, x))


@pytest.mark.parametrize("options", [{}, {"fusion": "average"}, {"path": "depth"}, {"d_expert": 5}])
@pytest.mark.parametrize("masked", [False, True])
def test_5_early_exit_is_the_full_computation(options, masked, monkeypatch):
    """Training whose noise changes no argmax computes all loops of all tokens."""
    layer, x = small(**options), inputs(requires_grad=True)
    mask = torch.rand(2, T // 2) > 0.3 if masked else None
    fixed_noise(monkeypatch, torch.zeros(()))
    full, found = layer(x, mask=mask), layer.eval()(x, mask=mask)
    assert_close(found.y, full.y)
    assert_close(found.stats, full.stats, rtol=0, atol=0)
    assert (found.stats["loops"] > 0).sum() > 2
    assert found.stats["loops"].sum() == (T if mask is None else mask.sum())
    if mask is not None:
        assert not found.y[~mask].any()


@pytest.mark.parametrize("loops", [1, 2, 4])
def test_early_exit_where_all_tokens_loop_alike_and_where_all_are_padding(loops):
    layer, x = small().eval(), inputs()
    force_loops(layer, loops)
    with FlopCounterMode(display=False) as counter:
        y = layer(x).y
    layer.train()
    assert_close(y, layer(x).y)
    router = 2 * D * 4
    assert counter.get_total_flops() == T * (router + 6 * D * WIDTH * loops)
    layer.eval()
    assert not layer(x, mask=torch.zeros(2, T // 2, dtype=torch.bool)).y.any()


@pytest.mark.slow
def test_compiled_evaluation_is_the_eager_one():
    layer, x = small().eval(), inputs()
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(x).y, layer(x).y)


def test_6_temperature_changes_gradients_alone(monkeypatch):
    layer, x = small(), inputs()
    fixed_noise(monkeypatch, loop_predictor.gumbel_noise(torch.empty(T, 4)))
    outputs, grads = [], []
    for tau in (5.0, 0.5):
        layer.loop_predictor.temperature.fill_(tau)
        layer.zero_grad()
        y = layer(x).y
        y.square().sum().backward()
        outputs.append(y)
        grads.append(layer.loop_predictor.weight.grad)
    assert torch.equal(*outputs)
    assert not torch.allclose(*grads)


def test_7_gradients_of_router_logits():
    layer, x = small(), inputs()
    kept = []

    def keep(module, args, out):
        out.logits.retain_grad()
        kept.append(out)

    layer.router.register_forward_hook(keep)
    layer(x).y.square().sum().backward()
    (routing,) = kept
    chosen = torch.zeros(T, 4, dtype=torch.bool).scatter(1, routing.experts, True)
    grad = routing.logits.grad
    assert grad.abs().sum() > 0
    assert not grad[~chosen].any()
    assert_close(grad.sum(-1), torch.zeros(T, dtype=torch.float64))


def test_8_evaluation_sends_the_predictor_no_gradient():
    layer = small().eval()
    layer(inputs()).y.square().sum().backward()
    assert layer.loop_predictor.weight.grad is None
    assert layer.router.weight.grad.abs().sum() > 0


def test_9_no_token_sees_another():
    layer, x = small().eval(), inputs()
    order = torch.randperm(T // 2)
    assert_close(layer(x[:, order]).y, layer(x).y[:, order])
    other = x.clone()
    other[0, 1:] = torch.randn(T // 2 - 1, D) * 3  # other loops all around it
    assert_close(layer(other).y[0, 0], layer(x).y[0, 0])
    with torch.no_grad():  # a step of decoding reports nothing
        alone = layer(x[:1, :1])
    assert_close(alone.y, layer(x).y[:1, :1])
    assert alone.stats is None


def test_10_one_loop_is_the_dense_step():
    for options in ({"max_loops": 1}, {"path": "depth", "loops": "fixed", "max_loops": 1}):
        for training in (False, True):
            layer, x = small(**options).train(training), inputs()
            assert_close(layer(x).y, step_of(layer, x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "nvfp4"])
def test_11_dtype_in_is_dtype_out(training, precision):
    layer = small(torch.float32).train(training)
    zoo.set_precision(layer, precision)
    for dtype in (torch.float32, torch.bfloat16):
        assert layer(inputs(dtype)).y.dtype == dtype
    assert small(torch.bfloat16).train(training)(inputs(torch.bfloat16)).y.dtype == torch.bfloat16


def test_the_heads_read_the_raw_residual_and_the_step_does_not_see_its_scale():
    layer, x = small(path="width").eval(), inputs()
    logits = layer(x).carry
    assert_close(layer(10 * x).carry, 10 * logits)
    assert_close(step_of(layer, 10 * x), step_of(layer, x), rtol=1e-4, atol=1e-5)


def test_gradients_by_finite_differences():
    """Of all that a choice lets through, in evaluation: tokens of one, two and three loops."""
    layer = small(d_model=4, d_ff=8, max_loops=3).eval()
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert layer(x).stats["loops"].all()
    names = ["gate_up.weight", "down.weight", "norm.weight", "router.weight"]
    weights = [dict(layer.named_parameters())[name] for name in names]

    def run(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,)).y

    torch.autograd.gradcheck(run, (x, *weights))


def test_the_straight_through_gradient_is_that_of_the_soft_choice(monkeypatch):
    """Finite differences of the soft mixture, whose value at the hard choice is replaced."""
    layer, x = small(), inputs()
    noise = loop_predictor.gumbel_noise(torch.empty(T, 4, dtype=torch.float64))
    fixed_noise(monkeypatch, noise)
    probe = torch.randn(T, 4, dtype=torch.float64)
    predictor, flat = layer.loop_predictor, x.flatten(0, 1)

    def soft(weight):
        scores = flat @ weight.t() + noise
        return ((scores / predictor.temperature).softmax(-1) * probe).sum()

    (predictor(flat).one_hot * probe).sum().backward()
    weight = predictor.weight.detach().clone().requires_grad_()
    assert_close(predictor.weight.grad, torch.autograd.grad(soft(weight), weight)[0])
    torch.autograd.gradcheck(soft, (weight,))


def test_sampled_loops_follow_the_softmax_of_the_logits():
    layer = small(torch.float32, max_loops=3)
    for tau in (5.0, 0.1):
        layer.loop_predictor.temperature.fill_(tau)
        counts = layer(torch.ones(1, 20_000, D)).stats["loops"]
        p = (layer.loop_predictor.weight @ torch.ones(D)).softmax(0)
        assert_close(counts / counts.sum(), p, atol=0.015, rtol=0)


def test_the_loops_loss_is_a_mean_over_real_tokens():
    layer, x = small(loops_loss=True).eval(), inputs()
    mask = torch.rand(2, T // 2) > 0.3
    assert "loops" not in small()(x).losses
    loops = layer.loop_predictor(x.flatten(0, 1)).choice.view(2, -1) + 1.0
    assert layer(x, mask=mask).losses["loops"] == pytest.approx(loops[mask].mean().item())
    layer.train()
    layer(x).losses["loops"].backward()
    assert layer.loop_predictor.weight.grad.abs().sum() > 0


def test_cost_in_evaluation_is_that_of_the_loops_that_ran():
    layer, x = small(torch.float32).eval(), inputs(torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counts = layer(x).stats["loops"].double()
    loops = (counts * torch.arange(1, 5)).sum().item() / T
    choice = zoo.resolve("versatile_ffn", d_model=D, d_ff=WIDTH, n_experts=4, top_k=2, max_loops=4)
    measured = choice.cost(loops=loops).flops
    assert measured == pytest.approx(counter.get_total_flops() / T)
    assert measured < choice.cost().flops


@pytest.mark.parametrize(
    "options",
    [{"path": "width"}, {"path": "depth"}, {"path": "depth", "loops": "fixed", "max_loops": 3},
     {"fusion": "average", "loops": "fixed"}, {"loops_loss": True}],
)  # fmt: skip
def test_controls_have_the_parts_that_they_use(options):
    sizes = {"d_model": D, "d_ff": WIDTH, "n_experts": 4, **options}
    layer, cost = zoo.create("versatile_ffn", **sizes), zoo.cost("versatile_ffn", **sizes)
    x = inputs(torch.float32)
    with FlopCounterMode(display=False) as counter:
        out = layer(x)
    assert cost.flops == counter.get_total_flops() / T
    loss_of(out, torch.linspace(-1, 1, x.numel()).view_as(x)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert {i.name: i.params for i in cost} == {n: p.numel() for n, p in layer.named_parameters()}
    assert ("counts" in out.stats) == (layer.router is not None)
    assert ("loops" in out.stats) == (layer.loop_predictor is not None)


def test_wrong_options_are_told():
    for options, message in (
        ({"path": "deep"}, "unknown path 'deep'. Did you mean 'depth'?"),
        ({"loops": "fixed"}, "set fusion='average', or path='depth'"),
        ({"n_experts": 4, "d_expert": 9}, "4 experts of d_expert=9 do not fit into d_ff=32"),
        ({"top_k": 9}, "top_k must be at most n_experts=8, got 9"),
        ({"floor": 9.0}, "floor must be at most temperature=5.0, got 9.0"),
        ({"decay": 1.5}, "decay must be in (0, 1], got 1.5"),
        ({"anneal": "never"}, "unknown anneal 'never'"),
        ({"path": "width", "loops_loss": True}, "loops_loss is of predicted loops"),
        ({"path": "depth", "router": "top_k"}, "leave out router='top_k'"),
        ({"path": "depth", "jitter": 0.1}, "leave out jitter"),
        ({"router": "llama4"}, "weighs the input of experts"),
    ):
        with refused(message):
            zoo.create("versatile_ffn", d_model=D, d_ff=WIDTH, **options)


# The temperature


def test_the_paper_s_annealing_and_one_that_fits_the_run():
    paper, whole = Annealing(), Annealing(over="run")
    tau = 5.0
    for step in range(100):
        assert paper.at(step, 10) == pytest.approx(tau)
        tau = max(tau * 0.99984, 0.1)
    assert paper.at(24_449, 25_400) == pytest.approx(0.1, rel=1e-4)
    assert paper.at(24_448, 25_400) > 0.1 == paper.at(25_000, 25_400)
    assert (whole.at(0, 7), whole.at(6, 7)) == (5.0, pytest.approx(0.1))
    assert whole.at(0, 1) == 5.0
    assert whole.at(3, 7) == pytest.approx((5.0 * 0.1) ** 0.5)


def test_12_the_temperature_is_saved_with_the_weights():
    saved, other = (zoo.create("versatile_ffn", d_model=D) for _ in range(2))
    saved.at_step(1000, 2000)
    other.load_state_dict(saved.state_dict())
    assert other.loop_predictor.temperature == pytest.approx(5 * 0.99984**1000)
    zoo.create("versatile_ffn", d_model=D, path="width").at_step(1, 2)  # has none to set


def test_a_run_that_was_killed_goes_on_along_the_annealing(tmp_path, monkeypatch):
    """That all weights are the same to the bit is tests/test_resume.py's to see."""
    evaluate_briefly(monkeypatch)
    ffn = {"name": "versatile_ffn", "d_ff": 64, "n_experts": 4, "anneal": "run"}
    short = ["model.n_layers=1", "data.seq_len=64", "data.eval_bytes_per_domain=512"]
    steps = ["trainer.max_steps=4", "trainer.checkpoint_every_steps=2"]
    recipe = tiny_recipe(ffn, *short, *steps)
    name, found = "model.blocks.0.ffn.loop_predictor.temperature", []
    for step in (2, 4):
        with killed_after(monkeypatch, step):
            train(recipe, tmp_path)
        checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        found.append(checkpoint["state_dict"][name].item())
    assert found == pytest.approx([5 * (0.1 / 5) ** (1 / 3), 0.1])


# From a dense model


def test_a_dense_ffn_converts_to_the_same_function_and_to_two_paths():
    config = {"vocab_size": 40, "d_model": D, "n_layers": 2, "n_heads": 2, "max_seq_len": 16}
    dense = zoo.build(config | {"norm_eps": 1e-5, "ffn": {"name": "swiglu", "d_ff": WIDTH}})
    for block in dense.blocks:
        torch.nn.init.uniform_(block.ffn_norm.weight, 0.5, 2)
    tokens = torch.randint(40, (2, 9))
    made = convert(dense, "versatile", path="depth", loops="fixed", max_loops=1)
    assert max(receipt.largest for receipt in made.receipts) < 1e-9
    assert_close(made.model(tokens).logits, dense(tokens).logits)
    both = convert(dense, "versatile", n_experts=4)
    assert min(receipt.mean for receipt in both.receipts) > 0.01
    for old, new in zip(dense.blocks, both.model.blocks, strict=True):
        assert torch.equal(new.ffn.gate_up.weight, old.ffn.gate_up.weight)
        assert torch.equal(new.ffn.down.weight, old.ffn.down.weight)
        assert torch.equal(new.ffn.norm.weight, old.ffn_norm.weight)
        assert new.ffn.norm.eps == 1e-5
    routers = [block.ffn.router.weight for block in both.model.blocks]
    assert not torch.equal(*routers)


def test_a_bfloat16_layer_keeps_its_dtype_and_its_heads_float32():
    dense = zoo.create("swiglu", d_model=D, d_ff=WIDTH).bfloat16()
    made = convert_ffn(dense, "versatile", n_experts=4)
    assert made.down.weight.dtype == torch.bfloat16
    assert made.router.weight.dtype == made.loop_predictor.weight.dtype == torch.float32
