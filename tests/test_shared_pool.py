"""Pools that several layers share: counted once, drawn once, trained by all, saved once."""

import math
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from recipe_toys import evaluate_briefly, refused, tiny_recipe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import zoo
from layers.memory import Pool
from recipes.comparison import read_comparison
from recipes.costing import whole_model_cost
from recipes.load import load
from recipes.planning import plan
from recipes.task import build_model
from recipes.train import train
from zoo.generate import generate
from zoo.model import LanguageModel, ModelConfig
from zoo.pretrained import load_weights

SHIPPED = Path(str(resources.files("recipes")))
SIZES = {"vocab_size": 32, "d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 16}
KEYS = {"n_keys": 8, "heads": 2, "top_k": 4, "d_key": 8}
PKM = {"name": "pkm", **KEYS, "query_norm": "none"}
PLUS = {"name": "memory_plus", **KEYS}
PEER = {"name": "peer", **KEYS}
ULTRA = {"name": "ultramem", "d_ff": 96, "n_keys": 4, "top_k": 4, "d_key": 8, "depth": 4}
V2 = {**ULTRA, "name": "ultramem_v2"}
every_variant = pytest.mark.parametrize(
    "ffn", [PKM, PLUS, PEER, ULTRA, V2], ids=lambda f: f["name"]
)


def config(ffn, **more):
    return ModelConfig(**{**SIZES, "ffn": ffn, **more})


def pair(ffn):
    """Two of four layers share; the others are plain."""
    return [{**ffn, "pool": "shared", "layers": "1::2"}, {"name": "swiglu", "d_ff": 48}]


def tokens():
    return torch.randint(0, SIZES["vocab_size"], (2, 12))


@every_variant
def test_a_pool_is_counted_once_and_adds_nothing_with_a_layer(ffn):
    model = zoo.build(config({**ffn, "pool": "shared"}))
    own = zoo.build(config(ffn))
    names = dict(model.named_parameters())
    assert model.cost().params == sum(p.numel() for p in names.values())
    assert {i.name for i in model.cost() if i.params} == set(names)
    pools = {n for n in names if n.startswith("pools.")}
    assert pools == {f"pools.shared.{n}" for n, _ in model.pools["shared"].named_parameters()}
    assert not [n for n in names if ".pool." in n]
    if ffn is not V2:  # there a pool has a table for each layer
        table = sum(p.numel() for n, p in names.items() if n in pools)
        assert sum(p.numel() for p in own.parameters()) - model.cost().params == 3 * table
        assert model.cost().flops == own.cost().flops
    ids = tokens()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() == ids.numel() * model.cost(12, causal=False).flops


@every_variant
def test_active_rows_are_those_that_all_layers_read(ffn):
    model = zoo.build(config({**ffn, "pool": "shared"}))
    n_rows = model.pools["shared"].config.n_rows
    read = ffn["top_k"] * ffn.get("heads", model.blocks[0].ffn.config.heads)
    items = [i for i in model.cost() if i.name.startswith("pools.")]
    assert items
    for item in items:
        assert item.active_units == min(4 * read, n_rows)
        assert item.active_params == item.active_units * item.params / n_rows


@every_variant
def test_the_gradient_of_a_pool_is_the_sum_over_its_layers(ffn):
    model = zoo.build(config(pair(ffn)))
    model.double()
    ids = tokens()

    def gradients(readers):
        """Of the pool, where the other layers read a copy of it."""
        kept = {}
        for i in (1, 3):
            memory = model.blocks[i].ffn.memory
            kept[i] = memory._shared
            if i not in readers:
                copy = Pool(memory.values().config).double()
                copy.load_state_dict(memory.values().state_dict())
                memory._shared = (copy,)
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        for i, pools in kept.items():
            model.blocks[i].ffn.memory._shared = pools
        return [p.grad.clone() for p in model.pools.parameters()]

    both, first, last = gradients((1, 3)), gradients((1,)), gradients((3,))
    for all_of_it, a, b in zip(both, first, last, strict=True):
        assert a.abs().sum() > 0
        assert b.abs().sum() > 0
        assert_close(all_of_it, a + b)


@every_variant
def test_a_sparse_gradient_of_a_pool_is_the_dense_one(ffn):
    model, ids = zoo.build(config({**ffn, "pool": "shared"})), tokens()
    gradients = []
    for sparse in (False, True):
        for table in model.pools["shared"].children():
            table.sparse = sparse
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        assert all(p.grad.is_sparse == sparse for p in model.pools.parameters())
        gradients.append([p.grad.to_dense() for p in model.pools.parameters()])
    assert_close(gradients[1], gradients[0])


@every_variant
def test_weights_hold_a_pool_once_and_load_again(ffn):
    model, other = (zoo.build(config(pair(ffn))) for _ in range(2))
    state = model.state_dict()
    assert sum("values" in name for name in state) == 1
    ids = tokens()
    assert not torch.equal(model(ids).logits, other(ids).logits)
    other.load_state_dict(state)
    assert torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)


