"""Spark attention against a loop over queries and keys, and what must hold of it."""

from dataclasses import replace
from math import sqrt
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import Attention, AttentionConfig
from zoo.cache import LayerCache
from zoo.generate import generate
from zoo.model import LanguageModel, ModelConfig, build, model_cost
from zoo.rotary import rope_tables, rotate
from zoo.spark_attention import SparkAttention, SparkAttentionConfig

CONFIG = SparkAttentionConfig(d_model=24, n_heads=4, n_kv_heads=2, d_head=8, top_k=3)
MODEL = ModelConfig(
    vocab_size=17, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, max_seq_len=32,
    init_std=0.3, ffn={"name": "swiglu", "d_ff": 32},
    mixer={"name": "spark_attention", "top_k": 3, "split": 2},
)  # fmt: skip
CPU = torch.device("cpu")


def tables(config, length, start=0):
    return config.rope(start, length, 10000.0, CPU)


def mix(attention, q, k, v, mask, cache):
    """Keys and values as they come from the matrix."""
    return attention.mix(q, *attention.kept_as(k, v), mask, cache)


def predicted(config, q, k):
    return SparkAttention(config)._predicted(q, k[..., : config.r], None)


def tokens(b=2, s=12):
    return torch.randint(MODEL.vocab_size, (b, s))


def norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x, position, r):
    """Both parts of one head, each by the angles of a vector of its length. x: [h]."""
    out = []
    for part in (x[:r], x[r:]):
        n = len(part)
        angle = position * 10000.0 ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
        a, b = part[: n // 2], part[n // 2 :]
        out += [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
    return torch.cat(out)


def kept_of(s1, k):
    """Which of the logits that a query sees stay."""
    n = len(s1)
    if n <= k:
        return torch.ones(n, dtype=torch.bool)
    theta = s1.mean() + s1.var(correction=0).sqrt() * NormalDist().inv_cdf(1 - k / n)
    return (s1 > theta) | (s1 == s1.max())


def reference(attention, x, real=None):
    """One head and one query after another, in float64. real: [B, S] bool."""
    c = attention.config
    h, r, scales = c.d_head, c.r, c.scales
    y = torch.zeros(*x.shape[:2], c.n_heads, h, dtype=torch.float64)
    qkv = (x @ attention.qkv.weight.T).unflatten(-1, (-1, h))
    for b in range(x.shape[0]):
        for i in range(c.n_heads):
            j = c.n_heads + i // (c.n_heads // c.n_kv_heads)
            q, k, v = qkv[b, :, i], qkv[b, :, j], qkv[b, :, j + c.n_kv_heads]
            if c.qk_norm:
                q, k = norm(q, attention.q_norm.weight), norm(k, attention.k_norm.weight)
            q, k = (torch.stack([turned(t[p], p, r) for p in range(len(t))]) for t in (q, k))
            for t in range(x.shape[1]):
                seen = [u for u in range(t + 1) if real is None or real[b, u] or u == t]
                s1 = k[seen, :r] @ q[t, :r] * scales[0]
                kept = kept_of(s1.detach(), c.top_k)
                weights = s1[kept].softmax(-1)
                gates = (1 + (k[seen, r:] @ q[t, r:] * scales[1]).exp()).log()[kept]
                y[b, t, i] = (weights * gates) @ v[seen][kept]
    return y.flatten(-2) @ attention.out.weight.T


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"split": 2},
        {"split": 6, "qk_norm": True},
        {"n_kv_heads": 4, "predictor_scale": 1.5, "gate_scale": 0.25},
        {"n_kv_heads": 1, "top_k": 1},
        {"top_k": 9},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_forward_and_gradients_are_the_equation(change, padded):
    attention = SparkAttention(replace(CONFIG, **change)).double()
    if attention.config.qk_norm:
        torch.nn.init.normal_(attention.q_norm.weight)
        torch.nn.init.normal_(attention.k_norm.weight)
    x, probe = torch.randn(2, 2, 11, 24, dtype=torch.float64)
    real = mask = None
    if padded:
        real = torch.tensor([[False] * 2 + [True] * 9, [True] * 8 + [False] * 3])
        seen = torch.ones(11, 11, dtype=torch.bool).tril() & real[:, None]
        mask = (seen | torch.eye(11, dtype=torch.bool))[:, None]
    results = []
    for run in (
        lambda: attention(x, tables(attention.config, 11), mask),
        lambda: reference(attention, x, real),
    ):
        attention.zero_grad()
        y = run()
        (y * probe).sum().backward()
        results.append((y, {n: p.grad.clone() for n, p in attention.named_parameters()}))
    assert_close(*results, rtol=1e-5, atol=1e-6)  # tables of angles are float32


def test_few_keys_are_all_kept_exactly():
    c = replace(CONFIG, top_k=6)
    attention = SparkAttention(c)
    q, k, v = torch.randn(2, 4, 6, 8), *torch.randn(2, 2, 2, 6, 8)
    got = mix(attention, q, k, v, None, None)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    causal = torch.ones(6, 6).tril().bool()
    s1 = (q[..., :4] @ k[..., :4].mT / 2).masked_fill(~causal, -torch.inf)
    assert_close(got, (s1.softmax(-1) * F.softplus(q[..., 4:] @ k[..., 4:].mT / 2)) @ v)


def test_one_key_is_weighed_by_softplus_alone():
    # the weights of a query sum to what its gates say, not to 1
    attention = SparkAttention(CONFIG)
    q, k, v = torch.randn(3, 1, 4, 1, 8)
    y = mix(attention, q, k[:, :2], v[:, :2], None, None)
    gate = F.softplus((q[..., 4:] * k[:, :2, :, 4:].repeat_interleave(2, 1)).sum(-1) / 2)
    assert_close(y, gate[..., None] * v[:, :2].repeat_interleave(2, 1))


@pytest.mark.parametrize("r", [2, 4, 6])
def test_each_part_turns_as_a_vector_of_its_own(r):
    c = replace(CONFIG, split=r)
    x = torch.randn(1, 2, 5, 8)
    parts = [
        rotate(t, *rope_tables(3, 5, t.shape[-1], 10000.0, CPU)) for t in x.split((r, 8 - r), -1)
    ]
    got = SparkAttention(c).turn(x, tables(c, 5, 3))
    assert_close(got, torch.cat(parts, -1), rtol=0, atol=0)
    assert (got - rotate(x, *rope_tables(3, 5, 8, 10000.0, CPU))).abs().max() > 0.1


def test_adding_a_constant_to_all_predictions_changes_nothing():
    attention = SparkAttention(CONFIG)
    q, k, v = torch.randn(2, 4, 20, 8), *torch.randn(2, 2, 2, 20, 8)
    shift = torch.cat((torch.randn(4), torch.zeros(4)))
    y = mix(attention, q, k, v, None, None)
    assert_close(mix(attention, q, k + shift, v, None, None), y, rtol=1e-4, atol=1e-5)


def test_a_key_that_is_not_kept_is_read_nowhere():
    attention = SparkAttention(CONFIG)
    q, k, v = torch.randn(1, 4, 1, 8), *torch.randn(2, 1, 2, 20, 8)
    v.requires_grad_()
    k.requires_grad_()
    kept = (
        predicted(attention.config, q, k).isfinite()[0, :, 0].unflatten(0, (2, 2)).any(1)
    )  # [G, P]
    assert 0 < kept.sum() < 20
    mix(attention, q, k, v, None, None).square().sum().backward()
    for grad in (v.grad, k.grad):
        assert grad[0][kept].ne(0).any(-1).all()
        assert not grad[0][~kept].count_nonzero()


def test_no_token_sees_a_later_one():
    attention, x = SparkAttention(CONFIG), torch.randn(2, 16, 24)
    changed = torch.cat((x[:, :10], 50 * torch.randn(2, 6, 24)), 1)
    a, b = (attention(t, tables(CONFIG, 16)) for t in (x, changed))
    assert_close(a[:, :10], b[:, :10])
    assert (a[:, 10:] - b[:, 10:]).abs().amin((0, 2)).min() > 0


def test_kept_keys_are_about_k_for_normal_logits():
    n, k, rows = 1024, 64, 400
    c = replace(CONFIG, n_heads=1, n_kv_heads=1, top_k=k)
    q, key = torch.randn(rows, 1, 1, 8), torch.randn(rows, 1, n, 8)
    counts = predicted(c, q, key).isfinite().sum(-1).double()
    p = k / n
    z = NormalDist().inv_cdf(1 - p)
    sd = sqrt(n * (p * (1 - p) - NormalDist().pdf(z) ** 2 * (1 + z**2 / 2)))
    assert abs(counts.mean() - k) < 5 * sd / sqrt(rows) + 0.5  # its mean nears k as n grows
    assert 0.8 * sd < counts.std() < 1.25 * sd


@pytest.mark.parametrize("case", ["uniform", "flat", "zero", "one far below"])
def test_no_query_is_left_without_a_key(case):
    n = 100  # a uniform row's largest entry is at mean + 1.73 std: at k / n < 4.2 % none would stay
    along = {
        "uniform": torch.linspace(-1, 1, n),
        "flat": torch.full((n,), 3.0),
        "zero": torch.zeros(n),
        "one far below": torch.cat((torch.tensor([-1e4]), torch.zeros(n - 1))),
    }[case]
    attention = SparkAttention(replace(CONFIG, n_heads=1, n_kv_heads=1, top_k=2))
    k = torch.randn(1, 1, n, 8)
    k[..., :4] = along[:, None] / 4
    q, v = torch.ones(1, 1, 1, 8, requires_grad=True), torch.randn(1, 1, n, 8)
    logits = predicted(attention.config, q, k)
    assert (
        logits.isfinite().sum()
        == {"uniform": 1, "flat": n, "zero": n, "one far below": n - 1}[case]
    )
    assert logits.argmax() == along.argmax()
    y = mix(attention, q, k, v, None, None)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert q.grad.isfinite().all()


def test_padding_is_in_no_statistic():
    c = replace(CONFIG, top_k=2)
    attention, x = SparkAttention(c), torch.randn(1, 9, 24)
    q, k, v = attention._heads(x, tables(c, 9), 4, 2)
    want = mix(attention, q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], None, None)
    k, v = k.clone(), v.clone()
    k[:, :, :3], v[:, :, :3] = 100, 100
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[3:, :3] = False
    got = mix(attention, q, k, v, mask[None, None], None)
    assert_close(got[:, :, 3:], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "change", [{}, {"split": 2, "n_kv_heads": 4}, {"n_kv_heads": 1, "top_k": 1}]
)
def test_reading_kept_positions_alone_equals_the_dense_form(dtype, padded, change):
    c = replace(CONFIG, **change)
    attention = SparkAttention(c)
    q, room = torch.randn(3, 4, 1, 8).to(dtype), 60  # more than it holds
    k, v = torch.randn(2, 3, c.n_kv_heads, 50, 8).to(dtype)
    cache = LayerCache(room)
    k, v = cache.append(*attention.kept_as(k, v))
    mask = None
    if padded:
        mask = torch.ones(3, 1, 1, 50, dtype=torch.bool)
        mask[0, ..., :20] = False
        mask[1, ..., :-1] = False
    with torch.no_grad():
        assert attention._pays(q, k)
        want = attention.mix(q, k, v, mask, None)
        got = attention._at_kept(q, k, mask, cache)
        assert_close(attention.mix(q, k, v, mask, cache), got, rtol=0, atol=0)
    assert (got.dtype, got.shape) == (dtype, q.shape)
    loose = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}  # it rounds weights
    assert_close(got, want, **loose)


