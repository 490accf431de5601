"""Controls that a study adds to a row: choices at random, and what is left with its idea off."""

import pytest
import torch

from zoo.catalogue import FFNS
from zoo.options import field_names
from zoo.registry import resolve

ROUTED = [entry for entry in FFNS if entry.router is not None]
SWITCHED = [entry for entry in FFNS if entry.off is not None]


def left_of(entry, **options):
    settled = resolve(entry.name, **options)
    left = dict(entry.off(settled.config))
    name = left.pop("name", None)
    if name is None:
        return settled, resolve(entry.name, **{**options, **left})
    return settled, resolve(name, d_model=options["d_model"], **left)


@pytest.mark.parametrize("entry", ROUTED, ids=lambda entry: entry.name)
def test_every_routed_row_also_chooses_at_random(entry):
    options = {k: v for k, v in entry.tiny.items() if k in field_names(entry.config)}
    choice = resolve(entry.name, router="random", **options)
    x = torch.randn(2, 40, entry.tiny["d_model"])
    layer = choice.build()
    out = layer(x)
    assert torch.isfinite(out.y).all()
    counts = out.stats.get("counts")
    if counts is not None:
        assert counts.count_nonzero() == len(counts), "some expert is never drawn"


@pytest.mark.parametrize("entry", SWITCHED, ids=lambda entry: entry.name)
def test_what_is_left_is_a_layer_that_is_no_larger(entry):
    settled, left = left_of(entry, **entry.tiny)
    assert left != settled
    assert left.cost().params <= settled.cost().params
    x = torch.randn(2, 5, entry.tiny["d_model"])
    assert left.build()(x).y.shape == x.shape


def test_without_its_memory_a_layer_is_the_ffn_beside_it():
    entry = next(entry for entry in FFNS if entry.name == "ultramem_v2")
    settled, left = left_of(entry, **entry.tiny)
    assert left.config == settled.config.ffn


def test_moe_plus_plus_has_only_ffn_experts_left():
    entry = next(entry for entry in FFNS if entry.name == "moe_plus_plus")
    _, left = left_of(entry, **entry.tiny)
    assert left.config.n_routes == left.config.n_experts == entry.tiny["n_experts"]


def test_the_blocks_of_an_spt_ffn_are_a_dense_one():
    entry = next(entry for entry in FFNS if entry.name == "spt_ffn")
    _, gated = left_of(entry, **entry.tiny)
    _, plain = left_of(entry, **{**entry.tiny, "gated": False, "activation": "relu"})
    assert (gated.entry.name, plain.entry.name) == ("swiglu", "mlp")
    assert gated.config.d_ff == plain.config.d_ff == entry.tiny["d_ff"]
    assert plain.config.activation == "relu"