@every_variant
def test_recomputed_gradients_are_the_plain_ones(ffn):
    model = zoo.build(config(pair(ffn), n_layers=4))
    ids = tokens()

    def gradients():
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing = True
    for name, gradient in gradients().items():
        assert torch.equal(gradient, plain[name]), name


def test_a_compiled_model_trains_its_pool():
    model = zoo.build(config(pair(PLUS)))
    ids = tokens()
    model(ids).logits.square().mean().backward()
    plain = model.pools["shared"].values.weight.grad.clone()
    model.zero_grad()
    model.compile(backend="eager")
    model(ids).logits.square().mean().backward()
    assert_close(model.pools["shared"].values.weight.grad, plain)


def test_a_precision_reaches_a_pool_once_by_its_own_name():
    model = zoo.build(config(pair(V2)))
    report = zoo.set_precision(model, "nvfp4")
    rows = [p for p in report.parameters if "values" in p.name]
    assert [p.name for p in rows] == ["pools.shared.values.weight"]
    low = {"name": "low", "default": "bf16", "rules": [{"name": "pools.*", "use": "mxfp8_e4m3"}]}
    changed = zoo.set_precision(model, low)
    formats = {p.name: p.format for p in changed.parameters if p.role == "memory_values"}
    assert len(formats) == 2
    assert all("mxfp8_e4m3" in fmt for fmt in formats.values()), formats


# Tables of a ring, and blocks of layers


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_each_layer_of_a_ring_begins_at_its_own_table(share):
    model = zoo.build(config({**V2, "pool": "ring", "share": share}))
    windows = [block.ffn.config.window for block in model.blocks]
    assert [w.offset for w in windows] == [0, 16, 32, 48]
    assert {w.n_rows for w in windows} == {model.pools["ring"].config.n_rows} == {64}
    assert {w.visible for w in windows} == {math.isqrt(int(share * 64)) ** 2}
    model.eval()
    stats = model(tokens()).stats
    for window, of in zip(windows, stats, strict=True):
        seen = {(window.offset + i) % 64 for i in range(window.visible)}
        assert set(of["slots"].nonzero().flatten().tolist()) <= seen
    if share == 1.0:
        sigmas = [block.ffn.memory.readout.expansion.sigma for block in model.blocks]
        assert not torch.equal(sigmas[0], sigmas[1])


@pytest.mark.parametrize(
    ("windows", "share", "offsets", "visible"),
    [
        ("ring", 0.5, [0, 16, 32, 48], 25),
        ("clamped", 0.5, [0, 16, 32, 39], 25),  # the last begins earlier, and so does not wrap
        ("clamped", 1.0, [0, 0, 0, 0], 64),
        ("clamped", 0.25, [0, 16, 32, 48], 16),  # its own table alone
        ("block", 0.5, [0, 0, 32, 32], 25),
        ("block", 0.25, [0, 16, 32, 48], 16),
        ("block", 1.0, [0, 0, 0, 0], 64),
    ],
)
def test_where_windows_lie(windows, share, offsets, visible):
    model = zoo.build(config({**V2, "pool": "shared", "share": share, "windows": windows})).eval()
    found = [block.ffn.config.window for block in model.blocks]
    assert found == [(offset, visible, 64) for offset in offsets]
    for window, stats in zip(found, model(tokens()).stats, strict=True):
        rows = stats["slots"].nonzero().flatten()
        if windows != "ring":
            assert window.offset + window.visible <= 64
            assert ((rows >= window.offset) & (rows < window.offset + window.visible)).all()
    sigmas = [block.ffn.memory.readout.expansion.sigma for block in model.blocks]
    assert not any(torch.equal(a, b) for i, a in enumerate(sigmas) for b in sigmas[:i])


@pytest.mark.parametrize("share", [0.67, 1 / 3, 0.1, 3.0])
def test_blocks_are_equal_and_of_whole_tables(share):
    with refused("makes no equal blocks of 4 tables: allowed are 1/1, 1/2, 1/4"):
        config({**V2, "pool": "shared", "share": share, "windows": "block"}).layers()
    with refused("unknown windows 'blocks'. Did you mean 'block'?"):
        config({**V2, "pool": "shared", "share": 0.5, "windows": "blocks"}).layers()


