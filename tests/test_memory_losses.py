"""Losses of Tucker-decomposed keys: balance, penalty on the cores (memory.md 5.7, 6.7)."""

import pytest
import torch
from memory_toys import leading, rms, small
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import zoo
from layers.memory import TuckerKeys, TuckerKeysConfig
from layers.memory.losses import core_penalty, key_balance
from zoo.model import ModelConfig

BOTH = {"key_balance": "paper", "core_margin": 0.15}
every_row = pytest.mark.parametrize("name", ["ultramem", "ultramem_v2"])


@pytest.mark.parametrize(("form", "even"), [("paper", 3.0), ("release", 1.0)])
def test_balance_of_even_use_and_of_collapse(form, even):
    n, heads, m = 12, 2, 3
    chosen = (torch.arange(n)[:, None] + torch.arange(m)) % n  # each key by m of n tokens
    chosen = chosen[:, None].expand(-1, heads, -1)
    assert key_balance(torch.zeros(n, heads, n), chosen, form).item() == pytest.approx(even)
    along = torch.full((n, heads, n), -50.0)
    along[..., :m] = 50.0  # all tokens like, and choose, the same keys
    loss = key_balance(along, torch.arange(m).expand(n, heads, m), form)
    assert loss.item() == pytest.approx(even * n / m)


def test_a_head_of_even_use_makes_no_other_even():
    along = torch.zeros(12, 2, 12)
    along[:, 1] = -50.0
    along[:, 1, :3] = 50.0
    even = (torch.arange(12)[:, None] + torch.arange(3)) % 12
    chosen = torch.stack((even, torch.arange(3).expand(12, 3)), 1)
    assert key_balance(along, chosen, "release").item() == pytest.approx((1 + 12 / 3) / 2)


def by_hand(keys, q, form):
    """Token by token; the counts are whole numbers, which hand no gradient on."""
    c, gain, loss = keys.config, keys.norm.weight, 0
    for head in range(c.heads):
        vectors = leading(keys.cores[:, head].sum(0))
        for side in (0, 1):
            counts, probs = [0] * c.n_keys, [0] * c.n_keys
            for token in q:
                of_rank = token.view(2, -1, c.d_key)[side].expand(c.rank, -1)
                along = [
                    sum(
                        vectors[side][a] * (rms(keys.weight[side, a, head, i], gain) @ of_rank[a])
                        for a in range(c.rank)
                    )
                    for i in range(c.n_keys)
                ]
                for i in sorted(range(c.n_keys), key=lambda i, v=along: -v[i])[: c.looks_at]:
                    counts[i] += 1
                powers = [torch.exp(s) for s in along]
                probs = [p + s / sum(powers) for p, s in zip(probs, powers, strict=True)]
            per = len(q) if form == "paper" else sum(counts)
            products = zip(counts, probs, strict=True)
            loss = loss + c.n_keys * sum(f / per * p / len(q) for f, p in products) / c.heads
    return loss


@pytest.mark.parametrize("form", ["paper", "release"])
@pytest.mark.parametrize("query", ["per_rank", "shared"])
def test_balance_of_the_search_and_its_gradient_through_p_alone(form, query):
    config = TuckerKeysConfig(heads=2, n_keys=5, d_key=3, top_k=3, sub_top_k=2, query=query)
    keys = TuckerKeys(config).double()
    q = torch.randn(4, config.queries, 3, dtype=torch.float64, requires_grad=True)
    hits, loss = keys.balanced(q, form)
    plain = keys(q)
    assert torch.equal(hits.slots, plain.slots)
    assert torch.equal(hits.scores, plain.scores)
    expected = by_hand(keys, q, form)
    assert_close(loss, expected)
    inputs = [q, keys.weight, keys.norm.weight]
    got = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert_close(got, torch.autograd.grad(expected, inputs))
    assert torch.autograd.grad(loss, keys.cores, allow_unused=True) == (None,)


def test_balance_counts_no_padding():
    keys = TuckerKeys(TuckerKeysConfig(heads=2, n_keys=8, d_key=4, top_k=3))
    q, mask = torch.randn(20, 4, 4), torch.rand(20) > 0.4
    assert_close(keys.balanced(q, "paper", mask)[1], keys.balanced(q[mask], "paper")[1])
    assert keys.balanced(q, "paper", torch.zeros(20, dtype=torch.bool))[1] == 0
    assert keys.balanced(q[:0], "release")[1] == 0


