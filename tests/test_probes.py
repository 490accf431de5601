"""Probes: what formats do to operands, against closed forms and brute force in float64."""

import json
import math
from itertools import product
from typing import Any

import pytest
import torch
from recipe_toys import evaluate_briefly, killed_after, refused, timeless, tiny_recipe
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import zoo
from layers.linear import ExpertLinear, Linear, ValueTable
from layers.precision import FORMATS, PRESETS, LeafPrecision, QSpec, quantize, seed_rounding
from layers.precision.formats import check_spec
from layers.precision.grids import E2M1
from layers.precision.hadamard import rotate, signs_of
from layers.precision.measure import measured, parts_of
from layers.precision.operands import OPERANDS
from layers.precision.probe import Probed, ProbeReport, probing
from recipes.train import train
from zoo.probing import probe as probe_model

M, K, N = 40, 64, 32
KEY = torch.tensor(1234567)
GIVEN = {"ends": None, "key": None, "scale": None}


def row(x, spec, axis=-1, operand=0, **given):
    """One operand alone."""
    found = measured(x, QSpec.of(spec), axis, operand, **{**GIVEN, **given})
    return Probed(leaf="", role="", operand=OPERANDS[operand], format="", **found)


def leaf(kind: Any = Linear, *sizes, precision="nvfp4", role="ffn"):
    made = kind(*(sizes or (K, N)), role=role)
    made.precision = (
        PRESETS[precision].default if isinstance(precision, str) else LeafPrecision.of(precision)
    )
    return made


def by_operand(report):
    found = {r.operand: r for r in report.operands}
    assert len(found) == len(report.operands) > 0
    return found


def passed(layer, x, dy, *more):
    """Forward and backward. Returns y and every gradient."""
    x = x.clone().requires_grad_()
    y = layer(x, *more)
    return y, *torch.autograd.grad(y, [x, layer.weight], dy.to(y))


# One operand


@pytest.mark.parametrize(("spec", "scale"), [("mxfp4", 0.25), ("nvfp4", 448.0), ("fp8_e4m3", 2.0)])
def test_values_of_the_grid_have_no_error(spec, scale):
    grid = next(f.grid for f in FORMATS if f.name == spec)
    assert grid is not None
    values = torch.tensor(grid.magnitudes())
    # every block holds the largest value, so its scale is the same
    x = torch.stack([values[torch.randint(len(values), (31,))] for _ in range(4)])
    x = torch.cat((x, torch.full((4, 1), grid.largest)), 1) * scale
    x[:, 15] = grid.largest * scale
    found = row(x, spec)
    assert found.signal > 0
    assert (found.noise, found.clipped, found.underflowed) == (0, 0, 0)
    assert found.snr_db is None
    assert json.loads(json.dumps(found.to_plain()))["snr_db"] is None


def test_clipped_and_underflowing_values_are_counted():
    block = [7.5] * 3 + [0.1] * 5 + [0.0] * 4 + [2.0] * 20  # the floor rule gives it 2^0, 6 on top
    x = torch.tensor([block, [v * 8 for v in block]])
    found = row(x, QSpec(format="mxfp4", scale_rule="floor"))
    assert (found.elements, found.nonzero) == (64, 56)
    assert (found.clipped, found.underflowed) == (6, 10)
    assert (found.clip_fraction, found.underflow_fraction) == (6 / 64, 10 / 56)
    assert found.scales == {0: 28, 3: 28}
    noise = (1 + 64) * (3 * 1.5**2 + 5 * 0.1**2)
    assert found.noise == pytest.approx(noise, rel=1e-6)
    signal = (1 + 64) * (3 * 7.5**2 + 5 * 0.1**2 + 20 * 2.0**2)
    assert found.snr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-6)
    assert row(x, QSpec(format="mxfp4", scale_rule="rceil")).clipped == 0


def nearest(y):
    """On the E2M1 grid: clamped, ties to the even code."""
    size = min(abs(y), E2M1.largest)
    codes = sorted(
        (abs(value - size), code % 2, value) for code, value in enumerate(E2M1.magnitudes())
    )
    return math.copysign(codes[0][2], y)


