"""One token through the native calls gives what torch ops give, and nothing else takes them."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import zoo
from layers.memory import Pool, decode
from layers.memory.decode import ACTIVATIONS, KERNEL, WEIGHTINGS, find, read
from layers.memory.pool import NEURON_ACTIVATIONS
from layers.memory.readout import WEIGHTS
from layers.peer import PEER, PEERConfig
from layers.pkm import PKM, PKMConfig

D = 32
SIZES = {"d_model": D, "n_keys": 24, "top_k": 7}
LAYERS = {
    "pkm": ("pkm", {}),
    "pkm plain": ("pkm", {"query_norm": "none", "d_key": 20, "heads": 3}),
    "pkm normed": ("pkm", {"query_norm": "layer", "key_norm": "layer", "d_key": 20}),
    "pkm rms": ("pkm", {"query_norm": "rms", "key_norm": "rms", "d_key": 37}),
    "peer": ("peer", {}),
    "peer shared keys": ("peer", {"keys": "shared", "key_norm": "rms", "heads": 3}),
    "memory_plus": ("memory_plus", {}),
    "ultramem": ("ultramem", {}),
    "ultramem signed": ("ultramem", {"search": "signed", "heads": 2, "rank": 3, "expand": 3}),
    "ultramem_v2": ("ultramem_v2", {}),
    "ultramem_v2 few": ("ultramem_v2", {"sub_top_k": 3, "rank": 1, "n_cores": 1}),
    "ultramem_v2 apart": ("ultramem_v2", {"groups": "apart", "query": "shared", "heads": 3}),
    "ultramem_v2 window": (
        "ultramem_v2", {"n_tables": 3, "table": 2, "share": 0.5, "activation": "gelu"}
    ),
    "ultramem_v2 four": ("ultramem_v2", {"n_cores": 4, "d_value": 20, "rank": 4}),
}  # fmt: skip
every_layer = pytest.mark.parametrize("kind", LAYERS)
needs_compiler = pytest.mark.skipif(KERNEL.library() is None, reason="no C++ compiler")


def layer_of(kind, **more):
    """In evaluation, with batch statistics, gains, biases and cores that are not trivial."""
    name, options = LAYERS[kind]
    wide = {"d_ff": 256} if "ultra" in name else {}
    layer = zoo.create(name, **SIZES, **wide, **options, **more).eval()
    with torch.no_grad():
        for norm in (layer.memory.query.norm, layer.memory.keys.norm):
            for named, t in (
                () if norm is None else (*norm.named_parameters(), *norm.named_buffers())
            ):
                if named != "running_mean":
                    t.mul_(torch.rand_like(t) + 0.5)
                t.add_(0.1 * torch.rand_like(t))
    return layer


@pytest.fixture
def calls(monkeypatch):
    """The functions of the library that were called."""
    names = []
    library_call = type(KERNEL).call

    def call(source, function, job):
        names.append(function)
        return library_call(source, function, job)

    monkeypatch.setattr(type(KERNEL), "call", call)
    return names


BOTH = ["moe_zoo_memory_find", "moe_zoo_memory_read"]


def both_ways(layer, x, monkeypatch, calls, native=tuple(BOTH), mask=None):
    """What native calls and what torch ops give, the former having been made."""
    results = []
    for mode in ("torch", "native"):
        monkeypatch.setenv("MOE_ZOO_KERNELS", mode)
        calls.clear()
        with torch.no_grad():
            out = layer(x, mask=mask)
        made = [name for name in calls if name in BOTH]
        assert made == ([] if mode == "torch" else list(native))
        assert out.stats is None
        results.append(out.y)
    return results[::-1]


@needs_compiler
@every_layer
def test_native_equals_torch(kind, monkeypatch, calls):
    layer = layer_of(kind)
    for x in torch.randn(8, 1, 1, D):
        got, expected = both_ways(layer, x, monkeypatch, calls)
        assert got.dtype == expected.dtype
        assert_close(got, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
@every_layer
@torch.no_grad()
def test_the_slots_are_the_same_and_their_scores(kind):
    memory = layer_of(kind).memory
    for token in torch.randn(30, 1, D):
        hits, expected = (
            find(token, memory.query, memory.keys),
            memory.keys(memory.query(token[None])),
        )
        assert torch.equal(hits.slots, expected.slots)
        assert_close(hits.scores, expected.scores, rtol=1e-5, atol=1e-5)
        (y, rows), (y_, rows_) = (
            read(token, hits, memory.readout, memory.values()),
            memory.readout(token, hits, memory.values()),
        )
        assert torch.equal(rows, rows_)
        assert_close(y, y_, rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("weights", sorted(WEIGHTS))
@pytest.mark.parametrize("activation", sorted(NEURON_ACTIVATIONS))
def test_every_weighting_and_activation(weights, activation, monkeypatch, calls):
    assert WEIGHTINGS.keys() == WEIGHTS.keys()
    assert ACTIVATIONS.keys() == set(NEURON_ACTIVATIONS)
    layer = layer_of("peer", weights=weights, activation=activation)
    got, expected = both_ways(layer, torch.randn(1, 1, D), monkeypatch, calls)
    assert_close(got, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
@torch.no_grad()
def test_of_equal_slots_the_lower_is_found_first():
    """Whole numbers, whose sums are exact in any order, with many ties at the cut."""
    memory = layer_of("pkm plain").memory
    for weight in (memory.keys.weight, memory.query.proj.weight, memory.query.proj.bias):
        weight.copy_(torch.randint(-1, 2, weight.shape))
    for token in torch.randint(-1, 2, (30, 1, D)).float():
        hits, expected = (
            find(token, memory.query, memory.keys),
            memory.keys(memory.query(token[None])),
        )
        assert torch.equal(hits.slots, expected.slots)
        assert torch.equal(hits.scores, expected.scores)


@needs_compiler
@pytest.mark.parametrize("kind", ["ultramem", "ultramem signed"])
@torch.no_grad()
def test_twins_among_keys_are_found_in_the_same_order(kind):
    """Each key stands twice, and top_k is odd: there is always a tie at the cut."""
    memory = layer_of(kind).memory
    weight, half = memory.keys.weight, memory.keys.config.n_keys // 2
    weight[..., half:, :] = weight[..., :half, :]
    for token in torch.randn(30, 1, D):
        hits, expected = (
            find(token, memory.query, memory.keys),
            memory.keys(memory.query(token[None])),
        )
        assert torch.equal(hits.slots, expected.slots)


@needs_compiler
@every_layer
@pytest.mark.parametrize("real", [True, False])
def test_a_masked_token_is_zero_and_a_real_one_itself(kind, real, monkeypatch, calls):
    layer, x = layer_of(kind), torch.randn(1, 1, D)
    if not real:
        x = torch.full_like(x, torch.nan)
    got, expected = both_ways(layer, x, monkeypatch, calls, mask=torch.tensor([[real]]))
    assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert bool(got.any()) == real


@needs_compiler
@every_layer
def test_what_is_no_number_stays_none(kind, monkeypatch, calls):
    layer, x = layer_of(kind), torch.full((1, 1, D), torch.nan)
    got, expected = both_ways(layer, x, monkeypatch, calls)
    assert got.isnan().all()
    assert expected.isnan().all()


@needs_compiler
@every_layer
def test_operators_are_counted_as_ever(kind, monkeypatch, calls):
    layer, x, counts = layer_of(kind), torch.randn(1, 1, D), []
    for mode in ("torch", "native"):
        monkeypatch.setenv("MOE_ZOO_KERNELS", mode)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert not set(calls) & set(BOTH)


@needs_compiler
@pytest.mark.parametrize("part", ["query", "query.norm", "keys", "readout", "pool", "pool.values"])
def test_hooks_are_run(part, calls):
    layer, seen = layer_of("pkm"), []
    module = layer.memory.get_submodule(part)
    handle = module.register_forward_hook(lambda *args: seen.append(part))
    with torch.no_grad():
        layer(torch.randn(1, 1, D))
        assert seen == [part]
        handle.remove()
        calls.clear()
        layer(torch.randn(1, 1, D))
    assert seen == [part]
    assert calls == BOTH


@needs_compiler
def test_what_is_no_decoding_takes_torch(calls):
    layer, x = layer_of("pkm"), torch.randn(1, 1, D)
    layer(x)  # gradients are wanted
    with torch.no_grad():
        layer(torch.randn(1, 2, D))
        layer.double()(x.double())
    assert not set(calls) & set(BOTH)
    before = layer.float().train().memory.query.norm.running_mean.clone()
    with torch.no_grad():
        layer(x)  # a batch of its own
    assert not torch.equal(layer.memory.query.norm.running_mean, before)
    assert BOTH[0] not in calls
    with torch.inference_mode():
        layer.eval()(x)
    assert calls[-2:] == BOTH


@needs_compiler
@pytest.mark.parametrize("name", ["bf16", "mxfp4", "fp8_row"])
@pytest.mark.parametrize("kind", ["pkm", "peer", "ultramem_v2"])
def test_low_precision_keeps_the_search_native(name, kind, monkeypatch, calls):
    """Leaves compute as their policy says; a table of rows that are only cast is read natively."""
    layer = layer_of(kind, d_key=32, **({"d_value": 64, "d_input": 32} if "v2" in kind else {}))
    zoo.set_precision(layer, name)
    reads = BOTH[: 2 if name == "bf16" and kind == "pkm" else 1]
    got, expected = both_ways(layer, torch.randn(1, 1, D), monkeypatch, calls, native=reads)
    assert_close(got, expected, rtol=2e-2, atol=2e-2)


@needs_compiler
@pytest.mark.parametrize("kind", ["pkm", "peer", "ultramem_v2"])
def test_packed_tables_are_read_by_torch(kind, monkeypatch, calls):
    layer = layer_of(kind, d_key=32, **({"d_value": 64, "d_input": 32} if "v2" in kind else {}))
    zoo.set_precision(layer, "mxfp4")
    x = torch.randn(1, 1, D)
    before, _ = both_ways(layer, x, monkeypatch, calls, native=BOTH[:1])
    zoo.pack(layer)
    got, expected = both_ways(layer, x, monkeypatch, calls, native=BOTH[:1])
    assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert_close(got, before, rtol=2e-2, atol=2e-2)


@needs_compiler
@pytest.mark.parametrize("module", [PKM, PEER])
def test_a_shared_pool_is_read(module, monkeypatch, calls):
    config = {PKM: PKMConfig, PEER: PEERConfig}[module](**SIZES, pool="shared")
    pool = Pool(config.parts.pool)
    layers, x = [module(config, pool).eval() for _ in range(2)], torch.randn(1, 1, D)
    before = [both_ways(layer, x, monkeypatch, calls)[0] for layer in layers]
    with torch.no_grad():
        pool.values.weight.mul_(2)
    for layer, y in zip(layers, before, strict=True):
        got, expected = both_ways(layer, x, monkeypatch, calls)
        assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert_close(got, 2 * y, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_threads_share_the_keys(monkeypatch, calls):
    monkeypatch.setattr(decode, "NUMBERS_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for kind in ("peer", "ultramem_v2"):
            got, expected = both_ways(layer_of(kind), torch.randn(1, 1, D), monkeypatch, calls)
            assert_close(got, expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@torch.no_grad()
def test_a_slot_that_is_none_is_refused():
    memory = layer_of("ultramem").memory
    token = torch.randn(1, D)
    hits = find(token, memory.query, memory.keys)
    hits.slots[0, 0, 1] = memory.readout.expansion.config.n_slots
    with pytest.raises(IndexError, match="slots and rows"):
        read(token, hits, memory.readout, memory.values())


@needs_compiler
@torch.no_grad()
def test_changed_cores_are_seen(monkeypatch, calls):
    """Their singular vectors are kept by the cores' numbers, not by the tensor."""
    layer, x = layer_of("ultramem"), torch.randn(1, 1, D)
    layer(x)
    layer.memory.keys.cores.data.copy_(torch.randn_like(layer.memory.keys.cores))
    got, expected = both_ways(layer, x, monkeypatch, calls)
    assert_close(got, expected, rtol=1e-5, atol=1e-5)
