"""Spark's FFN: what its equation implies, what a token runs, and the two ways of running it."""

import copy
import math

import pytest
import torch
from format_toys import kernels
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import zoo
from layers.spark_decode import chosen_backend
from layers.spark_ffn import SparkFFN, SparkFFNConfig, pack_for_decode
from layers.spark_native import KERNEL

EVERY = ("gather", "bag")
needs_compiler = pytest.mark.skipif(KERNEL.library() is None, reason="no C++ compiler")


def made(dtype=torch.float64, **options):
    return SparkFFN(SparkFFNConfig(**{"d_model": 24, "d_ff": 80, **options})).to(dtype)


def tokens(*shape, d=24):
    return torch.randn(*shape, d, dtype=torch.float64)


def active(ffn, x):
    """[B, S, F] bool, the neurons that run."""
    return ffn.select(ffn.predictor(x[..., : ffn.config.r])) > 0


# Sizes


@pytest.mark.parametrize("r", [1, 7, 12, 23])
def test_any_split_has_the_parameters_of_two_matrices(r):
    config = SparkFFNConfig(d_model=24, d_ff=80, d_predictor=r)
    assert config.cost().params == 2 * 24 * 80
    assert sum(p.numel() for p in SparkFFN(config).parameters()) == 2 * 24 * 80


@pytest.mark.parametrize("d_model", [64, 192, 512, 2304])
@pytest.mark.parametrize("predictor", ["split", "full"])
def test_default_has_the_parameters_of_a_default_swiglu(d_model, predictor):
    gated = zoo.cost("swiglu", d_model=d_model).params
    assert zoo.cost("spark_ffn", d_model=d_model, predictor=predictor).params == gated


def test_published_sizes():
    config = SparkFFNConfig(d_model=2304, d_ff=13824, d_predictor=1024)
    cost = config.cost()
    assert config.k == 1106
    assert cost.params == 63_700_992
    assert cost.flops == 4 * 2304 * 13824  # training is dense
    assert config.decode_flops() == pytest.approx(36.2e6, rel=0.01)
    assert cost.active_params == pytest.approx(config.decode_flops() / 2)
    assert 6 * 2304 * 9216 / config.decode_flops() == pytest.approx(3.5, abs=0.05)
    assert SparkFFNConfig(d_model=2304).r == 1152
    assert SparkFFNConfig(d_model=20).r == 10


def test_bytes_of_a_token_are_those_of_the_neurons_it_runs():
    cost = SparkFFNConfig(d_model=64, d_ff=1000, d_predictor=16).cost()
    assert cost.weight_bytes == pytest.approx(2 * (16 * 1000 + (48 + 64) * 80))
    assert cost.weight_bytes_at(10_000) * 10_000 == pytest.approx(2 * 128 * 1000)


# The equation


@pytest.mark.parametrize("predictor", ["split", "full"])
@pytest.mark.parametrize("selection", ["statistical", "exact"])
def test_relabelling_neurons_changes_nothing(predictor, selection):
    ffn = made(predictor=predictor, selection=selection)
    x, order = tokens(2, 5), torch.randperm(80)
    before = ffn(x).y
    with torch.no_grad():
        for leaf, axis in ((ffn.predictor, 0), (ffn.up, 0), (ffn.down, 1)):
            leaf.weight.copy_(leaf.weight.index_select(axis, order))
    assert_close(ffn(x).y, before)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("selection", ["statistical", "exact"])
def test_a_neuron_that_no_token_runs_learns_by_the_threshold_alone(detach, selection):
    ffn, x = made(detach_threshold=detach, selection=selection), tokens(1, 3)
    (ffn(x).y * tokens(1, 3)).sum().backward()
    idle = ~active(ffn, x).flatten(0, 1).any(0)
    assert 0 < idle.sum() < 80
    grads = {name: p.grad for name, p in ffn.named_parameters() if p.grad is not None}
    assert not grads["up.weight"][idle].any()
    assert not grads["down.weight"][:, idle].any()
    assert grads["up.weight"][~idle].any(1).all()
    learns = grads["predictor.weight"][idle].any(1)
    if detach:
        assert not learns.any()
    elif selection == "statistical":
        assert learns.all()
    else:
        assert 0 < learns.sum() <= 3  # whose scores are thresholds