def test_mxfp4_against_brute_force():
    x = torch.randn(6, 96) * torch.logspace(-4, 4, 6, base=2)[:, None]
    x[0, :40] *= 1e-4
    counted = dict.fromkeys(("clipped", "underflowed"), 0)
    signal = noise = 0.0
    scales = {}
    for block in x.reshape(-1, 32).tolist():
        e = math.floor(math.log2(max(map(abs, block)))) - 2
        scales[e] = scales.get(e, 0) + 32
        for value in block:
            y = value / 2.0**e
            decoded = nearest(y) * 2.0**e
            counted["clipped"] += abs(y) > 6
            counted["underflowed"] += decoded == 0
            signal, noise = signal + value**2, noise + (value - decoded) ** 2
    assert min(counted.values()) > 0
    found = row(x, QSpec(format="mxfp4", scale_rule="floor"))
    assert {key: getattr(found, key) for key in counted} == counted
    assert found.scales == scales
    assert found.signal == pytest.approx(signal, rel=1e-12)
    assert found.noise == pytest.approx(noise, rel=1e-12)


def specs():
    """Every format with each of its roundings, scopes and tiles, plain and rotated."""
    for f, d in product(FORMATS, (0, 16)):
        for rounding, scope, tile in product(f.roundings, f.scopes or (None,), f.tiles):
            try:
                options = {"rounding": rounding, "scope": scope, "tile": tile, "hadamard": d}
                options |= {"signs": "step"} if rounding == "stochastic" else {}
                spec = QSpec.of({"format": f.name, **options})
                check_spec(spec)
            except ValueError:
                continue  # options that exclude one another
            yield spec


def folded(q, x, ends):
    """Values times their scale, float64."""
    values, scale = q.values.double(), q.scale
    if scale is None:
        return values
    if ends is not None and scale.dim() != 2:
        ends = ends if q.ends is None else q.ends
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        rows = scale.repeat_interleave(counts, 0)
        scale = rows[:, None] if rows.dim() == 1 else rows[:, 0]
    elif scale.dim() == 1:
        scale = scale[:, None, None]
    n = int(ends[-1]) if ends is not None else values.shape[-2]
    return values[..., :n, :] * scale[..., :n, :].double() if scale.dim() else values * scale


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("form", ["matrix", "segments", "stack"])
def test_what_is_measured_is_what_the_leaf_multiplies(form, axis):
    x = torch.randn(50, 40) if form != "stack" else torch.randn(3, 20, 40)
    ends = torch.tensor([7, 7, 50]) if form == "segments" else None
    n_checked = 0
    for spec in specs():
        scale = torch.full(() if form == "matrix" else (3,), 0.03)
        given = {"ends": ends, "key": KEY, "scale": scale}
        if form == "matrix":
            given["scale"] = torch.tensor(0.03)
        parts = parts_of(x, spec, axis, 5, **given)
        made = quantize(x, spec, axis=axis, dtype=torch.float32, operand=5, **given)
        expected = folded(made, x, ends)
        assert parts.decoded.shape == parts.x.shape == parts.at_top.shape
        n = parts.x.shape[-2]
        assert_close(parts.decoded, expected[..., :n, :], rtol=1e-6, atol=0, msg=str(spec))
        n_checked += 1
    assert n_checked > 60


def test_rows_past_the_last_end_do_not_count():
    x = torch.randn(20, 32)
    x[12:] = 1e6
    for spec in ("mxfp4", "nvfp4", "bf16", QSpec(format="nvfp4", hadamard=16)):
        found = row(x, spec, axis=-1, ends=torch.tensor([5, 5, 12]))
        assert found == row(x[:12], spec, axis=-1, ends=torch.tensor([5, 5, 12]))
        assert found.elements == 12 * 32
        assert found.nonfinite == 0


def test_infinities_are_counted_and_left_out():
    x = torch.randn(4, 64)
    x[1, 3] = math.inf
    found = row(x, "mxfp4")
    assert found.nonfinite >= 1
    assert math.isfinite(found.signal + found.noise)
    json.dumps(found.to_plain(), allow_nan=False)


