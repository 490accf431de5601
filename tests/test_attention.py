"""Norm, rotation, heads and cache against their equations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from layers.norm import RMSNorm, rms_norm
from zoo.attention import Attention, AttentionConfig
from zoo.cache import LayerCache
from zoo.rotary import rope_tables, rotate

CONFIG = AttentionConfig(d_model=24, n_heads=4, n_kv_heads=2, d_head=8)
CPU = torch.device("cpu")


def tables(length, start=0, d_head=8):
    return rope_tables(start, length, d_head, 10000.0, CPU)


def test_norm_is_its_equation_and_keeps_the_dtype():
    norm = RMSNorm(16, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 16)
    want = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert_close(norm(x), want)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert_close(norm(x.bfloat16()), norm(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)


def test_gradients_of_the_norm_and_the_rotation():
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    heads = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.double() for t in tables(3))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (heads,))


def test_rotation_multiplies_by_a_complex_number_of_the_position():
    x = torch.randn(2, 3, 5, 8)
    angle = torch.outer(torch.arange(7, 12.0), 10000.0 ** (-torch.arange(4) / 4))
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(5, 4), angle)
    assert_close(rotate(x, *tables(5, start=7)), torch.cat((turned.real, turned.imag), -1))


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 64)

    def score(i, j):
        return (rotate(q, *tables(1, i, 64)) * rotate(k, *tables(1, j, 64))).sum()

    assert_close(score(5, 2), score(105, 102), atol=1e-4, rtol=1e-4)  # float32 angles near 100
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


@pytest.mark.parametrize("qk_norm", [False, True])
def test_forward_is_the_equation_head_by_head(qk_norm):
    attention = Attention(replace(CONFIG, qk_norm=qk_norm))
    if qk_norm:
        torch.nn.init.normal_(attention.q_norm.weight)
        torch.nn.init.normal_(attention.k_norm.weight)
    x = torch.randn(2, 6, 24)
    got = attention(x, tables(6))
    q, k, v = (x @ attention.qkv.weight.T).split((32, 16, 16), -1)
    heads = []
    for i in range(4):
        j = i // 2  # two query heads read each key and value head
        qi, kj, vj = q[..., 8 * i : 8 * i + 8], k[..., 8 * j : 8 * j + 8], v[..., 8 * j : 8 * j + 8]
        if qk_norm:
            qi, kj = attention.q_norm(qi), attention.k_norm(kj)
        qi, kj = (rotate(t[:, None], *tables(6))[:, 0] for t in (qi, kj))
        scores = (qi @ kj.mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ vj)
    assert_close(got, torch.cat(heads, -1) @ attention.out.weight.T)


def test_grouped_heads_equal_repeated_heads():
    grouped = Attention(CONFIG)
    full = Attention(replace(CONFIG, n_kv_heads=4))
    q, k, v = grouped.qkv.weight.detach().split((32, 16, 16))
    k, v = (t.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v))
    full.qkv.weight.data = torch.cat((q, k, v))
    full.out.weight = grouped.out.weight
    x = torch.randn(2, 7, 24)
    assert_close(grouped(x, tables(7)), full(x, tables(7)))


def test_cache_takes_room_once_and_keeps_the_dtype():
    cache = LayerCache(max_tokens=5)
    k, v = torch.randn(2, 1, 2, 3, 8, dtype=torch.bfloat16)
    cache.append(k, v)
    room = cache.keys
    keys, values = cache.append(2 * k[:, :, :2], v[:, :, :2])
    assert cache.keys is room
    assert cache.length == 5
    assert_close(keys, torch.cat((k, 2 * k[:, :, :2]), 2), rtol=0, atol=0)
    assert_close(values, torch.cat((v, v[:, :, :2]), 2), rtol=0, atol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cost_is_what_is_built_and_what_is_run(qk_norm):
    config = replace(CONFIG, qk_norm=qk_norm)
    attention = Attention(config)
    # the fused CPU kernel counts nothing; the unfused one multiplies all T keys, causal or not
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attention(torch.randn(2, 6, 24), tables(6))
    cost = config.cost(6, causal=False)
    assert cost.flops == counter.get_total_flops() / (2 * 6)
    params = {item.name: item.params for item in cost if item.params}
    assert params == {name: p.numel() for name, p in attention.named_parameters()}
    exact = sum(4 * 4 * 8 * (t + 1) for t in range(6)) / 6  # token t reads t + 1 keys
    assert config.cost(6).flops == cost.flops - 4 * 4 * 8 * 6 + exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 3}, "n_heads must be a multiple of n_kv_heads=3, got 4"),
        ({"d_head": 7}, "d_head must be even, got 7"),
        ({"n_kv_heads": 0}, "n_kv_heads must be positive, got 0"),
    ],
)
def test_errors_at_the_door(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_attention_is_causal_without_a_mask_and_reads_all_where_told():
    attention = Attention(CONFIG)
    x = torch.randn(1, 5, 24)
    y = attention(x, tables(5))
    changed = torch.cat((x[:, :4], torch.randn(1, 1, 24)), 1)
    assert_close(attention(changed, tables(5))[:, :4], y[:, :4])
    everything = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    assert (attention(x, tables(5), everything)[:, 0] - y[:, 0]).abs().max() > 1e-3
    assert_close(attention(x, tables(5), everything.tril()), y)
    assert F.mse_loss(attention(x, tables(5, start=3)), y) < 1e-10  # distances alone count
