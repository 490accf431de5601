"""What holds of every memory layer as a whole: pools, counts, precisions, inits (memory.md 11)."""

import copy
import math

import pytest
import torch
from memory_toys import small
from torch.testing import assert_close

import zoo
from layers.memory import Pool, PoolConfig, slot_usage
from layers.memory.beside import split
from layers.pkm import PKM, PKMConfig

NAMES = ("memory_plus", "peer", "pkm", "ultramem", "ultramem_v2")
every_row = pytest.mark.parametrize("name", NAMES)


@every_row
def test_a_shared_pool_counts_once_and_adds_up_gradients(name):
    own = small(name)
    config = zoo.resolve(
        name, d_model=16, n_keys=6, top_k=4, d_key=4, pool="shared",
        **({"d_ff": 64} if "ultra" in name else {}),
    ).config  # fmt: skip
    model = torch.nn.Module()
    model.pool = Pool(config.parts.pool)
    model.layers = torch.nn.ModuleList(type(own)(config, model.pool) for _ in range(3))
    rows = {n: p.numel() for n, p in own.named_parameters() if ".pool." in n}
    rest = sum(p.numel() for p in own.parameters()) - sum(rows.values())
    assert sum(p.numel() for p in model.parameters()) == sum(rows.values()) + 3 * rest
    assert len(model.state_dict()) == len(set(model.state_dict()))
    assert config.cost().params == rest
    assert config.cost().flops == own.config.cost().flops
    x, alone = torch.randn(2, 5, 16), []
    for layer in model.layers:
        model.zero_grad()
        layer(x).y.sum().backward()
        alone.append(model.pool.values.weight.grad.clone())
    model.zero_grad()
    sum(layer(x).y.sum() for layer in model.layers).backward()
    assert_close(model.pool.values.weight.grad, sum(alone))
    copied = copy.deepcopy(model)
    assert copied.layers[0].memory.values() is copied.pool
    with pytest.raises(ValueError, match="none was handed in"):
        type(own)(config)
    with pytest.raises(ValueError, match="one was handed in"):
        type(own)(own.config, model.pool)
    with pytest.raises(ValueError, match="the layer reads a pool of"):
        type(own)(config, Pool(PoolConfig(n_rows=3, d_value=16)))


@every_row
def test_slots_are_counted_in_evaluation_alone_and_padding_never(name):
    layer = small(name)
    x, mask = torch.randn(2, 9, 16), torch.rand(2, 9) > 0.4
    assert layer(x, mask=mask).stats is None
    slots = layer.eval()(x, mask=mask).stats["slots"]
    hits = layer.config.heads * layer.config.top_k
    assert slots.sum() == mask.sum() * hits
    assert slots.shape == (layer.config.parts.pool.n_rows,)
    parts = [layer(x[i : i + 1], mask=mask[i : i + 1]).stats["slots"] for i in range(2)]
    assert torch.equal(sum(parts), slots)


def test_usage_and_unevenness():
    assert [v.item() for v in slot_usage(torch.full((8,), 5))] == pytest.approx([1.0, 0.0])
    one = torch.zeros(8)
    one[3] = 4
    assert [v.item() for v in slot_usage(one)] == pytest.approx([1 / 8, math.log(8)])


@every_row
def test_scores_are_float32_under_every_precision_and_autocast(name):
    layer, found = small(name), []
    layer.memory.keys.register_forward_hook(lambda m, args, out: found.append(out.scores.dtype))
    zoo.set_precision(layer, "nvfp4")
    layer(torch.randn(1, 3, 16).bfloat16())
    zoo.set_precision(layer, "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 3, 16))
    assert found == [torch.float32] * 2


@every_row
def test_built_on_meta_and_reset_nothing_is_left_unwritten(name):
    with torch.device("meta"):
        layer = small(name)
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else -1)
    for module in reversed(list(layer.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for key, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        assert tensor.isfinite().all(), key
        assert tensor.is_floating_point() or (tensor >= 0).all(), key
    assert layer(torch.randn(1, 3, 16)).y.isfinite().all()


def test_how_memory_and_ffn_share_a_layer():
    for share in (0.1, 0.17, 0.5):
        got = split(64, 512, share, None, lambda d_key: 1000.0 * d_key + 500)
        whole = 6 * 64 * got.d_ffn + 1000 * got.d_key + 500
        assert whole == pytest.approx(6 * 64 * 512, rel=0.02)
        assert (1000 * got.d_key + 500) / whole == pytest.approx(share, abs=0.02)
    assert split(64, 512, None, 40, lambda d_key: 384.0 * d_key) == (472, 40)
    for share, d_key, message in ((0.2, 8, "give one"), (1.5, None, "in .0, 1."), (None, 600, "F")):
        with pytest.raises(ValueError, match=message):
            split(64, 512, share, d_key, lambda d_key: 384.0 * d_key)


@every_row
def test_presets_are_configs_that_hold(name):
    presets = zoo.describe(name).presets
    assert "paper" in presets
    for preset in presets:
        cost = zoo.resolve(name, preset=preset, d_model=768).cost()
        assert cost.active_params < cost.params


def test_published_sizes_of_ultramem_v2():
    """227M/1.2B: 20 tables of 360^2 rows, each layer sees half of them (memory.md 6.3, 6.9)."""
    config = zoo.resolve(
        "ultramem_v2", d_model=768, n_keys=360, n_tables=20, table=3, share=0.5, d_key=192,
        d_value=192, d_input=192, d_ff=4096, pool="shared",
    ).config  # fmt: skip
    assert config.parts.keys.n_keys == 2 * 1138
    assert config.window == (3 * 360**2, 1138**2, 20 * 360**2)
    pool = config.parts.pool.cost_of(0)
    assert pool.params == 20 * 360**2 * 384
    # section 6.5: 4 d r kd + 4 n r kd + 2 d (D_p + D_v) + 2 m D_p, values summed without a matmul
    flops = 4 * 768 * 2 * 192 + 4 * 2276 * 2 * 192 + 2 * 768 * 384 + 2 * 32 * 192
    assert config.parts.cost().flops == flops


def test_pkm_leaves_out_a_bias_that_batch_norm_would_take_off():
    assert PKM(PKMConfig(d_model=16)).memory.query.proj.bias is None
    assert PKM(PKMConfig(d_model=16, query_norm="none")).memory.query.proj.bias is not None