def test_zeros_have_no_snr_and_no_scales():
    for spec in ("mxfp4", "nvfp4", QSpec(format="fp8_e4m3", scope="row")):
        found = row(torch.zeros(4, 64), spec)
        assert (found.elements, found.nonzero, found.scales) == (256, 0, {})
        assert found.snr_db is None


def test_a_value_at_the_top_is_not_clipped():
    x = torch.randn(64, 256) * 0.37
    assert row(x, QSpec(format="fp8_e4m3")).clipped == 0
    assert row(x, QSpec(format="fp8_e4m3", scope="static"), scale=torch.tensor(1e-3)).clipped > 0


def test_a_block_whose_scale_becomes_zero_underflows():
    x = torch.ones(1, 32)
    x[0, 16:] = 1e-6
    found = row(x, "nvfp4")
    assert (found.underflowed, found.clipped) == (16, 0)
    assert found.scales == {8: 16}


# Leaves


def test_wgrad_operands_are_measured_rotated():
    layer = leaf(Linear, K, N)
    seed_rounding(layer, 0, 3)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    x[5, :] *= 50  # an outlier that rotation spreads
    with probing(layer) as probe:
        passed(layer, x, dy)
    found = by_operand(probe.report())
    assert list(found) == list(OPERANDS)
    turned = rotate(x, 16, signs_of(16, "fixed", None, 2, x.device), -2)
    assert found["wgrad_x"].elements == turned.numel() == 48 * K
    assert found["wgrad_x"].signal == pytest.approx(float(turned.double().square().sum()))
    plain = row(turned, "nvfp4", axis=-2)
    assert found["wgrad_x"].snr_db == plain.snr_db
    unrotated = row(x, "nvfp4", axis=-2).snr_db
    assert unrotated is not None
    assert plain.snr_db is not None
    assert abs(unrotated - plain.snr_db) > 0.1
    assert found["fprop_x"].elements == M * K
    assert found["dgrad_w"].noise == found["fprop_w"].noise  # tiles: the same numbers


@pytest.mark.parametrize("preset", ["mxfp4", "nvfp4", "fp8_tensor"])
def test_experts_are_the_sum_of_each_alone_and_one_may_be_empty(preset):
    counts = torch.tensor([13, 0, 27])
    layer = leaf(ExpertLinear, 3, K, N, precision=preset)
    p = layer.precision
    assert p is not None
    nearest = {o: getattr(p, o).but(rounding="nearest") for o in OPERANDS}
    layer.precision = LeafPrecision(**nearest)
    x, dy = torch.randn(M, K), torch.randn(M, N).bfloat16()
    with probing(layer) as probe:
        passed(layer, x, dy, counts)
    whole = by_operand(probe.report())
    alone = {}
    for e, (a, b) in enumerate(zip(x.split(counts.tolist()), dy.split(counts.tolist()))):  # noqa: B905
        one = leaf(Linear, K, N)
        one.weight.data, one.precision = layer.weight.data[e], layer.precision
        with probing(one) as probe:
            passed(one, a, b)
        for operand, r in by_operand(probe.report()).items():
            alone[operand] = alone[operand] + r if operand in alone else r
    for operand in OPERANDS:
        for key in ("elements", "nonzero", "clipped", "underflowed", "nonfinite", "scales"):
            assert getattr(whole[operand], key) == getattr(alone[operand], key), (operand, key)
        assert whole[operand].noise == pytest.approx(alone[operand].noise)
        assert whole[operand].signal == pytest.approx(alone[operand].signal)


def test_a_table_is_measured_by_the_rows_it_gives():
    layer = leaf(ValueTable, 50, K)
    ids, weights = torch.randint(50, (7, 3)), torch.randn(7, 3)
    with probing(layer) as probe:
        layer(ids, weights).sum().backward()
    found = by_operand(probe.report())
    assert list(found) == ["fprop_w"]
    rows = layer.weight.detach()[ids.flatten()]
    expected = [row(r[None], "nvfp4") for r in rows]
    assert found["fprop_w"].elements == 21 * K
    assert found["fprop_w"].noise == pytest.approx(sum(r.noise for r in expected))
    assert found["fprop_w"].clipped == sum(r.clipped for r in expected)