def test_scaling_the_predictor_scales_a_relu_and_a_shift_of_scores_does_nothing():
    ffn, x = made(activation="relu"), tokens(2, 5)
    before = ffn(x).y
    other = copy.deepcopy(ffn)
    with torch.no_grad():
        other.predictor.weight.mul_(3.5)
    assert_close(other(x).y, 3.5 * before)
    scores = ffn.predictor(x[..., :12])
    assert_close(ffn.select(scores + 7), ffn.select(scores))


def test_the_first_part_alone_chooses():
    ffn, x = made(), tokens(2, 5)
    chosen = active(ffn, x)
    assert 0 < chosen.sum() < chosen.numel()
    other = x.clone()
    other[..., 12:] = tokens(2, 5)[..., 12:]
    assert active(ffn, other).equal(chosen)
    assert not torch.allclose(ffn(other).y, ffn(x).y)
    other = x.clone()
    other[..., :12] = tokens(2, 5)[..., :12]
    assert not active(ffn, other).equal(chosen)


def test_density_at_the_start_is_what_was_asked():
    ffn = made(torch.float32, d_model=64, d_ff=4096, density=0.05)
    stats = ffn(torch.randn(1, 400, 64)).stats
    assert stats["tokens"] == 400
    assert stats["active_neurons"] / 400 / 4096 == pytest.approx(0.05, rel=0.02)
    mask = torch.rand(1, 400) > 0.5
    stats = ffn(torch.randn(1, 400, 64), mask=mask).stats
    assert stats["tokens"] == mask.sum()
    assert stats["active_neurons"] / mask.sum() / 4096 == pytest.approx(0.05, rel=0.04)


def test_exact_selection_runs_k():
    ffn = made(selection="exact", top_k=9)
    assert active(ffn, tokens(2, 5)).sum(-1).eq(9).all()


def test_no_selection_is_a_gated_ffn_of_two_inputs():
    ffn, x = made(selection="none", activation="silu"), tokens(2, 5)
    gate = torch.nn.functional.silu(x[..., :12] @ ffn.predictor.weight.T)
    assert_close(ffn(x).y, (gate * (x[..., 12:] @ ffn.up.weight.T)) @ ffn.down.weight.T)
    cost = ffn.config.cost()
    assert cost.active_params == cost.params


# A schedule


def test_density_falls_evenly_to_its_target_and_is_saved():
    options = {"d_model": 64, "d_ff": 2000, "density": 0.1, "density_start": 0.5}
    ffn = made(torch.float32, density_until=0.5, **options)
    x = torch.randn(1, 200, 64)

    def density():
        return (active(ffn, x).sum() / 200 / 2000).item()

    assert density() == pytest.approx(0.1, rel=0.05)  # alone, without a run
    for step, expected in ((0, 0.5), (25, 0.3), (50, 0.1), (90, 0.1)):
        ffn.at_step(step, 100)
        assert density() == pytest.approx(expected, rel=0.05)
    ffn.at_step(10, 100)
    other = made(torch.float32, density_until=0.5, **options)
    other.load_state_dict(ffn.state_dict())
    assert_close(other(x).y, ffn(x).y)
    plain = made(torch.float32, d_ff=2000, d_model=64, density=0.1)
    assert "quantile" not in plain.state_dict()
    plain.load_state_dict({k: v for k, v in ffn.state_dict().items() if k != "quantile"})
    ffn.at_step(100, 100)
    assert_close(plain(x).y, ffn(x).y, atol=1e-6, rtol=1e-5)
    plain.at_step(0, 100)  # no schedule: nothing to set


# A few tokens


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (4, 1), (2, 9)])
@pytest.mark.parametrize("options", [
    {}, {"activation": "relu"}, {"activation": "silu"}, {"predictor": "full"},
    {"selection": "exact"}, {"huber": 0.2}, {"density_start": 0.5}, {"density": 0.6},
], ids=str)  # fmt: skip
def test_running_single_neurons_is_running_all(backend, shape, options):
    ffn = made(torch.float32, d_ff=256, backend=backend, **options).eval()
    x = tokens(*shape).float()
    expected = ffn(x)  # gradients are on: dense
    assert ffn.pack_for_decode()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = ffn(x)
        assert_close(got.y, expected.y, atol=1e-6, rtol=1e-5)
    if shape != (1, 1):
        assert_close(got.stats, expected.stats)


