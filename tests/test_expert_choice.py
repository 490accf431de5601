"""Expert choice: who is taken, thresholds that learn, what evaluation may see."""

import math
from dataclasses import replace

import pytest
import torch
from recipe_toys import tiny_recipe
from safetensors.torch import load_file
from torch.testing import assert_close

import zoo
from recipes.controllers import RouterController, controller_callbacks
from recipes.train import train
from routers.expert_choice import ExpertChoiceRouter, ExpertChoiceRouterConfig, take
from zoo.generate import generate
from zoo.model import ModelConfig, build

D, E, B, S = 16, 4, 3, 10
T = B * S
POOLS = ("micro_batch", "position", "sequence")


def make(dtype=torch.float64, **options):
    router = ExpertChoiceRouter(ExpertChoiceRouterConfig(d_model=D, n_experts=E, **options))
    router = router.to(dtype)
    torch.nn.init.normal_(router.weight)
    return router


def pools_of(pool):
    """Tokens b * S + s of each pool, in order."""
    if pool == "micro_batch":
        return [list(range(T))]
    if pool == "sequence":
        return [[b * S + s for s in range(S)] for b in range(B)]
    return [[b * S + s for b in range(B)] for s in range(S)]


def by_hand(probs, pool, top_k, mask):
    """[T][E] bool and the smallest p taken of each pool and expert, by sorting (-p, token)."""
    keep = [[False] * E for _ in range(T)]
    cuts = []
    for tokens in pools_of(pool):
        real = [t for t in tokens if mask[t]]
        slots = math.ceil(len(real) * top_k / E)
        for e in range(E):
            best = sorted(real, key=lambda t: (-probs[t][e], t))[:slots]
            for t in best:
                keep[t][e] = True
            cuts.append((e, probs[best[-1]][e] if best else 0.0))
    return keep, [sum(p for e, p in cuts if e == which) for which in range(E)]


# Who is taken


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_experts_take_their_best_tokens(pool, top_k, masked, ties):
    router, x = make(pool=pool, top_k=top_k), torch.randn(T, D, dtype=torch.float64)
    if ties:
        x = x[torch.randint(4, (T,))]  # tokens alike
    mask = torch.rand(T) > 0.4 if masked else torch.ones(T, dtype=torch.bool)
    if masked:
        mask.view(B, S)[1] = False  # a sequence of padding
        mask.view(B, S)[:, 3] = False
    routing = router(x, None, mask if masked else None, B)
    probs = (x @ router.weight.T).softmax(-1)
    keep, cuts = by_hand(probs.tolist(), pool, top_k, mask.tolist())
    assert routing.keep.tolist() == keep
    assert_close(routing.stats["cuts"], torch.tensor(cuts, dtype=torch.float64))
    n_pools = sum(any(mask[t] for t in tokens) for tokens in pools_of(pool))
    assert routing.stats["pools"] == n_pools
    assert_close(routing.weights, probs * routing.keep)
    assert routing.experts.tolist() == [list(range(E))] * T


def test_gradients_are_those_of_p_where_taken():
    router, x = make(), torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    routing, probe = router(x), torch.randn(T, E, dtype=torch.float64)
    expected = ((x @ router.weight.T).softmax(-1) * routing.keep * probe).sum()
    inputs = (x, router.weight)
    got = torch.autograd.grad((routing.weights * probe).sum(), inputs)
    assert_close(got, torch.autograd.grad(expected, inputs))
    assert set(routing.losses) == {"z"}  # nothing to balance


@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_slots_are_rounded_up(n):
    keep, _ = take(torch.rand(1, n, 3).softmax(-1), 2)
    assert keep.sum(1).tolist() == [[math.ceil(2 * n / 3)] * 3]


def test_a_layer_runs_what_is_taken_and_nothing_else():
    ffn = zoo.create("expert_choice", d_model=D, d_expert=8, n_experts=E, top_k=1).double()
    torch.nn.init.normal_(ffn.router.weight)
    x = torch.randn(B, S, D, dtype=torch.float64)
    out = ffn(x)
    assert out.stats["counts"].tolist() == [math.ceil(T / E)] * E
    expected = torch.zeros(T, D, dtype=torch.float64)
    routing = ffn.router(x.flatten(0, 1))
    for t, token in enumerate(x.flatten(0, 1)):
        for e in range(E):
            if routing.keep[t, e]:
                gate, up = (ffn.experts.gate_up.weight[e] @ token).chunk(2)
                h = torch.nn.functional.silu(gate) * up
                expected[t] += routing.weights[t, e] * (ffn.experts.down.weight[e] @ h)
    assert_close(out.y, expected.view_as(x))
    assert not routing.keep.any(-1).all()  # a token may get none, and y = 0
    assert (out.y.flatten(0, 1)[~routing.keep.any(-1)] == 0).all()