DELAYED = {"all": {"format": "fp8_e4m3", "scope": "delayed", "history": 4}}


@pytest.mark.parametrize("precision", ["nvfp4", "mxfp4", "fp8_block128", DELAYED])
def test_being_probed_changes_no_bit(precision):
    x, dy, counts = torch.randn(M, K), torch.randn(M, N), torch.tensor([11, 0, 29])
    for kind, sizes, more in ((Linear, (K, N), ()), (ExpertLinear, (3, K, N), (counts,))):
        layer = leaf(kind, *sizes, precision=precision)
        seed_rounding(layer, 1, 2)
        plain = passed(layer, x, dy, *more)
        peaks = layer.operand_peaks
        peaks = None if peaks is None else peaks.clone()
        before = torch.random.get_rng_state()
        with probing(layer) as probe:
            watched = passed(layer, x, dy, *more)
        assert probe.report().operands
        for a, b in zip(plain, watched, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(before, torch.random.get_rng_state())
        assert peaks is None or torch.equal(peaks, layer.operand_peaks)


def test_nothing_is_left_after_an_exception():
    model = torch.nn.Sequential(leaf(), leaf(Linear, N, K))

    def fail():
        assert all(part.observer is not None for part in model)
        raise KeyError

    with pytest.raises(KeyError), probing(model):
        fail()
    assert all(part.observer is None and "observer" not in part.__dict__ for part in model)


def test_a_backward_pass_after_the_block_is_not_seen():
    layer = leaf()
    x, dy = torch.randn(M, K), torch.randn(M, N)
    with probing(layer) as probe:
        y = layer(x)
    before = probe.report()
    assert {r.operand for r in before.operands} == {"fprop_x", "fprop_w"}
    y.backward(dy.to(y))
    assert probe.report() == before


def test_calls_add_up_and_recomputing_distorts_no_ratio():
    layer = leaf()
    x, dy = torch.randn(M, K), torch.randn(M, N)
    with probing(layer) as one:
        passed(layer, x, dy)
    with probing(layer) as twice:
        passed(layer, x, dy)
        passed(layer, 2 * x, dy)
    with probing(layer) as recomputed:
        inputs = x.clone().requires_grad_()
        y = checkpoint(layer, inputs, use_reentrant=False)
        y.backward(dy.to(y))  # pyright: ignore
    a, b, c = (by_operand(p.report()) for p in (one, twice, recomputed))
    for operand in OPERANDS:
        again = 2 if operand.startswith("fprop") else 1
        assert c[operand].elements == again * a[operand].elements
        assert c[operand].snr_db == a[operand].snr_db
        assert c[operand].clip_fraction == a[operand].clip_fraction
        assert b[operand].elements == 2 * a[operand].elements
        assert b[operand].clipped == 2 * a[operand].clipped
    assert b["fprop_x"].noise == pytest.approx(5 * a["fprop_x"].noise)


# Selectors


class Toy(torch.nn.Module):
    def __init__(self, n=4):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"up": leaf(), "out": leaf(Linear, N, K, role="attention")})
            for _ in range(n)
        )
        self.head = leaf(Linear, K, N, role="head", precision="bf16")

    def forward(self, x):
        for block in self.blocks:
            for part in block.children():
                x = part(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"layers": "last 25%"}, {"blocks.3.up", "blocks.3.out"}),
        ({"roles": "attention", "layers": "0:2"}, {"blocks.0.out", "blocks.1.out"}),
        ({"where": "blocks.*.up", "layers": "-1"}, {"blocks.3.up"}),
        ({"roles": ("ffn", "head"), "layers": "first"}, {"blocks.0.up"}),
        ({}, {f"blocks.{i}.{part}" for i in range(4) for part in ("up", "out")}),
    ],
)
def test_selectors_are_those_of_rules(how, expected):
    model = Toy()
    with probing(model, **how, operands=("wgrad_x", "fprop_w")) as probe:
        model(torch.randn(M, K)).float().square().mean().backward()
    found = probe.report().operands
    assert {r.leaf for r in found} == expected  # the head only casts
    assert {r.operand for r in found} == {"fprop_w", "wgrad_x"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"where": "blocks.*.down"}, "match no leaf, so nothing would be probed. Leaves: blocks.0"),
        ({"roles": ["fnn"]}, "unknown role to probe 'fnn'. Did you mean 'ffn'?"),
        ({"operands": ["fprop_y"]}, "unknown operand 'fprop_y'. Did you mean 'fprop_"),
        ({"layers": "9"}, "out of range"),
        ({"layers": "lst 15%"}, "layers must be"),
    ],
)
def test_selectors_that_choose_nothing_are_refused(how, message):
    with refused(message), probing(Toy(), **how):
        pass


