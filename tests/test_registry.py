"""The door: names, aliases, presets, routers, types, other people's rows, equal budgets."""

import dataclasses

import pytest
import torch

import zoo
import zoo.registry as registry
from layers.swiglu import SwiGLU
from recipes import show
from zoo.catalogue import FFNS, ROUTERS

TINY = {"d_model": 32, "d_expert": 32, "n_experts": 4}


class Point:
    """An entry point of another package, already found."""

    def __init__(self, loaded):
        self.loaded = loaded

    def load(self):
        return self.loaded


@pytest.fixture
def plug(monkeypatch):
    """Install rows as if another package had declared them."""

    def install(*loaded):
        registry._plugins.cache_clear()
        points = [Point(rows) for rows in loaded]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)

    yield install
    registry._plugins.cache_clear()


def row(name, **changes):
    base = next(entry for entry in FFNS if entry.name == "swiglu")
    return dataclasses.replace(base, name=name, presets={}, **changes)


def test_names_are_rows_and_globs_work():
    assert zoo.names() == sorted(entry.name for entry in FFNS)
    assert zoo.names("moe*") == ["moe", "moe_plus_plus"]
    assert zoo.names("nothing*") == []
    assert zoo.names(kind="router") == sorted(entry.name for entry in ROUTERS)


def test_aliases_mean_the_row():
    assert type(zoo.create("moe++", **TINY)) is type(zoo.create("moe_plus_plus", **TINY))
    assert zoo.describe("moe++").name == "moe_plus_plus"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.create("moe_swigu", d_model=8), "Did you mean 'moe_swiglu'"),
        (lambda: zoo.describe("swiglo"), "Did you mean 'swiglu'"),
        (lambda: zoo.create("swiglu"), "swiglu needs d_model"),
        (lambda: zoo.create("swiglu", d_model=8, d_fff=8), "Did you mean 'd_ff'"),
        (lambda: zoo.create("swiglu", d_model="8"), "d_model must be int, got '8'"),
        (lambda: zoo.create("swiglu", d_model=8.0), "d_model must be int, got 8.0"),
        (lambda: zoo.create("swiglu", d_model=True), "d_model must be int, got True"),
        (lambda: zoo.create("swiglu", d_model=-8), "d_model must be positive"),
        (lambda: zoo.create("swiglu", d_model=8, activation="sulu"), "Did you mean 'silu'"),
        (lambda: zoo.create("swiglu", d_model=8, preset="gegl"), "Did you mean 'geglu'"),
        (lambda: zoo.create("swiglu", d_model=8, router="top_k"), "routes nothing"),
        (lambda: zoo.create("moe", **TINY, router="topk"), "Did you mean 'top_k'"),
        (lambda: zoo.create("moe", **TINY, router={"jitter": 0.1}), "router needs 'name'"),
        (lambda: zoo.create("moe", **TINY, router={"name": "top_k", "jiter": 0.1}), "'jitter'"),
        (lambda: zoo.create("moe", **TINY, router={"name": "top_k", "top_k": 3}), "contradicts"),
        (lambda: zoo.create("moe", **TINY, top_k=5), "at most n_experts=4"),
        (lambda: zoo.create("moe", **TINY, top_k=1), "renormalize"),
        (lambda: zoo.create("moe", **TINY, precision="nvfp5"), "Did you mean 'nvfp4'"),
        (lambda: zoo.set_precision(zoo.create("mlp", d_model=8), "bf16", where="x"), "no leaf"),
        (lambda: zoo.names(kind="ruoter"), "Did you mean 'router'"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_options_reach_the_config_that_has_them():
    choice = zoo.resolve("moe", **TINY, renormalize=False, router={"name": "top_k", "jitter": 0.1})
    assert choice.config.n_experts == choice.router_config.n_experts == 4
    assert choice.router_config.renormalize is False
    assert choice.router_config.jitter == 0.1
    shared = zoo.resolve("moe_plus_plus", **TINY, tau=0.5)
    assert shared.config.tau == shared.router_config.tau == 0.5


def test_an_option_wins_over_its_preset():
    assert zoo.resolve("swiglu", d_model=8, preset="geglu").config.activation == "gelu"
    choice = zoo.resolve("swiglu", d_model=8, preset="geglu", activation="relu")
    assert choice.config.activation == "relu"
    released = zoo.resolve("moe_plus_plus", d_model=8, preset="released")
    assert released.router_config.weights == "released"


def test_the_paper_is_the_default_of_moe_plus_plus():
    assert zoo.resolve("moe_plus_plus", d_model=64) == zoo.resolve(
        "moe_plus_plus", d_model=64, preset="paper"
    )


def test_another_router_by_name():
    ffn = zoo.create(
        "moe", **TINY, router={"name": "pathway", "n_zero": 0, "n_copy": 0, "n_constant": 0}
    )
    assert type(ffn.router).__name__ == "PathwayRouter"
    assert ffn(torch.randn(1, 3, 32)).y.isfinite().all()


def test_another_package_adds_rows(plug):
    plug(row("theirs", aliases=("yours",)), [row("mine"), row("r", kind="router")])
    assert {"theirs", "mine"} <= set(zoo.names())
    assert "r" in zoo.names(kind="router")
    assert isinstance(zoo.create("yours", d_model=8), SwiGLU)
    assert zoo.describe("mine").name == "mine"
    model = zoo.build({"model": {"d_model": 32, "n_heads": 2, "n_layers": 1, "ffn": "theirs"}})
    assert isinstance(model.blocks[0].ffn, SwiGLU)


def test_a_row_that_owns_its_norm_gets_the_raw_residual(plug):
    plug(row("raw", own_norm=True))
    model = zoo.build(
        {"model": {"d_model": 32, "n_heads": 2, "n_layers": 2, "ffn": ["raw", "mlp"]}}
    )
    norms = [name for name, _ in model.named_parameters() if "ffn_norm" in name]
    assert norms == ["blocks.1.ffn_norm.weight"]
    assert {i.name for i in model.cost() if i.params} == {n for n, _ in model.named_parameters()}


def test_a_name_that_exists_twice_is_an_error(plug):
    plug(row("moe"))
    with pytest.raises(ValueError, match="two ffn entries are named 'moe'"):
        zoo.names()


def test_a_row_must_name_a_real_width():
    with pytest.raises(ValueError, match="width 'd_f' is no field"):
        row("swiglu2", width="d_f")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.match("moe", d_model=32), "takes one of"),
        (lambda: zoo.match("moe", d_model=32, flops=1e6, params=1e6), "takes one of"),
        (lambda: zoo.match("moe", d_model=32, d_expert=8, flops=1e6), "do not give it"),
        (lambda: zoo.match("moe", d_model=32, flops=-1.0), "target must be positive"),
        (lambda: zoo.match("swiglu", d_model=512, flops=10.0), "no width comes within 2.0%"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_met_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "mxfp4", "nvfp4"])
