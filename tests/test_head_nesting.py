"""The first heads of a mixer are a mixer: its outputs, gradients, cache, precision and errors."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import zoo
from zoo.attention import Attention, AttentionConfig
from zoo.cache import LayerCache
from zoo.model import LanguageModel, ModelConfig
from zoo.precision import set_precision

CONFIG = AttentionConfig(d_model=24, n_heads=6, n_kv_heads=3, d_head=8, qk_norm=True)
MODEL = ModelConfig(
    vocab_size=17, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=24, init_std=0.3,
    ffn={"name": "swiglu", "d_ff": 32},
)  # fmt: skip
HEADS = pytest.mark.parametrize("heads", [2, 4, 6])


def tables(length, start=0):
    return CONFIG.rope(start, length, 10000.0, torch.device("cpu"))


def random_norms(attention):
    for norm in (attention.q_norm, attention.k_norm):
        torch.nn.init.normal_(norm.weight)
    return attention


def built(attention, heads):
    """A mixer of the first heads' weights, taken by hand."""
    c = attention.config
    small = random_norms(Attention(c.first(heads)))
    g = heads // (c.n_heads // c.n_kv_heads)
    q, k, v = attention.qkv.weight.split([n * 8 for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])
    weights = {
        "qkv.weight": torch.cat((q[: 8 * heads], k[: 8 * g], v[: 8 * g])),
        "out.weight": attention.out.weight[:, : 8 * heads],
        "q_norm.weight": attention.q_norm.weight,
        "k_norm.weight": attention.k_norm.weight,
    }
    small.load_state_dict({name: w.detach() for name, w in weights.items()})
    return small


@HEADS
@pytest.mark.parametrize("precision", [None, "bf16", "mxfp8", "nvfp4"])
def test_first_heads_equal_a_mixer_built_from_them(heads, precision):
    attention, x = random_norms(Attention(CONFIG)), torch.randn(2, 6, 24)
    small = built(attention, heads)
    if precision is not None:
        for module in (attention, small):
            set_precision(torch.nn.ModuleDict({"attention": module}), precision)
    assert_close(attention(x, tables(6), heads=heads), small(x, tables(6)), rtol=0, atol=0)
    differs = (attention(x, tables(6), heads=heads) - attention(x, tables(6))).abs().max()
    assert differs > 1e-2 if heads < 6 else differs == 0


@HEADS
def test_no_gradient_reaches_beyond_the_heads(heads):
    attention, x = random_norms(Attention(CONFIG)), torch.randn(2, 6, 24)
    small, probe = built(attention, heads), torch.randn(2, 6, 24)
    for module, options in ((attention, {"heads": heads}), (small, {})):
        (module(x, tables(6), **options) * probe).sum().backward()
    q, k, v = attention.qkv.weight.grad.split((48, 24, 24))
    g = heads // 2
    inside = torch.cat((q[: 8 * heads], k[: 8 * g], v[: 8 * g]))
    assert_close(inside, small.qkv.weight.grad)
    assert_close(attention.out.weight.grad[:, : 8 * heads], small.out.weight.grad)
    assert inside.ne(0).any(1).all()
    outside = (q[8 * heads :], k[8 * g :], v[8 * g :], attention.out.weight.grad[:, 8 * heads :])
    assert all(not t.count_nonzero() for t in outside)
    assert_close(attention.q_norm.weight.grad, small.q_norm.weight.grad)


def test_all_heads_take_the_path_of_none():
    attention, x = random_norms(Attention(CONFIG)), torch.randn(2, 6, 24)
    given = []
    for leaf in (attention.qkv, attention.out):
        leaf.register_forward_pre_hook(lambda module, args: given.append(len(args)))
    assert_close(attention(x, tables(6), heads=6), attention(x, tables(6)), rtol=0, atol=0)
    assert given == [1] * 4  # the input alone: no part is cut
    attention(x, tables(6), heads=4)
    assert given[4:] == [2] * 2


@pytest.mark.parametrize("heads", [[2, 4], [None, 2], [4, None]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_runs_other_heads_in_every_layer(heads, checkpointing):
    model, ids = LanguageModel(MODEL), torch.randint(17, (2, 9))
    model.activation_checkpointing = checkpointing
    model(ids, heads=heads).logits.square().mean().backward()
    for block, n in zip(model.blocks, heads, strict=True):
        used = 4 * (n or 4)
        grad = block.attention.out.weight.grad
        assert grad[:, :used].ne(0).any(0).all()
        assert not grad[:, used:].count_nonzero()
    if all(n in (None, 4) for n in heads):
        assert_close(model(ids, heads=heads).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 3, 1]])
def test_a_cache_of_fewer_heads_gives_the_logits_of_the_full_forward(steps):
    model, ids = LanguageModel(replace(MODEL, qk_norm=True)), torch.randint(17, (2, 9))
    heads = [2, None]
    cache = model.new_cache(9)
    with torch.no_grad():
        parts = [model(part, cache=cache, heads=heads).logits for part in ids.split(steps, dim=1)]
        assert_close(torch.cat(parts, 1), model(ids, heads=heads).logits)
    assert [layer.keys.shape[1] for layer in cache.layers] == [1, 2]


def test_compiled_heads_give_the_same_numbers():
    model, ids = LanguageModel(replace(MODEL, n_layers=1)), torch.randint(17, (2, 9))
    results = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        logits = run(ids, heads=[2]).logits
        logits.square().mean().backward()
        results.append((logits, {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert_close(*results, rtol=1e-5, atol=1e-5)


def test_cost_of_the_first_heads_is_that_of_the_smaller_mixer():
    small = CONFIG.first(2)
    assert (small.n_heads, small.n_kv_heads, small.d_head) == (2, 1, 8)
    assert small.cost(6).params == sum(p.numel() for p in Attention(small).parameters())
    assert small.first(2) == small
    assert CONFIG.first(6) == CONFIG


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([0, None], r"layer 0: heads must be in \[1, n_heads=4\], got 0"),
        ([None, 5], r"layer 1: heads must be in \[1, n_heads=4\], got 5"),
        ([3, None], "layer 0: heads must be a multiple of 2, the query heads that share a key"),
        ([2], "heads must have one entry for each of 2 layers, got 1"),
    ],
)
def test_heads_that_do_not_run_alone_are_refused(heads, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(MODEL)(torch.zeros(1, 3, dtype=torch.long), heads=heads)


def test_a_cache_holds_the_same_heads_throughout():
    attention, cache = Attention(CONFIG), LayerCache(8)
    x = torch.randn(1, 3, 24)
    with torch.no_grad():
        attention(x, tables(3), cache=cache, heads=2)
        for heads in (None, 4):
            with pytest.raises(ValueError, match=r"the cache holds 1 key heads and . run"):
                attention(x[:, :1], tables(1, 3), cache=cache, heads=heads)
        assert cache.length == 3
        attention(x[:, :1], tables(1, 3), cache=cache, heads=2)


def test_packed_weights_do_not_run_in_part():
    model = zoo.build(MODEL, "mxfp8")
    zoo.pack(model)
    ids = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        assert model(ids, heads=[4, 4]).logits.isfinite().all()
        with pytest.raises(ValueError, match="a packed weight does not run in part"):
            model(ids, heads=[2, 4])