@pytest.mark.parametrize("precision", ["bf16", None])
@pytest.mark.parametrize("backend", EVERY)
def test_half_precision_stays_near_the_dense_product(backend, precision):
    dtype = torch.bfloat16 if precision is None else torch.float32
    config = SparkFFNConfig(d_model=64, d_ff=512, backend=backend)
    ffn = SparkFFN(config).to(dtype).eval()
    x = torch.randn(1, 3, 64)
    exact = copy.deepcopy(ffn).float()(x.to(dtype).float()).y
    if precision is not None:
        zoo.set_precision(ffn, precision)
    dense = ffn(x.to(dtype)).y
    ffn.pack_for_decode()
    with torch.no_grad():
        got = ffn(x.to(dtype)).y
    assert got.dtype == dtype
    dense_error, error = ((y.float() - exact).norm() / exact.norm() for y in (dense, got))
    assert error < 1.2 * dense_error + 2e-3


@torch.no_grad()
@pytest.mark.parametrize("backend", EVERY)
def test_masked_tokens_and_tokens_that_run_nothing_give_zeros(backend):
    ffn = made(torch.float32, backend=backend).eval()
    ffn.pack_for_decode()
    x, mask = tokens(1, 4).float(), torch.tensor([[True, False, True, False]])
    x[0, 1] = torch.nan
    x[0, 2] = 0  # scores without deviation
    out = ffn(x, mask=mask)
    assert not out.y[0, 1:].any()
    assert out.y[0, 0].any()
    assert out.stats["tokens"] == 2
    assert ffn(x[:, :0]).y.shape == (1, 0, 24)