def test_blocks_of_layers_share_apart():
    plan = [{**V2, "pool": "early", "layers": ":2"}, {**V2, "pool": "late"}]
    model = zoo.build(config(plan))
    assert sorted(model.pools) == ["early", "late"]
    offsets = [block.ffn.config.window.offset for block in model.blocks]
    assert offsets == [0, 16, 0, 16]
    readers = [block.ffn.memory.values() for block in model.blocks]
    assert readers[0] is readers[1] is model.pools["early"]
    assert readers[2] is readers[3] is model.pools["late"]


@pytest.mark.parametrize("ffn", [ULTRA, V2], ids=lambda f: f["name"])
@pytest.mark.parametrize("init", ["paper", "release"])
def test_a_pool_is_drawn_by_its_readers_rule(ffn, init):
    more = {"n_keys": 16, "init": init, "depth": 400}
    shared = zoo.build(config({**ffn, **more, "pool": "shared"}))
    parts = {**ffn, **more, **({"n_tables": 4} if ffn is V2 else {})}
    alone = zoo.build(config(parts, n_layers=1))
    own = alone.blocks[0].ffn.memory.pool
    for p, q in zip(shared.pools["shared"].parameters(), own.parameters(), strict=True):
        assert p.std().item() == pytest.approx(q.std().item(), rel=0.2)


def test_a_model_from_the_meta_device_is_drawn_whole():
    with torch.device("meta"):
        model = LanguageModel(config(pair(V2)))
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, math.nan)
    for module in reversed(list(model.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in model.parameters())
    fresh = zoo.build(config(pair(V2)))
    stds = [m.pools["shared"].values.weight.std().item() for m in (model, fresh)]
    assert stds[0] == pytest.approx(stds[1], rel=0.2)


# At the door


def test_sizes_under_one_name_must_agree():
    plan = [{**PLUS, "pool": "shared", "layers": "0"}, {**PLUS, "n_keys": 16, "pool": "shared"}]
    with refused("layers 0 and 1 read pool 'shared'"):
        config(plan).layers()


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", 3, None])
def test_a_pool_needs_a_name_that_a_module_can_have(name):
    with refused("layer 0: pool must be 'own' or a name to share it by"):
        config({**PLUS, "pool": name}).layers()


@pytest.mark.parametrize("option", ["n_tables", "table"])
def test_the_place_in_a_ring_is_the_models(option):
    with refused(f"layer 0: {option} of a shared pool is the model's"):
        config({**V2, "pool": "ring", option: 1}).layers()


def test_what_reads_no_pool_takes_none():
    with refused("pool"):
        config({"name": "swiglu", "pool": "shared"}).layers()


# A run


def test_a_run_saves_a_pool_once_and_generates(tmp_path, monkeypatch):
    evaluate_briefly(monkeypatch)
    ffn = {"name": "memory_plus", "n_keys": 16, "top_k": 8, "pool": "shared"}
    recipe = tiny_recipe(ffn, "trainer.max_steps=4")
    result = train(recipe, tmp_path / "run")
    model = build_model(recipe)
    fresh = model.pools["shared"].values.weight.clone()
    load_weights(model, tmp_path / "run/weights.safetensors")
    assert [n for n in model.state_dict() if "values" in n] == ["pools.shared.values.weight"]
    assert (model.pools["shared"].values.weight != fresh).any(-1).sum() > 16
    assert result["cost"]["params"] == sum(p.numel() for p in model.parameters())
    prompt = torch.randint(0, 256, (1, 4))
    made = generate(model, prompt, max_new_tokens=8, temperature=0.0)
    ids = prompt
    for _ in range(8):  # without a cache
        ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], dim=-1)
    assert torch.equal(made, ids)


def test_the_comparison_of_memories_holds_flops_and_shares_tables():
    settled = plan(*read_comparison("memory"))
    assert [m.variant for m in settled.matched] == [
        "swiglu", "moe", "pkm", "peer", "memory_plus", "ultramem", "ultramem_v2"
    ]  # fmt: skip
    assert all(abs(m.residual) < 0.01 for m in settled.matched)
    assert len(settled.runs) == 2 * 7 + 2
    pools = {run.variant: {c.pool for c in run.recipe.model.layers()} for run in settled.runs}
    assert {name for name, of in pools.items() if of != {None}} == {
        "pkm", "peer", "memory_plus", "ultramem_v2"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "plain"), [("memory_plus_shared", {"name": "swiglu", "d_ff": 384}),
                        ("ultramem_v2", {"name": "swiglu", "d_ff": 512})],
)  # fmt: skip
def test_shipped_recipes_of_shared_pools_cost_what_they_say(name, plain):
    recipe = load(str(SHIPPED / f"{name}.yaml"))
    choices = recipe.model.layers()
    assert sum(choice.pool is not None for choice in choices) == 3
    flops = whole_model_cost(recipe).flops
    dense = whole_model_cost(replace(recipe, model=replace(recipe.model, ffn=plain))).flops
    assert flops == pytest.approx(dense, rel=0.02)
