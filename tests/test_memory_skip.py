"""UltraMem's skip: a memory's output added some blocks after the one it read (memory.md 5.1)."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.generate import generate
from zoo.model import ModelConfig

SIZES = {"vocab_size": 32, "d_model": 16, "n_layers": 6, "n_heads": 2, "max_seq_len": 16}
ULTRA = {"name": "ultramem", "d_ff": 64, "n_keys": 4, "top_k": 4, "d_key": 4, "d_value": 8}
# (layer, skip): apart as in the paper, overlapping, to one block, and with one in its own block
WIRINGS = {
    "apart": ((0, 2), (3, 2)),
    "overlapping": ((0, 3), (1, 3), (2, 1)),
    "to one block": ((1, 3), (2, 2), (4, 0)),
}


def model_of(wiring, n_layers=6, **options):
    rules = [{**ULTRA, **options, "layers": str(i), "skip": skip} for i, skip in wiring]
    sizes = {**SIZES, "n_layers": n_layers}
    return zoo.build(ModelConfig(**sizes, ffn=[*rules, {"name": "swiglu", "d_ff": 48}]))


def tokens(length=12):
    return torch.randint(0, SIZES["vocab_size"], (2, length))


def gradients(model, logits):
    model.zero_grad()
    logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def by_hand(model, wiring, ids):
    """The blocks part by part; memory i is added after block i + skip."""
    context = model._context(ids, None, None)
    x, skips, memories = model.embedding(ids), dict(wiring), {}
    for i, block in enumerate(model.blocks):
        x = x + block.attention(block.attention_norm(x), context.rope, None, None)
        normed = block.ffn_norm(x)
        if i in skips:
            memories[i] = block.ffn.memory(normed).y
        ffn = block.ffn.ffn if i in skips else block.ffn
        x = x + ffn(normed).y
        for source, y in memories.items():
            if source + skips[source] == i:
                x = x + y
    return model.head(model.norm(x))


@pytest.mark.parametrize(
    ("wiring", "pool"),
    [("apart", "own"), ("overlapping", "own"), ("overlapping", "shared"), ("to one block", "own")],
)
def test_equals_a_loop_of_the_blocks(wiring, pool):
    model, ids = model_of(WIRINGS[wiring], pool=pool).double(), tokens()
    logits, expected = model(ids).logits, by_hand(model, WIRINGS[wiring], ids)
    assert_close(logits, expected)
    assert_close(gradients(model, logits), gradients(model, expected))


def test_a_skip_moves_the_memory_and_nothing_else():
    own, later = model_of([(1, 0)]), model_of([(1, 3)])
    later.load_state_dict(own.state_dict())
    x = torch.randn(2, 5, 16)
    apart, together = later.blocks[1].ffn(x), own.blocks[1].ffn(x)
    assert together.later is None
    assert apart.later.blocks == 3
    assert torch.equal(apart.later.y + apart.y, together.y)
    ids = tokens()
    assert not torch.allclose(own(ids).logits, later(ids).logits)
    # without the FFNs and the attention between there and here it is all one
    with torch.no_grad():
        for block in (*own.blocks[2:5], *later.blocks[2:5]):
            block.attention.out.weight.zero_()
            block.ffn.down.weight.zero_()
    assert_close(own(ids).logits, later(ids).logits)


def test_no_token_reads_a_later_one():
    model, ids = model_of(WIRINGS["overlapping"]), tokens()
    other = torch.cat((ids[:, :7], (ids[:, 7:] + 1) % SIZES["vocab_size"]), 1)
    assert_close(model(other).logits[:, :7], model(ids).logits[:, :7])


@torch.no_grad()
def test_decoding_equals_one_forward():
    model, ids = model_of(WIRINGS["overlapping"]).eval(), tokens()
    full, cache = model(ids).logits, model.new_cache()
    parts = [model(ids[:, :5], cache=cache).logits]
    parts += [model(ids[:, i : i + 1], cache=cache).logits for i in range(5, 12)]
    assert_close(torch.cat(parts, 1), full)
    made = generate(model, ids[:, :4], max_new_tokens=6, temperature=0.0)
    assert torch.equal(made[:, 4:], model(made).logits[:, 3:-1].argmax(-1))


def test_padding_changes_no_real_token():
    model, ids = model_of(WIRINGS["overlapping"]), tokens()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :4] = False
    alone = model(ids[:1, 4:]).logits
    assert_close(model(ids, mask=mask).logits[:1, 4:], alone)


def test_recomputed_gradients_are_the_plain_ones():
    model, ids = model_of(WIRINGS["overlapping"]), tokens()
    plain = gradients(model, model(ids).logits)
    model.activation_checkpointing = True
    assert_close(gradients(model, model(ids).logits), plain, rtol=0, atol=0)


def test_compiled_gradients_are_the_plain_ones():
    model, ids = model_of([(0, 1), (1, 1)], n_layers=3), tokens()
    plain = gradients(model, model(ids).logits)
    model.compile(backend="eager")
    assert_close(gradients(model, model(ids).logits), plain)


def test_a_skip_costs_nothing():
    model, ids = model_of([(1, 3)]), tokens()
    assert list(model.cost()) == list(model_of([(1, 0)]).cost())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() == ids.numel() * model.cost(12, causal=False).flops


@pytest.mark.parametrize(
    ("layer", "skip", "message"),
    [
        (5, 1, "layer 5: skip=1 adds the memory's output after layer 6, and the last is 5"),
        (2, 4, "skip at most 3"),
        (2, -1, "layer 2: skip must not be negative, got -1"),
        (2, True, "layer 2: ultramem: skip must be int"),
    ],
)
def test_refused_at_the_door(layer, skip, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**SIZES, ffn=[{**ULTRA, "skip": skip, "layers": str(layer)}, "swiglu"]).layers()