def test_laying_by_neuron_changes_no_number_and_trains_on():
    ffn = made(torch.float32)
    before, x = copy.deepcopy(ffn), tokens(2, 6).float()
    parameter = ffn.down.weight
    assert pack_for_decode(torch.nn.Sequential(ffn, made(predictor="full"))) == 2
    assert ffn.down.weight is parameter
    assert parameter.t().is_contiguous()
    assert_close(dict(ffn.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    for module in (ffn, before):
        optim = torch.optim.AdamW(module.parameters(), lr=0.01)
        for _ in range(3):
            optim.zero_grad()
            module(x).y.square().sum().backward()
            optim.step()
    assert parameter.grad is not None
    assert parameter.grad.stride() == parameter.stride()
    assert_close(dict(ffn.state_dict()), dict(before.state_dict()), rtol=1e-4, atol=1e-5)
    kept = copy.deepcopy(ffn).to(torch.bfloat16)
    assert kept.down.weight.t().is_contiguous()
    other = made(torch.float32)
    other.load_state_dict(ffn.state_dict())
    assert_close(other(x).y, ffn(x).y)


def test_generation_lays_by_neuron_and_leaves_a_model_to_train_and_save(tmp_path):
    sizes = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 24}
    ffn = {"name": "spark_ffn", "d_ff": 64}
    model = zoo.build({"model": {**sizes, "ffn": ffn}})
    before = copy.deepcopy(model)
    dense = zoo.build({"model": {**sizes, "ffn": {**ffn, "backend": "dense"}}})
    dense.load_state_dict(model.state_dict())
    prompt, options = torch.randint(0, 32, (2, 4)), {"max_new_tokens": 8, "temperature": 0.0}
    with torch.inference_mode():
        got = zoo.generate(model, prompt, **options)
        assert got.equal(zoo.generate(dense, prompt, **options))
    for made_by, by_neuron in ((model, True), (dense, False)):
        layers = [m for m in made_by.modules() if isinstance(m, SparkFFN)]
        assert len(layers) == 2
        assert all(m.down.weight.t().is_contiguous() == by_neuron for m in layers)
    assert_close(dict(model.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    for name, m in (("a", model), ("b", before)):
        m.save_pretrained(tmp_path / name)
        m.train()(prompt).logits.square().mean().backward()
        torch.optim.AdamW(m.parameters()).step()
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert_close(dict(model.state_dict()), dict(before.state_dict()), rtol=1e-4, atol=1e-5)


def test_what_runs_how():
    assert [chosen_backend(n, 0.08) for n in (1, 16, 17, 64, 512)] == [
        "gather", "gather", "bag", "bag", "dense",
    ]  # fmt: skip
    assert chosen_backend(2, 0.9) == "bag"
    ffn, x = made(torch.float32).eval(), tokens(1, 1).float()
    with torch.no_grad(), kernels("torch"):
        assert ffn._backend(x) == "dense"  # lies by output
        assert ffn.pack_for_decode()
        assert ffn._backend(x) == "gather"
        assert ffn._backend(tokens(1, 20).float()) == "bag"
        assert ffn._backend(tokens(8, 64).float()) == "dense"
        assert made(backend="dense")._backend(x) == "dense"
        for precision, expected in (("bf16", "gather"), ("fp32", "gather"), ("nvfp4", "dense")):
            zoo.set_precision(ffn, precision)
            assert ffn._backend(x) == expected


@needs_compiler
@torch.no_grad()
def test_what_runs_natively():
    ffn, x = made(torch.float32).eval(), tokens(1, 1).float()
    assert ffn._backend(x) == "dense"
    ffn.pack_for_decode()
    assert ffn._backend(x) == ffn._backend(tokens(25, 5).float()) == "native"
    assert ffn._backend(tokens(26, 5).float()) == "dense"
    low = copy.deepcopy(ffn).bfloat16()
    assert low._backend(tokens(1, 31).bfloat16()) == "native"
    assert low._backend(tokens(1, 32).bfloat16()) == "bag"
    hook = ffn.up.register_forward_hook(lambda *_: None)
    assert ffn._backend(x) == "gather"
    hook.remove()
    with FlopCounterMode(display=False):
        assert ffn._backend(x) == "gather"
    ffn.up.observer = lambda *_: None
    assert ffn._backend(x) == "gather"
    del ffn.up.observer
    zoo.set_precision(ffn, "bf16", where="up")
    assert ffn._backend(x) == "gather"
    zoo.set_precision(ffn, "nvfp4")
    assert ffn._backend(x) == "dense"
    wide = made().eval()  # float64
    wide.pack_for_decode()
    assert wide._backend(tokens(1, 1)) == "gather"


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (4, 1), (2, 9), (5, 7)])
@pytest.mark.parametrize(
    ("d", "f", "r"), [(24, 80, 12), (65, 257, 1), (130, 64, 97), (256, 512, 128)]
)
@pytest.mark.parametrize("how", [
    {}, {"density": 0.7}, {"activation": "gelu"}, {"activation": "silu", "huber": 0.3},
    {"activation": "relu", "selection": "exact"}, {"predictor": "full"}, {"density_start": 0.5},
], ids=str)  # fmt: skip
def test_native_equals_all_neurons(shape, d, f, r, how):
    options = {"d_model": d, "d_ff": f, "d_predictor": None if "predictor" in how else r, **how}
    ffn = made(torch.float32, backend="gather", **options).eval()
    ffn.pack_for_decode()
    x, mask = tokens(*shape, d=d).float(), torch.rand(shape) > 0.3
    with kernels("native"):
        assert ffn._backend(x) == "native"
        got = ffn(x, mask=mask)
    with torch.enable_grad():
        want = ffn(x, mask=mask)
    scale = want.y.abs().max().item()
    assert_close(got.y, want.y, rtol=0, atol=2e-6 * max(scale, 1))
    if shape != (1, 1):
        assert_close(got.stats, want.stats)
    with kernels("torch"):
        assert_close(ffn(x, mask=mask).y, got.y, rtol=0, atol=2e-6 * max(scale, 1))


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("stored", "policy"), [("bf16", None), ("fp32", "bf16"), ("bf16", "fp32")])
@pytest.mark.parametrize("n", [1, 3, 6])
def test_native_rounds_where_torch_does(threads, stored, policy, n, monkeypatch):
    monkeypatch.setattr("layers.spark_native.NUMBERS_PER_THREAD", 1)
    low = torch.bfloat16 if stored == "bf16" else torch.float32
    ffn = made(low, d_model=192, d_ff=512, backend="gather").eval()
    if policy is not None:
        zoo.set_precision(ffn, policy)
    ffn.pack_for_decode()
    x, before = tokens(1, n, d=192).to(low), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kernels("native"):
            assert ffn._backend(x) == "native"
            got = ffn(x).y
        with kernels("torch"):
            want = ffn(x).y
    finally:
        torch.set_num_threads(before)
    assert got.dtype == want.dtype == low
    error = (got.float() - want.float()).norm() / want.float().norm()
    assert error < (1e-6 if policy == "fp32" and low is torch.float32 else 4e-3)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2])