def test_a_leaf_is_probed_once_at_a_time():
    layer = leaf()
    with probing(layer), refused("already probed"), probing(layer):
        pass
    assert layer.observer is None


def test_compiled_modules_are_refused():
    model = Toy(1)
    compiled: Any = torch.compile(model)
    with refused("eager mode only"), probing(compiled):
        pass
    model.get_submodule("blocks.0.up").compile()
    with refused("blocks.0.up is compiled, and probes work in eager mode only"), probing(model):
        pass
    assert model.head.observer is None


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_a_compiled_function_that_calls_a_leaf_is_refused():
    layer = leaf()
    compiled = torch.compile(lambda x: layer(x), backend="eager")
    x = torch.randn(M, K)
    expected = compiled(x)
    with probing(layer), refused("the leaf is compiled, and probes work in eager mode only"):
        compiled(x)
    assert torch.equal(compiled(x), expected)


def test_reports_round_trip_through_json():
    layer = leaf()
    with probing(layer) as probe:
        passed(layer, torch.randn(M, K), torch.randn(M, N))
    report = probe.report()
    assert ProbeReport.of(json.loads(json.dumps(report.to_plain()))) == report
    assert len(str(report).splitlines()) == 7
    with refused("unknown field of a probed operand 'sgnal'. Did you mean 'signal'?"):
        Probed.of({**report.operands[0].to_plain(), "sgnal": 1.0})


# Runs

PRECISION = ["precision=nvfp4"]  # one of two layers stays high
SHORT = ["data.seq_len=64", "data.batch_size=2", "data.eval_bytes_per_domain=512"]
PROBED = [*PRECISION, *SHORT, "probes.every_steps=3"]


@pytest.fixture
def brief(monkeypatch):
    evaluate_briefly(monkeypatch)


def probes_of(run):
    return json.loads((run / "probes.json").read_text())


def test_a_run_writes_what_it_probed(tmp_path, brief):
    recipe = tiny_recipe("mlp", *PROBED, "trainer.accumulate=2")
    result = train(recipe, tmp_path)
    steps = probes_of(tmp_path)["steps"]
    assert [s["step"] for s in steps] == [3, 6]
    tokens = 2 * 64  # of the first micro-batch alone
    for step in steps:
        report = ProbeReport.of(step)
        assert {r.leaf.split(".")[1] for r in report.operands} == {"0"}
        by_leaf = {r.leaf: r for r in report.operands if r.operand == "fprop_x"}
        assert len(by_leaf) > 3
        assert all(r.elements == tokens * 32 for n, r in by_leaf.items() if n.endswith(".up"))
        assert all(15 < (r.snr_db or 0) < 40 for r in report.operands)
    kept = result["probes"]
    assert [s["step"] for s in kept] == [3, 6]
    first = steps[1]["operands"][0]
    assert kept[1]["operands"][0] == {
        **{key: first[key] for key in ("leaf", "operand", "format", "elements", "snr_db")},
        "clipped": first["clip_fraction"],
        "underflowed": first["underflow_fraction"],
        "scales": first["scales"],
    }
    assert not kept[0]["operands"][0]["scales"]