def test_penalty_of_singular_values_above_the_margin():
    u, v = (torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64)).Q for _ in range(2))
    values = torch.tensor([[3.0, 1.0, 0.1], [2.0, 0.5, 0.25]], dtype=torch.float64)
    core = u @ torch.diag_embed(values) @ v.mT
    expected = (0.85**2 + 0 + 0.35**2 + 0.1**2) / 4  # the first of each head is free
    assert core_penalty(core, 0.15).item() == pytest.approx(expected)
    assert core_penalty(core[..., :1] @ core[..., :1, :], 0.0).item() == pytest.approx(0, abs=1e-12)
    assert core_penalty(core.bfloat16(), 0.15).dtype == torch.float32
    assert gradcheck(lambda c: core_penalty(c, 0.15), core.requires_grad_())
    even = torch.eye(2, dtype=torch.float64)[None].requires_grad_()
    core_penalty(even, 0.15).backward()  # equal values have vectors of no definite direction
    assert even.grad.isfinite().all()


@every_row
def test_a_layer_reports_what_it_is_asked_for_in_training_alone(name):
    plain, asked = small(name), small(name, **BOTH)
    asked.load_state_dict(plain.state_dict())
    x, mask = torch.randn(2, 9, 16), torch.rand(2, 9) > 0.4
    assert plain(x).losses is None
    out = asked(x, mask=mask)
    assert sorted(out.losses) == ["core_penalty", "key_balance"]
    assert all(loss.ndim == 0 for loss in out.losses.values())
    assert torch.equal(out.y, plain(x, mask=mask).y)
    other = torch.where(mask[..., None], x, torch.nan)
    assert_close(asked(other, mask=mask).losses, out.losses)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(asked(x).y, plain(x).y)
    assert asked.eval()(x).losses is None
    for option, value in sorted(BOTH.items()):
        alone = small(name, **{option: value})
        alone.load_state_dict(plain.state_dict())
        (loss,) = alone(x, mask=mask).losses.values()
        assert loss == out.losses["core_penalty" if option == "core_margin" else option]


@every_row
def test_recomputed_and_compiled_losses_are_the_plain_ones(name):
    layer, x = small(name, **BOTH), torch.randn(2, 6, 16)

    def gradients(forward):
        layer.zero_grad()
        losses = forward(x).losses
        sum(losses.values()).backward()
        read = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        return losses, read

    plain = gradients(layer)
    assert {"memory.keys.cores", "memory.keys.weight", "memory.query.proj.weight"} <= set(plain[1])
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert_close(again, plain, rtol=0, atol=0)
    assert_close(gradients(torch.compile(layer, backend="eager")), plain)


def test_a_model_means_them_over_the_layers_that_report():
    ultra = {"name": "ultramem", "d_ff": 64, "n_keys": 4, "top_k": 4, "d_key": 4, "d_value": 8}
    rules = [{**ultra, **BOTH, "skip": 1, "layers": ":2"}, {"name": "swiglu", "d_ff": 48}]
    sizes = {"vocab_size": 32, "d_model": 16, "n_layers": 4, "n_heads": 2, "max_seq_len": 16}
    model = zoo.build(ModelConfig(**sizes, ffn=rules))
    losses = model(torch.randint(0, 32, (2, 8))).losses
    cores = [block.ffn.memory.keys.cores.sum(0) for block in list(model.blocks)[:2]]
    expected = sum(core_penalty(core, 0.15) for core in cores) / 2
    assert_close(losses["core_penalty"], expected)
    assert 0 < losses["key_balance"] <= 2 * 8  # n at most, a side


@every_row
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_balance": "even"}, "unknown key_balance 'even'"),
        ({"key_balance": "paper", "search": "signed"}, "looks at the lowest too"),
        ({"core_margin": -0.1}, "core_margin must not be negative"),
        ({"core_margin": 0.15, "rank": 1}, "rank=1"),
    ],
)
def test_refused_at_the_door(name, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.resolve(name, d_model=16, **options)