def test_native_with_no_neuron_every_neuron_or_no_number(n):
    ffn = made(torch.float32, backend="gather", activation="relu").eval()
    ffn.pack_for_decode()
    x = tokens(1, n).float()
    with kernels("native"):
        assert not ffn(torch.zeros_like(x)).y.any()
        ffn._z = -100.0  # below every score
        got = ffn(x)
        assert n == 1 or got.stats["active_neurons"] == 80 * n
        with kernels("torch"):
            assert_close(got.y, ffn(x).y, rtol=1e-5, atol=1e-4)
        ffn._z = 100.0
        assert not ffn(x).y.any()
        ffn._z = 1.4
        x[0, 0, 3] = torch.nan
        y = ffn(x).y
        assert y[0, 0].isnan().all()
        assert y[0, 1:].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("backend", EVERY)
def test_a_backend_that_cannot_run_says_why(backend):
    ffn, x = made(torch.float32, backend=backend, d_ff=64, d_model=64).eval(), torch.randn(1, 1, 64)
    with pytest.raises(ValueError, match=r"call pack_for_decode\(\) first"):
        ffn(x)
    assert ffn.pack_for_decode()
    zoo.set_precision(ffn, "mxfp4")
    with pytest.raises(ValueError, match=r"mxfp4.* quantises blocks"):
        ffn(x)
    auto = SparkFFN(SparkFFNConfig(d_model=64, d_ff=64)).eval()
    zoo.set_precision(auto, "mxfp4")
    dense = auto(x).y
    zoo.pack(auto)
    assert not auto.pack_for_decode()
    assert_close(auto(x).y, dense, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_a_compiled_graph_is_dense():
    ffn, x = made(torch.float32).eval(), tokens(1, 2).float()
    ffn.pack_for_decode()
    torch.compiler.reset()
    compiled = torch.compile(ffn, fullgraph=True, backend="eager")
    assert_close(compiled(x).y, ffn(x).y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_predictor": 24}, r"d_predictor must be in \[1, d_model=24\), got 24"),
        ({"d_model": 1}, r"d_predictor must be in \[1, d_model=1\), got 0"),
        ({"top_k": 80}, r"top_k must be in \[1, d_ff=80\), got 80"),
        ({"density": 1.0}, "selection: none runs all neurons"),
        ({"density": math.nan}, "density must be in"),
        ({"activation": "sigmoid"}, "unknown activation of spark_ffn 'sigmoid'"),
        ({"predictor": "half"}, "unknown predictor"),
        ({"selection": "topk"}, "unknown selection"),
        ({"backend": "sparse"}, "unknown backend"),
        ({"predictor": "full", "d_predictor": 4}, "leave out d_predictor=4"),
        ({"selection": "none", "huber": 0.1}, "leave out huber=0.1"),
        ({"selection": "none", "backend": "bag"}, "runs all neurons, got backend='bag'"),
        ({"huber": -0.1}, "huber must be at least 0"),
        ({"density_start": 0.05}, r"density_start must be in \[0.08, 1\)"),
        ({"density_start": 1.0}, "density_start must be in"),
        ({"density_start": 0.5, "selection": "exact"}, "is for selection: statistical"),
        ({"density_start": 0.5, "density_until": 0.0}, r"density_until must be in \(0, 1\]"),
    ],
)
def test_says_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        made(**options)