@pytest.mark.parametrize("pool", ["position", "sequence"])
def test_pools_need_to_know_the_sequences(pool):
    with pytest.raises(ValueError, match=f"pool='{pool}' needs n_sequences"):
        make(pool=pool)(torch.randn(T, D, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "batch"}, "unknown pool 'batch'"),
        ({"decision": "thresholds"}, "Did you mean 'threshold'"),
        ({"threshold_decay": 1.0}, r"threshold_decay must be in \[0, 1\), got 1.0"),
        ({"top_k": 5}, "top_k must be at most n_experts=4"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ExpertChoiceRouterConfig(d_model=D, n_experts=E, **options)


# Thresholds


def test_untrained_evaluation_takes_the_largest():
    router, x = make(top_k=2).eval(), torch.randn(T, D, dtype=torch.float64)
    routing = router(x)
    best = routing.logits.topk(2, dim=-1).indices
    expected = torch.zeros(T, E, dtype=torch.bool).scatter(1, best, True)
    assert torch.equal(routing.keep, expected)
    assert routing.stats is None


def test_evaluation_compares_with_thresholds_alone_and_with_others_too():
    router, x = make().eval(), torch.randn(T, D, dtype=torch.float64)
    router.update(torch.tensor([0.1, 0.3, 0.5, 0.0]))
    routing = router(x)
    probs = routing.logits.softmax(-1)
    assert torch.equal(routing.keep, probs >= torch.tensor([0.1, 0.3, 0.5, 0.0]))
    with torch.no_grad():
        alone = torch.cat([router(x[t : t + 1]).keep for t in range(T)])
        in_training = torch.cat([router.train()(x[t : t + 1]).keep for t in range(T)])
    assert torch.equal(alone, routing.keep)
    assert torch.equal(in_training, routing.keep)  # decoding, whatever the mode


def test_thresholds_are_a_mean_at_first_and_then_a_moving_average():
    router = make(threshold_decay=0.75)
    seen = torch.rand(8, E)
    for cuts in seen[:4]:
        router.update(cuts.double())
    assert_close(router.threshold, seen[:4].mean(0))
    expected = seen[:4].mean(0)
    for cuts in seen[4:]:
        router.update(cuts)
        expected = 0.75 * expected + 0.25 * cuts
    assert_close(router.threshold, expected)
    assert router.n_updates == 8
    assert router.bfloat16().threshold.dtype == torch.float32
    other = make()
    other.load_state_dict(router.state_dict())
    assert_close(other.threshold, expected)


def test_a_settled_threshold_keeps_the_load():
    router = make(torch.float32, top_k=2)
    with torch.no_grad():
        for _ in range(50):
            stats = router(torch.randn(512, D)).stats
            router.update(stats["cuts"] / stats["pools"])
        load = router.eval()(torch.randn(4096, D)).keep.float().mean(0)
    assert (load / 0.5 - 1).abs().max() < 0.1


def test_choice_in_evaluation_is_the_training_rule():
    router, x = make(decision="choice"), torch.randn(T, D, dtype=torch.float64)
    router.update(torch.full((E,), 0.9))
    trained, evaluated = router(x), router.eval()(x)
    assert torch.equal(trained.keep, evaluated.keep)


def test_a_step_moves_thresholds_by_the_mean_of_its_micro_batches(tmp_path):
    ffn = {"name": "expert_choice", "n_experts": 4, "top_k": 2, "d_expert": 16}
    recipe = tiny_recipe(ffn, "model.allow_noncausal=true", "trainer.max_steps=2",
                         "trainer.accumulate=2")  # fmt: skip
    (callback,) = controller_callbacks(recipe)
    assert isinstance(callback, RouterController)
    train(recipe, tmp_path)
    state = load_file(tmp_path / "weights.safetensors")
    for layer in range(2):
        threshold = state[f"blocks.{layer}.ffn.router.threshold"]
        assert state[f"blocks.{layer}.ffn.router.n_updates"] == 2
        assert ((threshold > 0.1) & (threshold < 0.6)).all()  # near 1 / E at first
        assert threshold.unique().numel() == 4


# Causality


CONFIG = ModelConfig(
    vocab_size=17, d_model=D, n_layers=2, n_heads=2, max_seq_len=24, init_std=0.3,
    ffn={"name": "expert_choice", "n_experts": E, "d_expert": 16}, allow_noncausal=True,
)  # fmt: skip


def model(**router):
    m = build(replace(CONFIG, router={"name": "expert_choice", **router}))
    for block in m.blocks:
        torch.nn.init.normal_(block.ffn.router.weight)
        block.ffn.router.update(torch.rand(E) * 0.4)
    return m


def moved_by_later_tokens(m):
    """How far logits before position 6 move when later tokens change."""
    ids = torch.randint(17, (4, 12))
    other = ids.clone()
    other[:, 6:] = (ids[:, 6:] + 1) % 17
    return (m(ids).logits[:, :6] - m(other).logits[:, :6]).abs().max().item()


@pytest.mark.parametrize("pool", POOLS)
def test_later_tokens_are_seen_in_training_alone_and_not_across_positions(pool):
    m = model(pool=pool)
    seen = moved_by_later_tokens(m)
    assert seen < 1e-5 if pool == "position" else seen > 1e-3
    assert moved_by_later_tokens(m.eval()) < 1e-5
    measured = model(pool=pool, decision="choice").eval()
    assert (moved_by_later_tokens(measured) > 1e-3) == (pool != "position")


def test_a_language_model_asks_for_it():
    strict = replace(CONFIG, allow_noncausal=False)
    with pytest.raises(ValueError, match="lets a token read later ones"):
        strict.layers()
    replace(strict, router={"name": "expert_choice", "pool": "position"}).layers()


@pytest.mark.parametrize("decision", ["choice", "threshold"])
def test_generation_is_that_of_whole_forwards(decision):
    m = model(decision=decision, pool="sequence").eval()
    assert m.tokenwise == (decision == "threshold")
    prompt = torch.randint(17, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    got = generate(m, prompt, mask=mask, max_new_tokens=6, temperature=0.0)
    expected = prompt
    for _ in range(6):
        with torch.no_grad():
            best = m(expected, mask=mask).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], dim=1)
    assert torch.equal(got, expected)
    if decision == "choice":
        with torch.no_grad(), pytest.raises(ValueError, match="without a cache"):
            m(prompt, cache=m.new_cache())