@pytest.mark.parametrize("steps", [[1] * 12, [7, 1, 3, 1], [12]])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 40])
def test_cache_gives_the_logits_of_the_full_forward(steps, qk_norm, top_k, monkeypatch):
    config = replace(MODEL, qk_norm=qk_norm, mixer={"name": "spark_attention", "top_k": top_k})
    model, ids = LanguageModel(config), tokens()
    cache, sparse = model.new_cache(20), []
    at_kept = SparkAttention._at_kept
    monkeypatch.setattr(
        SparkAttention, "_at_kept", lambda *a: (sparse.append(a[1].shape), at_kept(*a))[1]
    )
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in ids.split(steps, dim=1)]
        assert_close(torch.cat(parts, 1), model(ids).logits)
    ends = [sum(steps[: i + 1]) for i in range(len(steps))]
    assert len(sparse) == 2 * sum(
        n == 1 and end > 2 * top_k for n, end in zip(steps, ends, strict=True)
    )


def test_padded_prompts_decode_like_each_alone():
    model = LanguageModel(MODEL)
    short, long = tokens(1, 5), tokens(1, 9)
    batch = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.long), short), 1), long))
    mask = torch.tensor([[False] * 4 + [True] * 5, [True] * 9])
    both = generate(model, batch, mask=mask, max_new_tokens=6, temperature=0.0)
    for row, alone in zip(both, (short, long), strict=True):
        want = generate(model, alone, max_new_tokens=6, temperature=0.0)[0]
        assert row[-6:].tolist() == want[-6:].tolist()


@pytest.mark.parametrize("heads", [2, 4])
def test_first_heads_equal_a_mixer_built_from_them(heads):
    attention, x = SparkAttention(CONFIG), torch.randn(2, 10, 24)
    small = SparkAttention(CONFIG.first(heads))
    q, k, v = attention.qkv.weight.detach().split((32, 16, 16))
    small.qkv.weight.data = torch.cat((q[: 8 * heads], k[: 4 * heads], v[: 4 * heads]))
    small.out.weight.data = attention.out.weight.detach()[:, : 8 * heads]
    rope = tables(CONFIG, 10)
    assert_close(attention(x, rope, heads=heads), small(x, rope), rtol=0, atol=0)