def test_a_resumed_run_leaves_the_same_probes(tmp_path, brief, monkeypatch):
    ffn = {"name": "moe", "n_experts": 4, "d_expert": 32}
    recipe = tiny_recipe(ffn, *PROBED, "probes.roles=[expert]")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = train(recipe, whole)
    with killed_after(monkeypatch, 4):  # between two probes
        train(recipe, cut)
    (cut / "probes.json").write_text("half of a")
    assert timeless(train(recipe, cut)) == timeless(expected)
    assert (cut / "probes.json").read_bytes() == (whole / "probes.json").read_bytes()
    assert len(probes_of(whole)["steps"]) == 2


def test_a_probed_run_trains_the_same_weights(tmp_path, brief):
    for name, more in (("probed", PROBED), ("plain", [*PRECISION, *SHORT])):
        train(tiny_recipe("swiglu", *more), tmp_path / name)
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in ("probed", "plain"))
    assert a.keys() == b.keys()
    assert len(a) > 0
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "plain" / "probes.json").exists()


def test_probes_that_choose_nothing_are_refused_before_the_first_step(tmp_path):
    recipe = tiny_recipe("mlp", *PROBED, "probes.name=blocks.*.moe")
    with refused("where='blocks.*.moe', roles=[], layers=None match no leaf"):
        train(recipe, tmp_path)
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["probes.evry_steps=3"], "'probes.evry_steps'. Did you mean 'probes.every_steps'?"),
        (["probes.every_steps=0"], "probes.every_steps must be positive, got 0"),
        (["probes.operands=[wgrad]"], "unknown operand in probes.operands 'wgrad'"),
        (["probes.layers=lst 15%"], "layers must be"),
        (["probes=yes"], "probes must be a mapping"),
        (["probes={}", "trainer.compile=true"], "probes work in eager mode only"),
    ],
)
def test_wrong_probes_are_refused_where_a_recipe_enters(said, message):
    with refused(message):
        tiny_recipe("mlp", *said)
    assert tiny_recipe("mlp").probes is None


# A model and one batch


def small_model(precision: Any = "nvfp4", **options):
    ffn = {"name": "moe", "n_experts": 4, "top_k": 2, "d_expert": 32}
    config = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 32, "ffn": ffn, **options}
    return zoo.build({"model": config, "precision": precision})


def test_one_batch_of_a_model_is_probed_and_leaves_it_as_it_was():
    delayed = {"base": "nvfp4", "rules": [{"use": DELAYED, "name": "*.down", "layers": "0"}]}
    model = small_model(delayed)
    tokens = torch.randint(256, (3, 17))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    peaks = [b for n, b in model.named_buffers() if n.endswith("operand_peaks")]
    assert len(peaks) == 1
    peaks[0].fill_(0.125)
    random_state = torch.random.get_rng_state()
    report = probe_model(model, tokens)
    assert {r.operand for r in report.operands} == set(OPERANDS)
    assert {r.leaf.split(".")[1] for r in report.operands} == {"0"}  # the last layer is high
    rows = {(r.leaf, r.operand): r for r in report.operands}
    assert rows["blocks.0.attention.out", "fprop_x"].elements == 3 * 16 * 32
    assert rows["blocks.0.ffn.experts.down", "fprop_x"].elements == 3 * 16 * 2 * 32
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert (peaks[0] == 0.125).all()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_padding_is_neither_read_nor_predicted():
    model = small_model()
    tokens = torch.randint(256, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    other = torch.where(mask, tokens, 3)
    a, b = (probe_model(model, t, mask=mask, roles="expert") for t in (tokens, other))
    assert a == b
    assert a != probe_model(model, other, roles="expert")


def test_a_model_with_nothing_to_probe_is_refused():
    tokens = torch.randint(256, (2, 8))
    with refused("none of the 2 leaves to probe quantises anything"):
        probe_model(small_model("bf16"), tokens, roles="expert", layers="last")
    with refused("tokens must be [B, S] with S >= 2, got [2, 1]"):
        probe_model(small_model(), tokens[:, :1])
    with refused("the mask leaves no token to predict"):
        probe_model(small_model(), tokens, mask=torch.zeros(2, 8, dtype=torch.bool))
    with refused("no weight of the model takes a gradient"):
        probe_model(small_model().requires_grad_(False), tokens)