def test_bytes_follow_the_storage_precision(precision):
    bits = {"fp32": 32, "bf16": 16, "mxfp4": 4.25, "nvfp4": 4.5}[precision]
    cost = zoo.cost("swiglu", d_model=64, d_ff=96, precision=precision)
    assert cost.weight_bytes == pytest.approx(3 * 64 * 96 * bits / 8)
    assert cost.weight_bytes_at(16) == pytest.approx(cost.weight_bytes / 16)


def test_bytes_of_experts_follow_how_many_a_batch_touches():
    cost = zoo.cost("moe", d_model=64, d_expert=32, n_experts=8, top_k=2).by_role()["expert"]
    expert = 3 * 64 * 32 * 2
    assert cost.weight_bytes == pytest.approx(2 * expert)
    draws = torch.stack([torch.randperm(8)[:2] for _ in range(4 * 4000)]).view(4000, 8)
    touched = torch.tensor([len(set(draw.tolist())) for draw in draws]).float().mean()
    assert cost.weight_bytes_at(4) == pytest.approx(touched.item() * expert / 4, rel=0.01)
    assert cost.weight_bytes_at(4096) == pytest.approx(8 * expert / 4096)


def test_a_router_and_a_variant_of_one_name_have_a_card_each(capsys):
    shared = sorted(set(zoo.names()) & set(zoo.names(kind="router")))
    assert "remoe" in shared
    for name in shared:
        assert zoo.describe(name).kind == zoo.describe(name, "ffn").kind == "ffn"
        assert zoo.describe(name, "router").kind == "router"
    show.catalogue("remoe", as_json=False)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("remoe")]
    assert len({row.split("  ", 3)[-1] for row in rows}) == 2
    with pytest.raises(ValueError, match="unknown kind of entry"):
        zoo.describe("remoe", "routers")