def test_what_is_kept_can_be_counted():
    attention, x = SparkAttention(CONFIG), torch.randn(2, 14, 24)
    counts = attention.kept(x, tables(CONFIG, 14))
    q, k, _ = attention._heads(x, tables(CONFIG, 14), 4, 2)
    for b, i, t in ((0, 0, 13), (1, 3, 8), (1, 2, 2), (0, 1, 0)):
        s1 = k[b, i // 2, : t + 1, :4] @ q[b, i, t, :4] / 2
        assert counts[b, i, t] == kept_of(s1.detach(), 3).sum()
    assert counts[..., :3].equal(torch.arange(1, 4).expand(2, 4, 3))


def test_checkpointing_changes_no_bit():
    model, ids = LanguageModel(MODEL), tokens()
    results = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        results.append((logits, {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert_close(*results, rtol=0, atol=0)


def test_compiled_mixer_gives_the_same_numbers():
    attention, rope = SparkAttention(CONFIG), tables(CONFIG, 12)
    x, probe = torch.randn(2, 2, 12, 24)
    results = []
    for run in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        attention.zero_grad()
        y = run(x, rope)
        (y * probe).sum().backward()
        results.append((y, {n: p.grad.clone() for n, p in attention.named_parameters()}))
    assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "mxfp8"])
def test_a_precision_reaches_its_leaves(precision):
    model, ids = build(MODEL, precision), tokens()
    attention = model.blocks[0].attention
    assert attention.qkv.precision is not None
    assert attention.out.precision is not None
    model(ids).logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    cache = model.new_cache(12)
    with torch.no_grad():
        decoded = torch.cat([model(part, cache=cache).logits for part in ids.split(1, 1)], 1)
        near = (decoded - model(ids).logits).abs()
    assert near.median() < 0.05  # a logit at the threshold may fall to either side


def test_cost_is_what_is_built_and_what_is_run():
    attention = SparkAttention(CONFIG)
    with FlopCounterMode(display=False) as counter:
        attention(torch.randn(2, 6, 24), tables(CONFIG, 6))
    cost = CONFIG.cost(6, causal=False)
    assert cost.flops == counter.get_total_flops() / (2 * 6)
    assert {i.name: i.params for i in cost if i.params} == {
        name: p.numel() for name, p in attention.named_parameters()
    }
    plain = AttentionConfig(d_model=24, n_heads=4, n_kv_heads=2, d_head=8)
    assert CONFIG.cost(6).flops == plain.cost(6).flops
    assert CONFIG.cost(6).params == sum(p.numel() for p in Attention(plain).parameters())
    built = {name: p.numel() for name, p in LanguageModel(MODEL).named_parameters()}
    assert {item.name: item.params for item in model_cost(MODEL, 9) if item.params} == built


def test_sparse_flops_are_the_papers():
    published = SparkAttentionConfig(d_model=2304, n_heads=8, n_kv_heads=4, d_head=256)
    n, k = 8192, 256
    assert (published.top_k, published.r) == (256, 128)
    assert published.sparse_flops(n) == 8 * (256 * n + 3 * 256 * k)  # d n + 3 d k at r = d / 2
    assert published.sparse_flops(100) == 8 * 4 * 256 * 100  # all kept: dense attention's


def test_a_saved_model_loads_equal(tmp_path):
    model, ids = LanguageModel(MODEL), tokens()
    model.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.blocks[0].attention.config.r == 2
    assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ("spark_atention", "unknown mixer 'spark_atention'. Did you mean 'spark_attention'?"),
        ({"top_k": 3}, "mixer must be a name or a mapping with 'name', got"),
        (None, "mixer must be a name or a mapping with 'name', got None"),
        ({"name": "attention", "top_k": 3}, "unknown option of mixer attention 'top_k'"),
        ({"name": "spark_attention", "topk": 3}, "Did you mean 'top_k'?"),
        (
            {"name": "spark_attention", "n_heads": 3},
            "n_heads is the model's: leave it out of mixer",
        ),
        ({"name": "spark_attention", "top_k": 0}, "top_k must be positive, got 0"),
        ({"name": "spark_attention", "top_k": 2.5}, "top_k must be int, got 2.5"),
        ({"name": "spark_attention", "split": 3}, "split must be even, .*, got 3"),
        ({"name": "spark_attention", "split": 8}, r"in \(0, d_head=8\), got 8"),
        ({"name": "spark_attention", "gate_scale": -1.0}, "gate_scale must be positive, got -1.0"),
    ],
)
def test_errors_at_the_door(mixer, message):
    with pytest.raises(ValueError, match=message):
        replace(MODEL, mixer=mixer)
